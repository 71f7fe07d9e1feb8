"""The configuration: where values come from, and every fault named at once with its key."""

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billingd.domain.errors import BillingdError
from billingd.domain.privacy import KNOWN
from billingd.settings import (
    ConfigurationError,
    format_duration,
    load,
    missing_for_run,
    parse_duration,
    passwords_in,
    secrets_of,
    shown,
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "billingd.toml"
    path.write_text(text, encoding="utf-8")
    return path


def faults(text: str, tmp_path: Path, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    with pytest.raises(ConfigurationError) as caught:
        load(write(tmp_path, text), environment or {})
    return {fault.key: fault.message for fault in caught.value.faults}


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("200ms", timedelta(milliseconds=200)),
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("2h", timedelta(hours=2)),
        ("3d", timedelta(days=3)),
        ("0s", timedelta(0)),
    ],
)
def test_durations_are_read_as_they_are_written(text: str, duration: timedelta) -> None:
    """A whole number and a unit."""
    assert parse_duration(text) == duration


@pytest.mark.parametrize("text", ["", "5", "s", "-1s", "1.5h", "1 h", "1H", "٣s", "9" * 30 + "d", 5, None])
def test_what_is_no_duration_is_refused(text: object) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@given(st.integers(0, 10**12))
def test_durations_survive_being_shown(milliseconds: int) -> None:
    """What `config show` prints can be written back."""
    duration = timedelta(milliseconds=milliseconds)
    assert parse_duration(format_duration(duration)) == duration


def test_environment_beats_secret_files_which_beat_the_file(tmp_path: Path) -> None:
    """Later wins, and each value knows where it came from."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "recurly.api_key").write_text("from-file\n")
    (secrets / "client_secret").write_text("s3cret")
    config = write(tmp_path, '[outbox]\nworkers = 2\nlease = "1m"\n[amplify]\nclient_id = "file"\n')
    loaded = load(
        config,
        {
            "CREDENTIALS_DIRECTORY": str(secrets),
            "BILLINGD_RECURLY__API_KEY": "from-environment",
            "BILLINGD_OUTBOX__WORKERS": "3",
            "BILLINGD_NOTIFICATIONS__PROVIDER": '["json://127.0.0.1/x"]',
        },
    )
    settings = loaded.settings
    assert settings.recurly.api_key.get_secret_value() == "from-environment"
    assert settings.amplify.client_secret.get_secret_value() == "s3cret"
    assert (settings.outbox.workers, settings.outbox.lease) == (3, timedelta(minutes=1))
    assert [one.get_secret_value() for one in settings.notifications.provider] == ["json://127.0.0.1/x"]
    origins = {row["key"]: row["origin"] for row in shown(loaded)}
    assert origins["outbox.workers"] == "environment"
    assert origins["outbox.lease"] == str(config)
    assert origins["amplify.client_secret"] == str(secrets)
    assert origins["outbox.drain"] == "default"


@pytest.mark.parametrize(
    "url", ["postgresql+asyncpg://me:pa55@db/b", "postgresql+asyncpg://me@db/b?password=pa55"]
)
def test_the_databases_password_is_a_secret_too(url: str, tmp_path: Path) -> None:
    """Refused in the file, where anybody may read it; taken from where secrets come from."""
    (tmp_path / "store.url").write_text(f"{url}\n")
    (tmp_path / "url").write_text("none of ours")
    found = faults(f'[store]\nurl = "{url}"\n', tmp_path)
    assert list(found) == ["store.url"]
    assert "pa55" not in found["store.url"]
    for way in ("a file named store.url", "BILLINGD_STORE__URL"):
        assert way in found["store.url"]
    without = 'url = "postgresql+asyncpg://me@db/b"'
    assert load(write(tmp_path, f"[store]\n{without}\n"), {}).settings.store.url in without
    for environment in ({"BILLINGD_STORE__URL": url}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}):
        loaded = load(write(tmp_path, f"[store]\n{without}\n"), environment)
        assert loaded.settings.store.url == url
        assert passwords_in(loaded.settings.store.url) == ["pa55"]
        assert "pa55" not in json.dumps(shown(loaded))


@pytest.mark.parametrize("written", ["", 'url = "sqlite+aiosqlite:////var/lib/billingd/billingd.db"'])
def test_who_types_a_command_reaches_the_daemons_store(written: str, tmp_path: Path) -> None:
    """Only the daemon has the credential: a restore that is typed must not hit another store."""
    (tmp_path / "store.url").write_text("postgresql+asyncpg://me:pa55@db/b")
    with pytest.raises(ConfigurationError) as caught:
        load(write(tmp_path, f"[store]\n{written}\n"), {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    [fault] = [fault for fault in caught.value.faults if fault.key == "store.url"]
    assert "without its password" in fault.message
    assert fault.place == str(tmp_path / "store.url")
    assert "pa55" not in str(fault)


@pytest.mark.parametrize("same", [True, False])
def test_who_types_a_command_reads_the_secret_files_too(same: bool, tmp_path: Path) -> None:
    """They come after the TOML file, whatever that says."""
    url = "postgresql+asyncpg://me:pa55@db/b"
    for name, there in (("secrets", url if same else url.replace("db/b", "db/other")), ("credentials", url)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.url").write_text(there)
    written = "" if same else '[store]\nurl = "postgresql+asyncpg://me@db/b"\n'
    config = write(tmp_path, f'secrets_dir = "{tmp_path}/secrets"\n{written}')
    environment = {"CREDENTIALS_DIRECTORY": f"{tmp_path}/credentials"}
    if same:
        assert load(config, environment).settings.store.url == load(config, {}).settings.store.url == url
        return
    with pytest.raises(ConfigurationError) as caught:
        load(config, environment)
    [fault] = [fault for fault in caught.value.faults if fault.key == "store.url"]
    assert "secrets_dir" in fault.message
    assert fault.place == f"{tmp_path}/credentials/store.url"


def test_what_is_shown_holds_no_secret(tmp_path: Path) -> None:
    """Secrets, the store's password and notification URLs are masked."""
    environment = {
        "BILLINGD_RECURLY__API_KEY": "k3y-secret",
        "BILLINGD_WEBHOOKS__SECRET": "h00k-secret",
        "BILLINGD_AMPLIFY__CLIENT_SECRET": "cl1ent-secret",
        "BILLINGD_STORE__URL": "postgresql+asyncpg://me:pa55-secret@db/billingd",
        "BILLINGD_NOTIFICATIONS__PROVIDER": '["slack://t0ken-secret/b/c"]',
        "BILLINGD_NOTIFICATIONS__SUBSCRIBER": "mailto://u:ma1l-secret@host?to={email}",
    }
    text = json.dumps(shown(load(write(tmp_path, ""), environment)))
    assert "secret@" not in text
    for value in ("k3y", "h00k", "cl1ent", "pa55", "t0ken", "ma1l"):
        assert value not in text


