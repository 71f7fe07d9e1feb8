"""Reads the configuration: TOML, then secret files, then environment; later wins, every fault at once."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import sqlalchemy as sa
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from billingd.domain.errors import BillingdError
from billingd.domain.privacy import KNOWN
from billingd.settings.lines import lines_of
from billingd.settings.models import (
    AccountSettings,
    AdminSettings,
    AmplifySettings,
    CatchUpSettings,
    NotificationSettings,
    OutboxSettings,
    RecurlySettings,
    StoreSettings,
    SubscriptionSettings,
    TrafficSettings,
    WebhookSettings,
)
from billingd.settings.values import format_duration, host_port, is_loopback

SHOWS_ALL: Final = "`billingd config show` lists them all"
DEFAULT_CONFIG: Final = Path("/etc/billingd/billingd.toml")
ENV_PREFIX: Final = "BILLINGD_"
SECRETS: Final = (("amplify", "client_secret"), ("recurly", "api_key"), ("webhooks", "secret"))
SECRET_KEYS: Final = frozenset(
    {*(f"{section}.{key}" for section, key in SECRETS), "notifications.provider", "notifications.subscriber"}
)
"""What says nothing when it is compared: who looks may not see it."""

STORE_URL: Final = ("store", "url")
"""May hold a password, and then comes from where secrets come from."""

SCHEMES: Final = frozenset({"bearer", "basic"})
"""Words that may stand in front of the webhooks' secret, and are no secret."""

SECRET_BYTES_MAX: Final = 65_536
NAMELESS: Final = "(no name) "
"""What tables are called whose head is no TOML."""

BROKEN_LINES_MAX: Final = 20
"""Lines of a file that are no TOML; a file with more of them is something else."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with the configuration: the key as it is written in the file, and what to do."""

    key: str
    message: str
    place: str = ""
    """FILE:LINE, the variable or the secret file it comes from; "" when it is set nowhere."""

    def __str__(self) -> str:
        if self.place.startswith(f"{self.key}:"):
            return f"{self.place}: {self.message}"
        elsewhere = self.place not in {"", self.key, f"${self.key}"}
        return f"{self.place}: {self.key}: {self.message}" if elsewhere else f"{self.key}: {self.message}"


