"""The feed's position, absences, marks, history of what was tried and decided, reconciliations, drift.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("subscription_links", sa.Column("unit_amount", sa.String(32)))
    with op.batch_alter_table("events") as events:
        events.add_column(sa.Column("via", sa.String(16), nullable=False, server_default="webhook"))
        events.add_column(sa.Column("happened_at", TIME))
        events.create_check_constraint(op.f("ck_events_via"), "via IN ('webhook', 'feed', 'both')")
    deleted = sa.text("type = 'ResourceDeleted'")
    op.create_index(
        "ix_events_deleted",
        "events",
        ["kind", "resource_id"],
        sqlite_where=deleted,
        postgresql_where=deleted,
    )
    op.create_table(
        "absences",
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("title", sa.String(400), nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.Column("held", sa.Boolean(), nullable=False),
        sa.Column("confirmed_at", TIME),
        sa.CheckConstraint("kind IN ('plan', 'subscription')", name=op.f("ck_absences_kind")),
        sa.PrimaryKeyConstraint("kind", "id", name=op.f("pk_absences")),
    )
    op.create_table(
        "feed_positions",
        sa.Column("topic", sa.String(100), nullable=False),
        sa.Column("topic_id", sa.String(64), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("mark", sa.BigInteger(), nullable=False),
        sa.Column("read_from", sa.BigInteger(), nullable=False),
        sa.Column("marked_at", TIME, nullable=False),
        sa.Column("read_at", TIME, nullable=False),
        sa.CheckConstraint(
            "read_from >= 0 AND read_from <= mark AND mark <= position",
            name=op.f("ck_feed_positions_position"),
        ),
        sa.PrimaryKeyConstraint("topic", name=op.f("pk_feed_positions")),
    )
    op.create_table(
        "marks",
        sa.Column("name", sa.String(40), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_marks")),
    )
    op.create_table(
        "history",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_history")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_history_subject", "history", ["subject", "id"])
    op.create_table(
        "reconciliations",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.Column("until", TIME, nullable=False),
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
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("stepped_at", TIME, nullable=False),
        sa.Column("finished_at", TIME),
        sa.Column("drifting", sa.Boolean()),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint("state IN ('running', 'done', 'failed')", name=op.f("ck_reconciliations_state")),
        sa.CheckConstraint("until > since", name=op.f("ck_reconciliations_until")),
        sa.CheckConstraint(
            "(state = 'running') = (finished_at IS NULL)", name=op.f("ck_reconciliations_finished_at")
        ),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name=op.f("ck_reconciliations_error")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reconciliations")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "drift",
        sa.Column("id", BIG_ID, autoincrement=True, nullable=False),
        sa.Column("reconciliation_id", BIG_ID, nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("subscription_id", sa.String(64)),
        sa.Column("add_on_code", sa.String(50)),
        sa.Column("window_start", TIME),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("tag", sa.Text()),
        sa.Column("repairable", sa.Boolean(), nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("fix", sa.Text(), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("mended", sa.Text()),
        sa.CheckConstraint("units >= 0", name=op.f("ck_drift_units")),
        sa.CheckConstraint(
            "kind IN ('missing_record', 'double_record', 'foreign_record', 'wrong_amount', 'wrong_period', "
            "'late_beyond_horizon', 'price_differs', 'link_missing', 'link_orphaned')",
            name=op.f("ck_drift_kind"),
        ),
        sa.ForeignKeyConstraint(
            ["reconciliation_id"], ["reconciliations.id"], name=op.f("fk_drift_reconciliation_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_drift")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_drift_reconciliation_id"), "drift", ["reconciliation_id"])
