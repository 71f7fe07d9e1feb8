"""The first schema.

Revision ID: 0001
Revises: nothing
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("id", sa.String(length=100), nullable=False),
        sa.Column("type", sa.String(length=100), nullable=False),
        sa.Column("kind", sa.String(length=100), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("resource_id", sa.String(length=64), nullable=True),
        sa.Column("subresource", sa.String(length=64), nullable=True),
        sa.Column("correlation_id", sa.String(length=100), nullable=True),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("source IN ('amplify', 'recurly')", name=op.f("ck_events_source")),
        sa.PrimaryKeyConstraint("source", "id", name=op.f("pk_events")),
    )
    with op.batch_alter_table("events", schema=None) as batch_op:
        batch_op.create_index("ix_events_received_at", ["received_at"], unique=False)

    op.create_table(
        "held",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("subscription_id", sa.String(length=64), nullable=True),
        sa.Column("add_on_code", sa.String(length=50), nullable=True),
        sa.Column("units", sa.BigInteger(), nullable=True),
        sa.Column("amount", sa.String(length=32), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("action", sa.JSON(), nullable=True),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("resolution", sa.Text(), nullable=True),
        sa.CheckConstraint("(closed_at IS NULL) = (resolution IS NULL)", name=op.f("ck_held_resolution")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_held")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("held", schema=None) as batch_op:
        batch_op.create_index(
            "uq_held_standing",
            ["kind", "subject"],
            unique=True,
            sqlite_where=sa.text("closed_at IS NULL"),
            postgresql_where=sa.text("closed_at IS NULL"),
        )

    op.create_table(
        "intents",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("idempotency_key", sa.String(length=64), nullable=False),
        sa.Column("body_hash", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("burnt", sa.Boolean(), nullable=False),
        sa.Column("first_sent_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_sent_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("result", sa.String(length=100), nullable=True),
        sa.CheckConstraint("(state = 'done') = (result IS NOT NULL)", name=op.f("ck_intents_result")),
        sa.CheckConstraint("state IN ('open', 'refused', 'done')", name=op.f("ck_intents_state")),
        sa.CheckConstraint("epoch >= 1", name=op.f("ck_intents_epoch")),
        sa.CheckConstraint("last_sent_at >= first_sent_at", name=op.f("ck_intents_last_sent_at")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_intents")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_intents_idempotency_key")),
    )
    with op.batch_alter_table("intents", schema=None) as batch_op:
        batch_op.create_index(
            "ix_intents_open",
            ["last_sent_at"],
            unique=False,
            sqlite_where=sa.text("state = 'open'"),
            postgresql_where=sa.text("state = 'open'"),
        )

    op.create_table(
        "outbox",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=200), nullable=False),
        sa.Column("key", sa.String(length=300), nullable=False),
        sa.Column("args", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("event_id", sa.String(length=100), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state IN ('pending', 'leased')) = (settled_at IS NULL)", name=op.f("ck_outbox_settled_at")
        ),
        sa.CheckConstraint(
            "state IN ('pending', 'leased', 'done', 'dead', 'discarded')", name=op.f("ck_outbox_state")
        ),
        sa.CheckConstraint(
            "state NOT IN ('dead', 'discarded') OR error IS NOT NULL", name=op.f("ck_outbox_error")
        ),
        sa.CheckConstraint("attempt >= 0", name=op.f("ck_outbox_attempt")),
        sa.CheckConstraint("fence >= attempt", name=op.f("ck_outbox_fence")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint("key", name=op.f("uq_outbox_key")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("outbox", schema=None) as batch_op:
        batch_op.create_index(
            "ix_outbox_dead",
            ["id"],
            unique=False,
            sqlite_where=sa.text("state = 'dead'"),
            postgresql_where=sa.text("state = 'dead'"),
        )
        batch_op.create_index(
            "ix_outbox_due",
            ["due_at", "id"],
            unique=False,
            sqlite_where=sa.text("state IN ('pending', 'leased')"),
            postgresql_where=sa.text("state IN ('pending', 'leased')"),
        )
        batch_op.create_index(
            "ix_outbox_settled",
            ["settled_at"],
            unique=False,
            sqlite_where=sa.text("settled_at IS NOT NULL"),
            postgresql_where=sa.text("settled_at IS NOT NULL"),
        )
        batch_op.create_index(
            "ix_outbox_subject",
            ["subject", "id"],
            unique=False,
            sqlite_where=sa.text("state IN ('pending', 'leased')"),
            postgresql_where=sa.text("state IN ('pending', 'leased')"),
        )

    op.create_table(
        "plan_links",
        sa.Column("plan_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("title", sa.String(length=400), nullable=False),
        sa.Column("product_name", sa.String(length=100), nullable=False),
        sa.Column("plan_code", sa.String(length=50), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("resource_version", sa.String(length=32), nullable=True),
        sa.Column("linked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state = 'removed') = (ended_at IS NOT NULL)", name=op.f("ck_plan_links_ended_at")
        ),
        sa.CheckConstraint("state IN ('active', 'deprecated', 'removed')", name=op.f("ck_plan_links_state")),
        sa.PrimaryKeyConstraint("plan_id", name=op.f("pk_plan_links")),
        sa.UniqueConstraint("plan_code", name=op.f("uq_plan_links_plan_code")),
    )
    with op.batch_alter_table("plan_links", schema=None) as batch_op:
        batch_op.create_index("ix_plan_links_name", ["name"], unique=False)

    op.create_table(
        "unlinked_traffic",
        sa.Column("subscription_id", sa.String(length=64), nullable=False),
        sa.Column("quota_id", sa.String(length=64), nullable=False),
        sa.Column("window_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("read_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("units > 0", name=op.f("ck_unlinked_traffic_units")),
        sa.PrimaryKeyConstraint(
            "subscription_id", "quota_id", "window_start", name=op.f("pk_unlinked_traffic")
        ),
    )
    op.create_table(
        "watermarks",
        sa.Column("source", sa.String(length=32), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("window_seconds", sa.Integer(), nullable=False),
        sa.Column("regular_since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("read_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("regular_since <= at", name=op.f("ck_watermarks_regular_since")),
        sa.CheckConstraint("window_seconds >= 1", name=op.f("ck_watermarks_window_seconds")),
        sa.PrimaryKeyConstraint("source", name=op.f("pk_watermarks")),
    )
    op.create_table(
        "add_on_links",
        sa.Column("quota_id", sa.String(length=64), nullable=False),
        sa.Column("plan_id", sa.String(length=64), nullable=False),
        sa.Column("add_on_code", sa.String(length=50), nullable=False),
        sa.Column("title", sa.String(length=400), nullable=False),
        sa.Column("unit", sa.String(length=100), nullable=False),
        sa.Column("tier_type", sa.String(length=16), nullable=False),
        sa.Column("linked_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "tier_type IN ('flat', 'tiered', 'volume', 'stairstep')", name=op.f("ck_add_on_links_tier_type")
        ),
        sa.ForeignKeyConstraint(["plan_id"], ["plan_links.plan_id"], name=op.f("fk_add_on_links_plan_id")),
        sa.PrimaryKeyConstraint("quota_id", name=op.f("pk_add_on_links")),
        sa.UniqueConstraint("add_on_code", name=op.f("uq_add_on_links_add_on_code")),
    )
    with op.batch_alter_table("add_on_links", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_add_on_links_plan_id"), ["plan_id"], unique=False)

    op.create_table(
        "subscription_links",
        sa.Column("subscription_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("title", sa.String(length=400), nullable=False),
        sa.Column("plan_id", sa.String(length=64), nullable=False),
        sa.Column("organization_id", sa.String(length=64), nullable=False),
        sa.Column("account_code", sa.String(length=50), nullable=False),
        sa.Column("uuid", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("resource_version", sa.String(length=32), nullable=True),
        sa.Column("linked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("usage_from", sa.DateTime(timezone=True), nullable=False),
        sa.Column("approved_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("usage_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("period_started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("period_ends_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state = 'ended') = (ended_at IS NOT NULL)", name=op.f("ck_subscription_links_ended_at")
        ),
        sa.CheckConstraint(
            "(state IN ('ending', 'ended')) = (usage_until IS NOT NULL)",
            name=op.f("ck_subscription_links_usage_until"),
        ),
        sa.CheckConstraint(
            "state <> 'active' OR approved_at IS NOT NULL", name=op.f("ck_subscription_links_approved_at")
        ),
        sa.CheckConstraint(
            "state IN ('created', 'active', 'ending', 'ended')", name=op.f("ck_subscription_links_state")
        ),
        sa.ForeignKeyConstraint(
            ["plan_id"], ["plan_links.plan_id"], name=op.f("fk_subscription_links_plan_id")
        ),
        sa.PrimaryKeyConstraint("subscription_id", name=op.f("pk_subscription_links")),
        sa.UniqueConstraint("uuid", name=op.f("uq_subscription_links_uuid")),
    )
    with op.batch_alter_table("subscription_links", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_subscription_links_plan_id"), ["plan_id"], unique=False)

    op.create_table(
        "usage_records",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False
        ),
        sa.Column("subscription_id", sa.String(length=64), nullable=False),
        sa.Column("quota_id", sa.String(length=64), nullable=False),
        sa.Column("window_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("window_end", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("usage_timestamp", sa.DateTime(timezone=True), nullable=False),
        sa.Column("merchant_tag", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reported_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("usage_id", sa.String(length=64), nullable=True),
        sa.CheckConstraint(
            "(state = 'reported') = (reported_at IS NOT NULL)", name=op.f("ck_usage_records_reported_at")
        ),
        sa.CheckConstraint(
            "(state = 'reported') = (usage_id IS NOT NULL)", name=op.f("ck_usage_records_usage_id")
        ),
        sa.CheckConstraint("state IN ('recorded', 'reported', 'held')", name=op.f("ck_usage_records_state")),
        sa.CheckConstraint("revision >= 1", name=op.f("ck_usage_records_revision")),
        sa.CheckConstraint(
            "units <> 0 AND units BETWEEN -999999999 AND 999999999", name=op.f("ck_usage_records_units")
        ),
        sa.CheckConstraint(
            "usage_timestamp >= window_start AND usage_timestamp < window_end",
            name=op.f("ck_usage_records_usage_timestamp"),
        ),
        sa.CheckConstraint("window_end > window_start", name=op.f("ck_usage_records_window")),
        sa.ForeignKeyConstraint(
            ["quota_id"], ["add_on_links.quota_id"], name=op.f("fk_usage_records_quota_id")
        ),
        sa.ForeignKeyConstraint(
            ["subscription_id"],
            ["subscription_links.subscription_id"],
            name=op.f("fk_usage_records_subscription_id"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_records")),
        sa.UniqueConstraint("merchant_tag", name=op.f("uq_usage_records_merchant_tag")),
        sa.UniqueConstraint(
            "subscription_id", "quota_id", "window_start", "window_end", "revision", name="record"
        ),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("usage_records", schema=None) as batch_op:
        batch_op.create_index(
            "ix_usage_records_unreported",
            ["subscription_id"],
            unique=False,
            sqlite_where=sa.text("state <> 'reported'"),
            postgresql_where=sa.text("state <> 'reported'"),
        )
        batch_op.create_index("ix_usage_records_window", ["window_start"], unique=False)