class ConfigurationError(BillingdError):
    """The configuration cannot be used; every fault is named at once.

    `partial` is what the configuration says without the faulty keys, where that much can be told; `places`
    where each key was set.
    """

    def __init__(
        self,
        faults: list[Fault],
        partial: "Settings | None" = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.faults = sorted(faults, key=_by_line)
        super().__init__("\n".join(str(fault) for fault in self.faults))
        self.partial = partial
        self.places: Mapping[str, str] = places or {}


class Settings(BaseSettings):
    """Everything that can be configured."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", validate_default=True
    )

    secrets_dir: Path | None = None
    amplify: AmplifySettings = AmplifySettings()
    recurly: RecurlySettings = RecurlySettings()
    webhooks: WebhookSettings = WebhookSettings()
    admin: AdminSettings = AdminSettings()
    store: StoreSettings = StoreSettings()
    traffic: TrafficSettings = TrafficSettings()
    outbox: OutboxSettings = OutboxSettings()
    accounts: AccountSettings = AccountSettings()
    subscriptions: SubscriptionSettings = SubscriptionSettings()
    catch_up: CatchUpSettings = CatchUpSettings()
    notifications: NotificationSettings = NotificationSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` merged: it alone knows where each value came from."""
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, and for each `section.key` that is not a default where its value came from.

    `places` says the same more closely: the line, the variable, the secret file.
    """

    settings: Settings
    origins: Mapping[str, str]
    places: Mapping[str, str] = field(default_factory=dict)


def load(config: Path | None, environment: Mapping[str, str] | None = None) -> Loaded:
    """Read and cross-check the configuration. Raises ConfigurationError with every fault at once.

    `config` None means $BILLINGD_CONFIG, else the file in /etc when it exists, else none. From then on no
    error's text has a secret of it.
    """
    env = os.environ if environment is None else environment
    faults: list[Fault] = []
    places: dict[str, str] = {}
    path = config or _default_path(env)
    layers: list[tuple[str, dict[str, Any]]] = []
    readable = True
    if path is not None:
        document, readable = _toml(path, faults, places)
        layers.append((str(path), document))
    merged: dict[str, Any] = {}
    directory = env.get(ENV_PREFIX + "SECRETS_DIR") or (layers[0][1].get("secrets_dir") if layers else None)
    for where in (directory, env.get("CREDENTIALS_DIRECTORY")):
        if where:
            found = _secret_files(Path(str(where)), faults, places)
            if where == env.get("CREDENTIALS_DIRECTORY"):
                faults += _another_store(found, [layer for _, layer in layers], places)
            layers.append((str(where), found))
    layers.append(("environment", _environment(env, faults, places)))
    origins: dict[str, str] = {}
    for origin, layer in layers:
        _merge(merged, layer, origin, origins)
    faults = placed(faults, places)
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        faults += placed([_fault(item["loc"], item["msg"], item["type"]) for item in error.errors()], places)
        partial = _without(merged, [item["loc"] for item in error.errors()])
        named = {fault.key for fault in faults}
        if partial is not None:
            KNOWN.add(secrets_of(partial))
            crossed = placed(cross_check(partial), places)
            faults += [fault for fault in crossed if fault.key not in named]
        raise ConfigurationError(faults, partial if readable else None, places) from None
    KNOWN.add(secrets_of(settings))
    faults += placed(cross_check(settings), places)
    if faults:
        raise ConfigurationError(faults, settings if readable else None, places)
    return Loaded(settings, origins, places)


def secrets_of(settings: Settings) -> list[str]:
    """Everything configured that may stand in no log and no error."""

    def inside(value: Any) -> list[str]:
        if isinstance(value, SecretStr):
            return [value.get_secret_value()]
        if isinstance(value, BaseModel):
            return [each for _, one in value for each in inside(one)]
        return [each for one in value for each in inside(one)] if isinstance(value, tuple) else []

    found = [*inside(settings), *passwords_in(settings.store.url)]
    return [secret for secret in found if secret]


def _by_line(fault: Fault) -> tuple[bool, int]:
    """Those of the file first, from its top to its end."""
    _file, colon, line = fault.place.rpartition(":")
    return (False, int(line)) if colon and line.isdigit() else (True, 0)


def placed(faults: list[Fault], places: Mapping[str, str]) -> list[Fault]:
    """The same faults, each with the place of its key, or of what holds it."""

    def place(key: str) -> str:
        found = places.get(key)
        above = re.sub(r"\.?[^.\[]+$|\[[0-9]+\]$", "", key)
        return found if found is not None else place(above) if above and above != key else ""

    return [fault if fault.place else replace(fault, place=place(fault.key)) for fault in faults]


def _without(merged: dict[str, Any], locations: list[tuple[int | str, ...]]) -> Settings | None:
    """The settings without the faulty keys."""
    for section, *rest in locations:
        table = merged.get(str(section))
        if rest and isinstance(table, dict):
            table.pop(rest[0], None)
        else:
            merged.pop(str(section), None)
    try:
        return Settings(**merged)
    except ValidationError:
        return None


def _default_path(env: Mapping[str, str]) -> Path | None:
    if named := env.get(ENV_PREFIX + "CONFIG"):
        return Path(named)
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def _toml(path: Path, faults: list[Fault], places: dict[str, str]) -> tuple[dict[str, Any], bool]:
    """The file's tables without the secrets it should not hold; whether all of it could be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        faults.append(Fault(str(path), f"cannot be read: {error.strerror}", str(path)))
        return {}, False
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        faults.append(Fault(str(path), "is not UTF-8, as TOML must be", f"{path}:{line}"))
        return {}, False
    document, broken = _parsed(text)
    faults += [Fault(str(path), f"is not TOML: {why}", f"{path}:{line}") for line, why in broken]
    if document is None:
        return {}, False
    for where, line in lines_of(_blanked(text, [line for line, _ in broken])).items():
        places[key_of(where)] = f"{path}:{line}"
    for section, key in SECRETS:
        if isinstance(document.get(section), dict) and key in document[section]:
            del document[section][key]
            name = f"{section}.{key}"
            faults.append(
                Fault(
                    name,
                    "is a secret and may not stand in the file; set "
                    f"{ENV_PREFIX}{section.upper()}__{key.upper()}, or put it into a file named "
                    f"{name} in secrets_dir or $CREDENTIALS_DIRECTORY",
                    places.pop(name, f"{path}"),
                )
            )
    store = document.get("store")
    if isinstance(store, dict) and passwords_in(store.get("url")):
        del store["url"]
        faults.append(
            Fault(
                "store.url",
                "holds a password, which may not stand in the file; leave the password out here, and put the "
                "whole URL into a file named store.url in secrets_dir or $CREDENTIALS_DIRECTORY (of "
                f"billingd-backup.service too), or set {ENV_PREFIX}STORE__URL",
                places.pop("store.url", f"{path}"),
            )
        )
    return document, not broken


def _parsed(text: str) -> tuple[dict[str, Any] | None, list[tuple[int, str]]]:
    """The document without the lines that are no TOML, and these with what is wrong with each.

    The parser stops at its first complaint; without that line it goes on to the next. Of a table whose name
    cannot be read nothing is in the document: nobody can tell what its keys mean. None when a fault reaches
    over lines, so that nobody can tell what the rest means.
    """
    broken: list[tuple[int, str]] = []
    while len(broken) < BROKEN_LINES_MAX:
        try:
            document = tomllib.loads(_blanked(text, [line for line, _ in broken]))
            return {name: it for name, it in document.items() if not name.startswith(NAMELESS)}, broken
        except tomllib.TOMLDecodeError as error:
            match = re.search(r"^(.*) \(at (?:line ([0-9]+), column [0-9]+|end of document)\)$", str(error))
            line = int(match[2]) if match is not None and match[2] else text.rstrip().count("\n") + 1
            if line in {each for each, _ in broken}:
                break
            broken.append((line, str(error) if match is None else match[1]))
            if match is None or not match[2]:
                break
    return None, sorted(broken)


def _blanked(text: str, lines: list[int]) -> str:
    """The text with nothing on these lines, or the head of a table that is none of ours."""
    rows = text.split("\n")
    for line in lines:
        rows[line - 1] = f'["{NAMELESS}{line}"]' if rows[line - 1].lstrip().startswith("[") else ""
    return "\n".join(rows)


def key_of(where: tuple[str | int, ...]) -> str:
    """`traffic.window`, `notifications.provider[1]`: a key as faults name it."""
    key = ""
    for part in where:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    return key


def _secret_files(directory: Path, faults: list[Fault], places: dict[str, str]) -> dict[str, Any]:
    """Secrets in files named after their keys: `recurly.api_key`, or `api_key` alone (but not `url`)."""
    found: dict[str, Any] = {}
    for section, key in (*SECRETS, STORE_URL):
        alone = [key] if (section, key) in SECRETS else []
        for name in (f"{section}.{key}", f"{section}__{key}", *alone):
            file = directory / name
            try:
                content = file.read_bytes()[:SECRET_BYTES_MAX].decode().strip()
            except FileNotFoundError:
                continue
            except UnicodeDecodeError:
                faults.append(Fault(f"{section}.{key}", "is not UTF-8", str(file)))
                break
            except ValueError as error:  # a NUL in the path
                faults.append(Fault(f"{section}.{key}", f"cannot be read: {error}", str(file)))
                break
            except OSError as error:
                faults.append(Fault(f"{section}.{key}", f"cannot be read: {error.strerror}", str(file)))
                break
            places[f"{section}.{key}"] = str(file)
            found.setdefault(section, {})[key] = content
            break
    return found


def _another_store(
    credential: Mapping[str, Any], files: Sequence[Mapping[str, Any]], places: Mapping[str, str]
) -> list[Fault]:
    """A credential's URL must be that of the files but for its password: who types has no credential."""
    whole = credential.get("store", {}).get("url")
    tables = [table for one in files if isinstance(table := one.get("store"), dict)]
    written = next((table["url"] for table in reversed(tables) if "url" in table), None)
    if whole is None or (isinstance(written, str) and _without_password(whole) == _without_password(written)):
        return []
    return [
        Fault(
            "store.url",
            "is another store in this credential than in the TOML file or secrets_dir, and a command that is "
            "typed has no credential: it would work on that one. Put the same URL there, into the TOML file "
            "without its password",
            places.get("store.url", ""),
        )
    ]


def _environment(env: Mapping[str, str], faults: list[Fault], places: dict[str, str]) -> dict[str, Any]:
    """The variables that are settings, nested. Unknown sections are refused by name."""
    known = set(Settings.model_fields)
    for name in sorted(env):
        section, nested, key = name.removeprefix(ENV_PREFIX).lower().partition("__")
        if name.startswith(ENV_PREFIX) and nested and section not in known:
            near = get_close_matches(section, sorted(known), n=1)
            meant = f"did you mean {ENV_PREFIX}{near[0].upper()}__{key.upper()}?" if near else SHOWS_ALL
            faults.append(Fault(name, f"is not a known setting; {meant}", f"${name}"))
    source = EnvSettingsSource(Settings)
    readable: dict[str, str | None] = {}
    for name, value in env.items():
        if not name.upper().startswith(ENV_PREFIX):
            continue
        source.env_vars = {name.lower(): value}
        try:
            source()
        except SettingsError:
            faults.append(
                Fault(
                    name,
                    """cannot be read; a list is written as JSON, as in '["json://host/"]'""",
                    f"${name}",
                )
            )
        else:
            readable[name.lower()] = value
            section, nested, key = name[len(ENV_PREFIX) :].lower().partition("__")
            if section in known:
                places[f"{section}.{key}" if nested else section] = f"${name}"
    source.env_vars = readable
    return dict(source())


def _merge(into: dict[str, Any], layer: Mapping[str, Any], origin: str, origins: dict[str, str]) -> None:
    for section, values in layer.items():
        if isinstance(values, Mapping):
            table = into.setdefault(section, {})
            if isinstance(table, dict):
                for key, value in values.items():
                    table[key] = value
                    origins[f"{section}.{key}"] = origin
                continue
        into[section] = values
        origins[section] = origin


def _fault(location: tuple[int | str, ...], message: str, kind: str) -> Fault:
    if kind == "extra_forbidden":
        *above, name = location
        message = f"is not a known key{_instead(str(name), _keys(above))}"
    return Fault(key_of(location), _in_our_words(message, kind))


WORDS: Final[Mapping[str, str]] = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text, in quotes",
    "tuple_type": "must be a list, in square brackets",
    "model_type": "must be a table, its keys below its name in brackets",
    "path_type": "must be a path, in quotes",
}
"""What pydantic says in its own."""


