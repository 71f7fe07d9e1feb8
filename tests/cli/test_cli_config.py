"""`check-config`, `config show`, and what `run` refuses to start with."""

import json
from pathlib import Path

import pytest
from cli_bench import SECRETS, Bench, document

SECRET_URL = "json://user:hidden-word@127.0.0.1:1/hidden-path"
SECRET_STORE = "postgresql+asyncpg://billingd:hidden-word@db/billingd?password=hidden-too"


def test_a_sound_configuration_says_where_it_was_read(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    (tmp_path / "recurly.api_key").write_text("hidden-file-key")
    env = {"BILLINGD_SECRETS_DIR": str(tmp_path), "BILLINGD_RECURLY__API_KEY": "hidden-api-key"}
    result = bench.run("check-config", env=env)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "configuration is sound",
        f"file: {bench.config}",
        "environment: amplify.client_secret, recurly.api_key, secrets_dir, webhooks.secret",
    ]


def test_secrets_in_files_are_named_with_their_directory(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "recurly.api_key").write_text("hidden-file-key")
    env = {"CREDENTIALS_DIRECTORY": str(credentials), "BILLINGD_RECURLY__API_KEY": None}
    result = bench.run("check-config", env=env)
    assert f"secrets: {credentials} (recurly.api_key)" in result.stdout.splitlines()


def test_a_secret_that_was_not_found_says_why(tmp_path: Path) -> None:
    """The directory is not there, or the file's name is misspelt."""
    bench = Bench(tmp_path)
    env = {"BILLINGD_SECRETS_DIR": str(tmp_path / "secrets"), "BILLINGD_WEBHOOKS__SECRET": None}
    missing = bench.run("check-config", env=env)
    assert f"there is no directory {tmp_path}/secrets, which secrets_dir names; put it" in missing.stderr
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "webhooks.secrt").write_text("hidden")
    misspelt = bench.run("check-config", env=env)
    assert (misspelt.exit_code, "hidden" in misspelt.stderr) == (2, False)
    assert f"{tmp_path}/secrets/webhooks.secrt: did you mean webhooks.secret? Or put it" in misspelt.stderr


