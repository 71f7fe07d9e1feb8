"""The tables. Each refuses impossible rows, and names its constraints so that errors can be read."""

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Aware UTC in Python; `timestamptz` on PostgreSQL, sortable text on SQLite."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Refuse naive times, which mean something else on every machine."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone")
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Give the zone back that SQLite does not keep."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers only INTEGER PRIMARY KEY


def one_of(column: str, *words: str) -> sa.CheckConstraint:
    """CHECK that a column holds one of these words."""
    listed = ", ".join(f"'{word}'" for word in words)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


def _time(name: str, *, nullable: bool = False) -> sa.Column[Any]:
    return sa.Column(name, UtcDateTime(), nullable=nullable)


events = sa.Table(
    "events",
    metadata,
    sa.Column("source", sa.String(16), primary_key=True),
    sa.Column("id", sa.String(100), primary_key=True),
    sa.Column("type", sa.String(100), nullable=False),
    sa.Column("kind", sa.String(100), nullable=False),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("resource_id", sa.String(64)),
    sa.Column("subresource", sa.String(64)),
    sa.Column("correlation_id", sa.String(100)),
    sa.Column("via", sa.String(16), nullable=False, server_default="webhook"),
    _time("happened_at", nullable=True),
    _time("received_at"),
    one_of("source", "amplify", "recurly"),
    one_of("via", "webhook", "feed", "both"),
)
sa.Index("ix_events_received_at", events.c.received_at)
_deleted = sa.text("type = 'ResourceDeleted'")
sa.Index(
    "ix_events_deleted", events.c.kind, events.c.resource_id, sqlite_where=_deleted, postgresql_where=_deleted
)

outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("subject", sa.String(200), nullable=False),
    sa.Column("key", sa.String(300), nullable=False, unique=True),
    sa.Column("args", sa.JSON(), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    _time("due_at"),
    sa.Column("attempt", sa.Integer(), nullable=False, default=0),
    sa.Column("fence", sa.BigInteger(), nullable=False, default=0),
    sa.Column("error", sa.Text()),
    sa.Column("event_id", sa.String(100)),
    _time("created_at"),
    _time("settled_at", nullable=True),
    one_of("state", "pending", "leased", "done", "dead", "discarded"),
    sa.CheckConstraint("attempt >= 0", name="attempt"),
    sa.CheckConstraint("fence >= attempt", name="fence"),
    sa.CheckConstraint("(state IN ('pending', 'leased')) = (settled_at IS NULL)", name="settled_at"),
    sa.CheckConstraint("state NOT IN ('dead', 'discarded') OR error IS NOT NULL", name="error"),
    sqlite_autoincrement=True,
)
_unfinished = sa.text("state IN ('pending', 'leased')")
sa.Index(
    "ix_outbox_due", outbox.c.due_at, outbox.c.id, sqlite_where=_unfinished, postgresql_where=_unfinished
)
sa.Index(
    "ix_outbox_subject", outbox.c.subject, outbox.c.id, sqlite_where=_unfinished, postgresql_where=_unfinished
)
_settled = sa.text("settled_at IS NOT NULL")
sa.Index("ix_outbox_settled", outbox.c.settled_at, sqlite_where=_settled, postgresql_where=_settled)
_dead = sa.text("state = 'dead'")
sa.Index("ix_outbox_dead", outbox.c.id, sqlite_where=_dead, postgresql_where=_dead)