def _in_our_words(message: str, kind: str) -> str:
    said = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return WORDS.get(kind, said)


def _keys(section: list[int | str]) -> set[str]:
    """What may stand in a section, or at the top."""
    if not section:
        return set(Settings.model_fields)
    field_ = Settings.model_fields.get(str(section[0]))
    return set(getattr(field_.annotation, "model_fields", ())) if field_ is not None else set()


def _instead(name: str, known: set[str]) -> str:
    """What was probably meant, or where to look."""
    near = get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; {SHOWS_ALL}"


def cross_check(settings: Settings) -> list[Fault]:
    """Pairs of settings that make no sense together."""
    faults = []
    if settings.outbox.backoff > settings.outbox.backoff_max:
        faults.append(Fault("outbox.backoff", "is longer than outbox.backoff_max"))
    if settings.traffic.billable == "success" and settings.traffic.source == "metrics":
        faults.append(
            Fault(
                "traffic.billable",
                'cannot be "success" with traffic.source "metrics", which counts only totals',
            )
        )
    if settings.webhooks.listen == settings.admin.listen and host_port(settings.webhooks.listen)[1]:
        faults.append(Fault("webhooks.listen", "is where admin.listen is too; each needs a port of its own"))
    for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if getattr(settings.webhooks, one) and not getattr(settings.webhooks, other):
            faults.append(Fault(f"webhooks.{other}", f"is needed beside webhooks.{one}"))
    host = host_port(settings.webhooks.listen)[0]
    if settings.webhooks.auth == "none" and not is_loopback(host):
        faults.append(Fault("webhooks.auth", f'"none" is for loopback only, and webhooks.listen is {host}'))
    return faults