def test_a_value_of_the_wrong_sort_is_told_in_plain_words(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.configure(
        "127.0.0.1:99999", '[outbox]\nworkers = "x"\n[accounts]\nmissing = "x"\n[recurly]\nregion = 3\n'
    )
    told = bench.run("check-config", env={"BILLINGD_OUTBX__WORKERS": "3"}).stderr
    assert "admin.listen: has no such port: 99999 is more than 65535" in told
    assert "outbox.workers: must be a whole number\n" in told
    assert "accounts.missing: must be 'hold', 'create' or 'reject'" in told
    assert "BILLINGD_OUTBX__WORKERS: is not a known setting; did you mean BILLINGD_OUTBOX__WORKERS?" in told
    assert "nput should be" not in told


def test_sampled_traffic_is_warned_about(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    result = bench.run("check-config", env={"BILLINGD_TRAFFIC__SOURCE": "search"})
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: traffic.source")


def test_every_fault_is_printed_with_its_key(tmp_path: Path) -> None:
    """Unknown keys, secrets in the file, impossible values: one line each, exit code 2."""
    bench = Bench(tmp_path)
    bench.configure(
        "0.0.0.0:8081", '[recurly]\napi_key = "hidden-word"\nregoin = "us"\n[outbox]\nlease = "soon"\n'
    )
    result = bench.run("check-config")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [line.split(": ")[:2] for line in result.stderr.splitlines()] == [
        [f"{bench.config}:4", "admin.listen"],
        [f"{bench.config}:9", "recurly.api_key"],
        [f"{bench.config}:10", "recurly.regoin"],
        [f"{bench.config}:12", "outbox.lease"],
    ]
    assert "did you mean region?" in result.stderr
    assert "hidden" not in result.output


def test_faults_of_every_source_are_told_at_once_each_with_its_place(tmp_path: Path) -> None:
    """Lines that are no TOML, two of them; a variable; a secret file; a key that is set nowhere."""
    bench = Bench(tmp_path)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "recurly.api_key").write_text("hidden but spaced")
    bench.config.write_text(
        f'[store]\nurl = "{bench.url}"\n[traffic]\nwindow = 90m\nsettle = "1h"\nsettle = "2h"\n'
        'schedule = "often"\n[outbox]\nbackoff = "1h"\n'
    )
    env = {
        "CREDENTIALS_DIRECTORY": str(credentials),
        "BILLINGD_RECURLY__API_KEY": None,
        "BILLINGD_RECURLY__REGION": "mars",
        "BILLINGD_AMPLFY__CLIENT_ID": "x",
    }
    result = bench.run("check-config", "--json", env=env)
    assert (result.exit_code, result.stderr) == (2, "")
    told = json.loads(result.stdout)
    assert told["sound"] is False
    assert {one["place"]: one["key"] for one in told["faults"]} == {
        f"{bench.config}:4": str(bench.config),
        f"{bench.config}:6": str(bench.config),
        f"{bench.config}:7": "traffic.schedule",
        f"{bench.config}:9": "outbox.backoff",
        "$BILLINGD_RECURLY__REGION": "recurly.region",
        "$BILLINGD_AMPLFY__CLIENT_ID": "BILLINGD_AMPLFY__CLIENT_ID",
        str(credentials / "recurly.api_key"): "recurly.api_key",
    }
    printed = bench.run("check-config", env=env)
    assert f"{bench.config}:4: is not TOML: " in printed.stderr
    assert "$BILLINGD_RECURLY__REGION: recurly.region: " in printed.stderr
    assert "did you mean BILLINGD_AMPLIFY__" in printed.stderr
    assert "hidden" not in printed.output


@pytest.mark.parametrize(
    ("head", "why"), [("[amplify", "Expected ']'"), ("[store]", "twice"), ("  [ap i]", "Expected ']'")]
)
def test_of_a_table_whose_head_is_broken_no_key_is_judged(head: str, why: str, tmp_path: Path) -> None:
    """Its lines are read all the same, and what comes after it."""
    bench = Bench(tmp_path)
    bench.config.write_text(
        f'[store]\nkeep_done = "1d"\n{head}\nregion = "us"\n[traffic]\nwindow = 1\n'
        f'{head}\nurl = "x"\nbroken\n[outbox]\nworkers = 0\n'
    )
    found = json.loads(bench.run("check-config", "--json").stdout)["faults"]
    told = [(one["place"], one["key"]) for one in found]
    name = str(bench.config)
    assert told == [
        (f"{name}:3", name),
        (f"{name}:6", "traffic.window"),
        (f"{name}:7", name),
        (f"{name}:9", name),
        (f"{name}:11", "outbox.workers"),
    ]
    assert why in found[0]["message"]


def test_a_sound_configuration_as_json(tmp_path: Path) -> None:
    found = document(Bench(tmp_path).run("check-config", "--json"))
    assert found == {"sound": True, "faults": [], "warnings": []}


@pytest.mark.parametrize(
    ("content", "line", "why"),
    [(b"a = 1\nb = '\xff'\n", 2, "is not UTF-8"), (b'[store]\nurl = """\nnever ends\n', 3, "is not TOML")],
)
def test_a_file_that_is_something_else_is_said_once_with_its_line(
    content: bytes, line: int, why: str, tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    bench.config.write_bytes(content)
    result = bench.run("check-config")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{bench.config}:{line}: {why}")
    assert len(result.stderr.splitlines()) == 1


def test_what_run_cannot_do_without_is_a_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.config.write_text("")
    for command in ("check-config", "run"):
        result = bench.run(command, env=dict.fromkeys(SECRETS, ""))
        assert result.exit_code == 2
        keys = [line.partition(": is needed")[0].split(": ")[-1] for line in result.stderr.splitlines()]
        assert {"amplify.client_id", "amplify.client_secret", "recurly.api_key", "webhooks.secret"} <= set(
            keys
        )


def test_a_channel_that_cannot_be_understood_is_a_fault_without_its_url(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.configure(
        "127.0.0.1:1",
        f'[notifications]\nprovider = ["{SECRET_URL}", "hidden-nonsense"]\nsubscriber = "mailto://hidden"\n',
    )
    result = bench.run("check-config")
    assert result.exit_code == 2
    assert [line.split(": ")[:2] for line in result.stderr.splitlines()] == [
        [f"{bench.config}:9", "notifications.provider[1]"],
        [f"{bench.config}:10", "notifications.subscriber"],
    ]
    assert "hidden" not in result.output


def test_what_the_postgresql_driver_does_not_know_is_a_fault(tmp_path: Path) -> None:
    """libpq's words in the URL would else end in the driver's own TypeError."""
    url = "postgresql+asyncpg://billingd:hidden@db/billingd?{}"
    bench = Bench(tmp_path)
    for command in (("check-config",), ("db", "current")):
        result = bench.run(*command, env={"BILLINGD_STORE__URL": url.format("sslmode=require&host=/run")})
        assert result.exit_code == 2
        assert "store.url: has sslmode, which asyncpg does not know" in result.stderr
        assert "hidden" not in result.output
    assert bench.run("check-config", env={"BILLINGD_STORE__URL": url.format("ssl=require")}).exit_code == 0


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.config.unlink()
    result = bench.run("status")
    assert result.exit_code == 2
    assert result.stderr == f"{bench.config}: cannot be read: No such file or directory\n"


def test_what_a_file_that_cannot_be_read_may_hold_is_not_called_missing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.config.write_text("[amplify")
    result = bench.run("check-config", env=dict.fromkeys(SECRETS, ""))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"{bench.config}:1: is not TOML")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [("config", "show"), ("config", "show", "--json")])
def test_config_show_never_prints_a_secret(words: tuple[str, ...], tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.configure(
        "127.0.0.1:1",
        f'[notifications]\nprovider = ["{SECRET_URL}"]\n'
        'marketplace_url = "https://hidden-user:hidden-word@market.example/path"\n',
    )
    result = bench.run(*words, env={"BILLINGD_STORE__URL": SECRET_STORE})
    assert result.exit_code == 0
    assert "hidden" not in result.output
    assert "postgresql+asyncpg://billingd:***@db/billingd?password=***" in result.stdout
    assert "https://***@market.example/path" in result.stdout


def test_config_show_names_each_values_origin(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    rows = {row["key"]: row for row in document(bench.run("config", "show", "--json"))["settings"]}
    assert rows["recurly.api_key"] == {"key": "recurly.api_key", "value": "(set)", "origin": "environment"}
    assert rows["store.url"]["origin"] == str(bench.config)
    assert rows["outbox.lease"] == {"key": "outbox.lease", "value": "2m", "origin": "default"}
    assert rows["secrets_dir"]["value"] is None


def test_run_checks_the_variables_of_its_logs(tmp_path: Path) -> None:
    env = {"BILLINGD_LOG_LEVEL": "loud", "BILLINGD_LOG_FORMAT": "xml"}
    result = Bench(tmp_path).run("run", env=env)
    assert result.exit_code == 2
    assert [line.partition(": ")[0] for line in result.stderr.splitlines()] == list(env)