def test_every_fault_is_named_at_once(tmp_path: Path) -> None:
    """Unknown keys and sections, wrong values, secrets in the file, variables nobody knows."""
    found = faults(
        """
        [amplify]
        region = "mars"
        client_secret = "x"
        [outbox]
        workers = 0
        leese = "2m"
        [traffic]
        window = "1500ms"
        schedule = "every hour"
        [admin]
        listen = "0.0.0.0:8081"
        [recurly]
        base_url = "http://example.com"
        [nonsense]
        a = 1
        """,
        tmp_path,
        {"BILLINGD_NOPE__KEY": "1", "BILLINGD_RECURLY__TIMEOUT": "soon"},
    )
    assert set(found) == {
        "amplify.region",
        "amplify.client_secret",
        "outbox.workers",
        "outbox.leese",
        "traffic.window",
        "traffic.schedule",
        "admin.listen",
        "recurly.base_url",
        "recurly.timeout",
        "nonsense",
        "BILLINGD_NOPE__KEY",
    }
    assert "BILLINGD_AMPLIFY__CLIENT_SECRET" in found["amplify.client_secret"]
    assert "https" in found["recurly.base_url"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[outbox]\nbackoff = "11m"', "outbox.backoff"),
        ('[traffic]\nbillable = "success"', "traffic.billable"),
        ('[webhooks]\nlisten = "0.0.0.0:80"\nauth = "none"', "webhooks.auth"),
        ('[webhooks]\nlisten = "127.0.0.1:8081"', "webhooks.listen"),
    ],
)
def test_pairs_that_make_no_sense_are_named(text: str, key: str, tmp_path: Path) -> None:
    """Each value alone is well formed; together they are not."""
    assert set(faults(text, tmp_path)) == {key}