def missing_for_run(settings: Settings) -> list[Fault]:
    """What `run` cannot do without, although each key alone may be empty."""
    wanted = {
        "amplify.organization_id": settings.amplify.organization_id,
        "amplify.client_id": settings.amplify.client_id,
        "amplify.client_secret": settings.amplify.client_secret.get_secret_value(),
        "recurly.api_key": settings.recurly.api_key.get_secret_value(),
    }
    if settings.webhooks.auth != "none":
        wanted["webhooks.secret"] = settings.webhooks.secret.get_secret_value()
    faults = [
        Fault(key, f"is needed and has no value; {_where_to_set(key, settings.secrets_dir)}")
        for key, value in wanted.items()
        if not value
    ]
    words = wanted.get("webhooks.secret", "").split()
    if words and all(word.lower() in SCHEMES for word in words):
        faults.append(Fault("webhooks.secret", f"is only the word {words[0]}; the secret itself is missing"))
    return faults


def _where_to_set(key: str, secrets: Path | None) -> str:
    """How a key gets its value, and what may have gone wrong with it."""
    section, _, name = key.partition(".")
    variable = f"{ENV_PREFIX}{section}__{name}".upper()
    if (section, name) in SECRETS:
        how = f"put it into a file {key} in secrets_dir or $CREDENTIALS_DIRECTORY, or set {variable}"
        return how if secrets is None else f"{_not_found(key, secrets)}{how}"
    return f"write {name} = … under [{section}] of the TOML file, or set {variable}"