intents = sa.Table(
    "intents",
    metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("epoch", sa.Integer(), nullable=False),
    sa.Column("idempotency_key", sa.String(64), nullable=False, unique=True),
    sa.Column("body_hash", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("burnt", sa.Boolean(), nullable=False),
    sa.Column("sends", sa.Integer(), nullable=False, server_default="1"),
    _time("first_sent_at"),
    _time("last_sent_at"),
    _time("gave_up_at", nullable=True),
    _time("missed_at", nullable=True),
    sa.Column("result", sa.String(100)),
    one_of("state", "open", "refused", "done"),
    sa.CheckConstraint("epoch >= 1", name="epoch"),
    sa.CheckConstraint("sends >= 1", name="sends"),
    sa.CheckConstraint("last_sent_at >= first_sent_at", name="last_sent_at"),
    sa.CheckConstraint("(state = 'done') = (result IS NOT NULL)", name="result"),
)
_open = sa.text("state = 'open'")
sa.Index("ix_intents_open", intents.c.last_sent_at, sqlite_where=_open, postgresql_where=_open)

plan_links = sa.Table(
    "plan_links",
    metadata,
    sa.Column("plan_id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("title", sa.String(400), nullable=False),
    sa.Column("product_name", sa.String(100), nullable=False),
    sa.Column("plan_code", sa.String(50), nullable=False, unique=True),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("resource_version", sa.String(32)),
    _time("linked_at"),
    _time("ended_at", nullable=True),
    one_of("state", "active", "deprecated", "removed"),
    sa.CheckConstraint("(state = 'removed') = (ended_at IS NOT NULL)", name="ended_at"),
)
sa.Index("ix_plan_links_name", plan_links.c.name)

add_on_links = sa.Table(
    "add_on_links",
    metadata,
    sa.Column("quota_id", sa.String(64), primary_key=True),
    sa.Column("plan_id", sa.String(64), sa.ForeignKey("plan_links.plan_id"), nullable=False, index=True),
    sa.Column("add_on_code", sa.String(50), nullable=False, unique=True),
    sa.Column("title", sa.String(400), nullable=False),
    sa.Column("unit", sa.String(100), nullable=False),
    sa.Column("tier_type", sa.String(16), nullable=False),
    sa.Column("prices", sa.JSON()),
    _time("linked_at"),
    one_of("tier_type", "flat", "tiered", "volume", "stairstep"),
)

subscription_links = sa.Table(
    "subscription_links",
    metadata,
    sa.Column("subscription_id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("title", sa.String(400), nullable=False),
    sa.Column("plan_id", sa.String(64), sa.ForeignKey("plan_links.plan_id"), nullable=False, index=True),
    sa.Column("organization_id", sa.String(64), nullable=False),
    sa.Column("account_code", sa.String(50), nullable=False),
    sa.Column("uuid", sa.String(64), nullable=False, unique=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("resource_version", sa.String(32)),
    _time("linked_at"),
    _time("usage_from"),
    _time("approved_at", nullable=True),
    _time("usage_until", nullable=True),
    _time("ended_at", nullable=True),
    _time("period_started_at", nullable=True),
    _time("period_ends_at", nullable=True),
    sa.Column("billed_state", sa.String(16)),
    _time("seen_at", nullable=True),
    sa.Column("unit_amount", sa.String(32)),
    _time("served_at", nullable=True),
    one_of("state", "created", "active", "ending", "ended"),
    sa.CheckConstraint("(state = 'ended') = (ended_at IS NOT NULL)", name="ended_at"),
    sa.CheckConstraint("(state IN ('ending', 'ended')) = (usage_until IS NOT NULL)", name="usage_until"),
    sa.CheckConstraint("state <> 'active' OR approved_at IS NOT NULL", name="approved_at"),
)

absences = sa.Table(
    "absences",
    metadata,
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("title", sa.String(400), nullable=False),
    _time("since"),
    sa.Column("held", sa.Boolean(), nullable=False),
    _time("confirmed_at", nullable=True),
    one_of("kind", "plan", "subscription"),
)

billing_periods = sa.Table(
    "billing_periods",
    metadata,
    sa.Column(
        "subscription_id",
        sa.String(64),
        sa.ForeignKey("subscription_links.subscription_id"),
        primary_key=True,
    ),
    sa.Column("started_at", UtcDateTime(), primary_key=True),
    _time("ends_at"),
    sa.Column("trial", sa.Boolean(), nullable=False),
    sa.CheckConstraint("ends_at > started_at", name="ends_at"),
)

watermarks = sa.Table(
    "watermarks",
    metadata,
    sa.Column("source", sa.String(32), primary_key=True),
    _time("at"),
    sa.Column("window_seconds", sa.Integer(), nullable=False),
    _time("regular_since"),
    _time("read_at"),
    sa.CheckConstraint("window_seconds >= 1", name="window_seconds"),
    sa.CheckConstraint("regular_since <= at", name="regular_since"),
)

usage_records = sa.Table(
    "usage_records",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column(
        "subscription_id", sa.String(64), sa.ForeignKey("subscription_links.subscription_id"), nullable=False
    ),
    sa.Column("quota_id", sa.String(64), sa.ForeignKey("add_on_links.quota_id"), nullable=False),
    _time("window_start"),
    _time("window_end"),
    sa.Column("revision", sa.Integer(), nullable=False),
    sa.Column("units", sa.BigInteger(), nullable=False),
    _time("usage_timestamp"),
    sa.Column("merchant_tag", sa.String(64), nullable=False, unique=True),
    sa.Column("state", sa.String(16), nullable=False),
    _time("recorded_at"),
    _time("reported_at", nullable=True),
    sa.Column("usage_id", sa.String(64)),
    sa.UniqueConstraint(
        "subscription_id", "quota_id", "window_start", "window_end", "revision", name="record"
    ),
    one_of("state", "recorded", "reported", "held", "written_off"),
    sa.CheckConstraint("revision >= 1", name="revision"),
    sa.CheckConstraint("units <> 0 AND units BETWEEN -999999999 AND 999999999", name="units"),
    sa.CheckConstraint("window_end > window_start", name="window"),
    sa.CheckConstraint(
        "usage_timestamp >= window_start AND usage_timestamp < window_end", name="usage_timestamp"
    ),
    sa.CheckConstraint("(state = 'reported') = (reported_at IS NOT NULL)", name="reported_at"),
    sa.CheckConstraint("(state = 'reported') = (usage_id IS NOT NULL)", name="usage_id"),
    sqlite_autoincrement=True,
)
sa.Index("ix_usage_records_window", usage_records.c.window_start)
_unreported = sa.text("state <> 'reported'")
sa.Index(
    "ix_usage_records_unreported",
    usage_records.c.subscription_id,
    sqlite_where=_unreported,
    postgresql_where=_unreported,
)

unlinked_traffic = sa.Table(
    "unlinked_traffic",
    metadata,
    sa.Column("subscription_id", sa.String(64), primary_key=True),
    sa.Column("quota_id", sa.String(64), primary_key=True),
    sa.Column("window_start", UtcDateTime(), primary_key=True),
    sa.Column("units", sa.BigInteger(), nullable=False),
    _time("read_at"),
    sa.CheckConstraint("units > 0", name="units"),
)

held = sa.Table(
    "held",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("subject", sa.String(200), nullable=False),
    sa.Column("subscription_id", sa.String(64)),
    sa.Column("add_on_code", sa.String(50)),
    sa.Column("units", sa.BigInteger()),
    sa.Column("amount", sa.String(32)),
    sa.Column("currency", sa.String(3)),
    sa.Column("reason", sa.Text(), nullable=False),
    sa.Column("action", sa.JSON()),
    _time("since"),
    _time("closed_at", nullable=True),
    sa.Column("resolution", sa.Text()),
    sa.CheckConstraint("(closed_at IS NULL) = (resolution IS NULL)", name="resolution"),
    sqlite_autoincrement=True,
)
_standing = sa.text("closed_at IS NULL")
sa.Index(
    "uq_held_standing",
    held.c.kind,
    held.c.subject,
    unique=True,
    sqlite_where=_standing,
    postgresql_where=_standing,
)

feed_positions = sa.Table(
    "feed_positions",
    metadata,
    sa.Column("topic", sa.String(100), primary_key=True),
    sa.Column("topic_id", sa.String(64), nullable=False),
    sa.Column("position", sa.BigInteger(), nullable=False),
    sa.Column("mark", sa.BigInteger(), nullable=False),
    sa.Column("read_from", sa.BigInteger(), nullable=False),
    _time("marked_at"),
    _time("read_at"),
    sa.CheckConstraint("read_from >= 0 AND read_from <= mark AND mark <= position", name="position"),
)

marks = sa.Table(
    "marks",
    metadata,
    sa.Column("name", sa.String(40), primary_key=True),
    _time("at"),
    sa.Column("detail", sa.JSON(), nullable=False),
)

history = sa.Table(
    "history",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    _time("at"),
    sa.Column("subject", sa.String(200), nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("detail", sa.JSON(), nullable=False),
    sqlite_autoincrement=True,
)
sa.Index("ix_history_subject", history.c.subject, history.c.id)

reconciliations = sa.Table(
    "reconciliations",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("state", sa.String(16), nullable=False),
    _time("since"),
    _time("until"),
    sa.Column("subscription_id", sa.String(64)),
    sa.Column("repair", sa.Boolean(), nullable=False),
    sa.Column("asked", sa.String(200), nullable=False),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("cursor", sa.String(100)),
    sa.Column("steps_done", sa.Integer(), nullable=False),
    sa.Column("steps", sa.Integer(), nullable=False),
    sa.Column("subscriptions", sa.Integer(), nullable=False),
    sa.Column("records", sa.BigInteger(), nullable=False),
    sa.Column("held_units", sa.BigInteger(), nullable=False),
    sa.Column("repaired_units", sa.BigInteger(), nullable=False),
    sa.Column("not_compared", sa.JSON(), nullable=False),
    _time("started_at"),
    _time("stepped_at"),
    _time("finished_at", nullable=True),
    sa.Column("drifting", sa.Boolean()),
    sa.Column("error", sa.Text()),
    one_of("state", "running", "done", "failed"),
    sa.CheckConstraint("until > since", name="until"),
    sa.CheckConstraint("(state = 'running') = (finished_at IS NULL)", name="finished_at"),
    sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="error"),
    sqlite_autoincrement=True,
)

drift = sa.Table(
    "drift",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("reconciliation_id", BigId, sa.ForeignKey("reconciliations.id"), nullable=False, index=True),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("subject", sa.String(200), nullable=False),
    sa.Column("subscription_id", sa.String(64)),
    sa.Column("add_on_code", sa.String(50)),
    _time("window_start", nullable=True),
    sa.Column("units", sa.BigInteger(), nullable=False),
    sa.Column("tag", sa.Text()),
    sa.Column("repairable", sa.Boolean(), nullable=False),
    sa.Column("cause", sa.Text(), nullable=False),
    sa.Column("fix", sa.Text(), nullable=False),
    sa.Column("detail", sa.JSON(), nullable=False),
    sa.Column("mended", sa.Text()),
    sa.CheckConstraint("units >= 0", name="units"),
    one_of(
        "kind",
        "missing_record",
        "double_record",
        "foreign_record",
        "wrong_amount",
        "wrong_period",
        "late_beyond_horizon",
        "price_differs",
        "link_missing",
        "link_orphaned",
    ),
    sqlite_autoincrement=True,
)