def test_a_pair_that_makes_no_sense_is_named_beside_other_faults(tmp_path: Path) -> None:
    text = '[amplify]\nregion = "mars"\n[traffic]\nbillable = "success"'
    assert set(faults(text, tmp_path)) == {"amplify.region", "traffic.billable"}


def test_a_variable_that_cannot_be_read_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    environment = {"BILLINGD_NOTIFICATIONS__PROVIDER": "json://host/", "BILLINGD_OUTBOX__WORKERS": "0"}
    found = faults("", tmp_path, environment)
    assert set(found) == {"BILLINGD_NOTIFICATIONS__PROVIDER", "outbox.workers"}
    assert "json://host/" in found["BILLINGD_NOTIFICATIONS__PROVIDER"]


@pytest.mark.parametrize(
    ("line", "section"),
    [
        ('url = "sqlite+aiosqlite://"', "store"),
        ('url = "sqlite+aiosqlite:///:memory:"', "store"),
        ('url = "sqlite:///x.db"', "store"),
        ('url = "mysql://x"', "store"),
        ('url = "nonsense"', "store"),
        ('listen = "8080"', "webhooks"),
        ('listen = "host:99999"', "webhooks"),
        ('auth = "header:"', "webhooks"),
        ('auth = "magic"', "webhooks"),
        ("body_bytes_max = 0", "webhooks"),
        ('listen = "unix:relative.sock"', "admin"),
        ('drain = "-1s"', "outbox"),
        ('lease = "0s"', "outbox"),
        ('missing = "shrug"', "accounts"),
        ('login_url = "ftp://x"', "amplify"),
    ],
)
def test_a_value_that_cannot_work_is_refused(line: str, section: str, tmp_path: Path) -> None:
    """At the door, with the key's name."""
    assert set(faults(f"[{section}]\n{line}\n", tmp_path)) == {f"{section}.{line.split(' ')[0]}"}


@pytest.mark.parametrize("text", ["[amplify", "\x00", "a = 1\na = 2"])
def test_what_is_no_toml_is_said_with_the_file(text: str, tmp_path: Path) -> None:
    """The file's name and the parser's words."""
    found = faults(text, tmp_path)
    assert list(found) == [str(tmp_path / "billingd.toml")]


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    """A named file must exist."""
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml: cannot be read"):
        load(tmp_path / "nowhere.toml", {})


def test_run_says_what_it_cannot_do_without(tmp_path: Path) -> None:
    """An empty configuration is well formed, and lists what is missing."""
    settings = load(write(tmp_path, ""), {}).settings
    assert {fault.key for fault in missing_for_run(settings)} == {
        "amplify.organization_id",
        "amplify.client_id",
        "amplify.client_secret",
        "recurly.api_key",
        "webhooks.secret",
    }


def test_without_authentication_no_secret_is_missing(tmp_path: Path) -> None:
    """`none` on loopback needs no secret."""
    settings = load(write(tmp_path, '[webhooks]\nauth = "none"\n'), {}).settings
    assert "webhooks.secret" not in {fault.key for fault in missing_for_run(settings)}


def test_whatever_reads_the_configuration_knows_its_secrets_from_then_on(tmp_path: Path) -> None:
    """All of them, when it has faults too."""
    text = """[notifications]
provider = ["json://hidden-token@127.0.0.1/"]
subscriber = "mailto://hidden-user@127.0.0.1/{email}"
"""
    env = {
        "BILLINGD_AMPLIFY__CLIENT_SECRET": "hidden-client-secret",
        "BILLINGD_RECURLY__API_KEY": "hidden-api-key",
        "BILLINGD_STORE__URL": "postgresql+asyncpg://billingd:hidden-password@127.0.0.1/b",
        "BILLINGD_WEBHOOKS__SECRET": "hidden-hook hidden-older-hook",
    }
    urls = ("json://hidden-token@127.0.0.1/", "mailto://hidden-user@127.0.0.1/{email}")
    words = ("password", "client-secret", "api-key", "hook", "older-hook")
    said = " ".join([*urls, *(f"hidden-{word}" for word in words)])
    assert len(secrets_of(load(write(tmp_path, text), env).settings)) == 6
    assert "hidden-" not in str(BillingdError(said))
    KNOWN.forget()
    with pytest.raises(ConfigurationError):
        load(write(tmp_path, text + 'templtes = "/"\n'), env)
    assert "hidden-" not in str(BillingdError(said))