def _not_found(key: str, secrets: Path) -> str:
    """Why a secret's file was not found in secrets_dir, where that can be seen."""
    try:
        near = get_close_matches(key, sorted(file.name for file in secrets.iterdir()), n=1, cutoff=0.8)
    except (FileNotFoundError, NotADirectoryError):
        return f"there is no directory {secrets}, which secrets_dir names; "
    except (OSError, ValueError):  # said already, of the file itself
        return ""
    return f"{secrets / near[0]}: did you mean {key}? Or " if near else ""


def shown(loaded: Loaded) -> list[dict[str, Any]]:
    """Every key with its effective value, where that came from, secrets masked."""
    rows: list[dict[str, Any]] = []
    for section, table in loaded.settings:
        if not hasattr(table, "model_dump"):
            continue
        for key, value in table:
            name = f"{section}.{key}"
            rows.append({"key": name, "value": _plain(value), "origin": loaded.origins.get(name, "default")})
    return rows


def flat(settings: Settings) -> dict[str, Any]:
    """Every value by its key, as in `webhooks.listen`."""
    found: dict[str, Any] = {}
    for section, table in settings:
        if hasattr(table, "model_fields_set"):
            found |= {f"{section}.{key}": value for key, value in table}
        else:
            found[section] = table
    return found


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of such values that are no secrets, as JSON has them."""
    return {key: _plain(value) for key, value in values.items() if key not in SECRET_KEYS}


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return "(set)" if value.get_secret_value() else ""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "total_seconds"):
        return format_duration(value)
    if isinstance(value, Path):
        return str(value)
    return without_credentials(value)


def passwords_in(url: object) -> list[str]:
    """The passwords that a database URL holds, those of its query too."""
    try:
        parts = sa.make_url(url) if isinstance(url, str) else None
    except sa.exc.ArgumentError:
        return []
    if parts is None:
        return []
    found = [str(parts.password or "")]
    for name, value in parts.query.items():
        found += ([value] if isinstance(value, str) else value) if "password" in name else []
    return [password for password in found if password]


def _without_password(url: str) -> str:
    """A database URL as it may stand in the file; what is no URL as it is."""
    try:
        parts = sa.make_url(url)
    except sa.exc.ArgumentError:
        return url
    public = parts.difference_update_query([name for name in parts.query if "password" in name])
    return public._replace(password=None).render_as_string(hide_password=False)


def without_credentials(value: Any) -> Any:
    """A value as it is, but for what a URL says of who asks."""
    if not isinstance(value, str) or "://" not in value:
        return value
    if value.startswith(("sqlite", "postgresql")):
        url = sa.make_url(value)
        masked = url.update_query_dict({name: "***" for name in url.query if "password" in name})
        return masked.render_as_string(hide_password=True).replace("%2A%2A%2A", "***")
    parts = urlsplit(value)
    _user, at, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"***@{host}").geturl() if at else value
