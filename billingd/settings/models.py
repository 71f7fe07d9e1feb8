"""Every table and key of the configuration with its default (the same list is in the README)."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

import sqlalchemy as sa
from cronsim import CronSim, CronSimError
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from billingd.settings.values import (
    DURATION,
    Duration,
    PositiveDuration,
    host_port,
    is_loopback,
    parse_duration,
    positive,
    safe_url,
)

ANY_TIME: Final = datetime(2026, 1, 1, tzinfo=UTC)


class Section(BaseModel):
    """A table of the TOML file: no unknown keys, no later changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class AmplifySettings(Section):
    """Where Amplify is, and as whom."""

    region: Literal["us", "eu", "ap"] = "us"
    central_url: str | None = None
    login_url: str | None = None
    platform_url: str | None = None
    api_version: Literal["v1", "v1alpha1"] = "v1"
    organization_id: str = Field(default="", max_length=36)
    client_id: str = ""
    client_secret: SecretStr = SecretStr("")
    timeout: PositiveDuration = timedelta(seconds=20)

    @field_validator("central_url", "login_url", "platform_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        return None if value is None else safe_url(value)


class RecurlySettings(Section):
    """Where Recurly is, and with which key."""

    region: Literal["us", "eu"] = "us"
    base_url: str | None = None
    api_key: SecretStr = SecretStr("")
    requests_per_minute: int = Field(default=300, ge=1)
    collection_method: Literal["manual", "automatic"] = "manual"
    timeout: PositiveDuration = timedelta(seconds=20)
    settling: Duration = timedelta(seconds=60)

    @field_validator("api_key")
    @classmethod
    def _api_key(cls, value: SecretStr) -> SecretStr:
        secret = value.get_secret_value()
        if not secret.isascii() or any(c.isspace() for c in secret):
            raise ValueError("must be ASCII without spaces, as Recurly shows it")
        return value

    @field_validator("base_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        return None if value is None else safe_url(value)


class WebhookSettings(Section):
    """How Amplify and Recurly reach us."""

    listen: str = "127.0.0.1:8080"
    secret: SecretStr = SecretStr("")
    auth: str = "header:Authorization"
    body_bytes_max: int = Field(default=1_048_576, ge=1)
    tls_cert: str = ""
    tls_key: str = ""

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        host_port(value)
        return value

    @field_validator("auth")
    @classmethod
    def _auth(cls, value: str) -> str:
        if not re.fullmatch(r"basic|none|(header|query):[A-Za-z][A-Za-z0-9_-]{0,63}", value):
            raise ValueError("must be header:NAME, basic, query:NAME or none")
        return value


class AdminSettings(Section):
    """Where operators reach us: loopback or a unix socket, nothing else."""

    listen: str = "127.0.0.1:8081"

    @field_validator("listen")
    @classmethod
    def _listen(cls, value: str) -> str:
        if value.startswith("unix:"):
            if not value.removeprefix("unix:").startswith("/"):
                raise ValueError("write the socket's whole path, as in unix:/run/billingd/admin.sock")
            return value
        if not is_loopback(host_port(value)[0]):
            raise ValueError(
                "must be a loopback address or unix:/PATH; the admin listener asks for no password"
            )
        return value


class StoreSettings(Section):
    """Where billingd remembers."""

    url: str = "sqlite+aiosqlite:////var/lib/billingd/billingd.db"
    keep_done: PositiveDuration = timedelta(days=30)

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        try:
            url = sa.make_url(value)
        except sa.exc.ArgumentError as error:
            raise ValueError("is not a database URL") from error
        if url.drivername not in {"sqlite+aiosqlite", "postgresql+asyncpg"}:
            raise ValueError("must begin with sqlite+aiosqlite:// or postgresql+asyncpg://")
        if url.drivername == "sqlite+aiosqlite" and url.database in {None, "", ":memory:"}:
            raise ValueError("must name a file, as in sqlite+aiosqlite:////var/lib/billingd/billingd.db")
        return value


class TrafficSettings(Section):
    """What is counted, and when a count is believed."""

    source: Literal["metrics", "summary", "search"] = "metrics"
    window: PositiveDuration = timedelta(hours=1)
    settle: Duration = timedelta(hours=2)
    horizon: Duration = timedelta(days=3)
    schedule: str = "7 * * * *"
    billable: Literal["total", "success"] = "total"

    @field_validator("window")
    @classmethod
    def _window(cls, value: timedelta) -> timedelta:
        if value % timedelta(seconds=1):
            raise ValueError("must be whole seconds: Recurly's timestamps have no fractions")
        return value

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, value: str) -> str:
        if DURATION.fullmatch(value):
            positive(parse_duration(value))
            return value
        try:
            CronSim(value, ANY_TIME)
        except CronSimError as error:
            raise ValueError(
                'must be a cron line in UTC, as in "7 * * * *", or a duration, as in "10s"'
            ) from error
        return value


class OutboxSettings(Section):
    """How hard the outbox tries."""

    workers: int = Field(default=8, ge=1, le=256)
    attempts_max: int = Field(default=12, ge=1)
    backoff: PositiveDuration = timedelta(seconds=2)
    backoff_max: PositiveDuration = timedelta(minutes=10)
    lease: PositiveDuration = timedelta(minutes=2)
    drain: Duration = timedelta(seconds=20)


class AccountSettings(Section):
    """What to do when a subscriber has no account at Recurly."""

    missing: Literal["hold", "create", "reject"] = "hold"


class SubscriptionSettings(Section):
    """How a subscription ends at Recurly."""

    on_cancel: Literal["terminate", "cancel"] = "terminate"


class CatchUpSettings(Section):
    """How lost webhooks are found."""

    watch_topic: str = "billingd"
    every: PositiveDuration = timedelta(minutes=1)
    resync_every: PositiveDuration = timedelta(hours=6)


class NotificationSettings(Section):
    """Who is told. Apprise URLs carry secrets and are shown masked."""

    provider: tuple[SecretStr, ...] = ()
    subscriber: SecretStr = SecretStr("")
    marketplace_url: str = ""
    templates: str = ""

    @field_validator("templates")
    @classmethod
    def _templates(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("write the directory's whole path, as in /etc/billingd/notices")
        return value
