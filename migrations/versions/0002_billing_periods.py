"""Billing periods, prices of add-ons, more about each intent; usage records may be written off.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "billing_periods",
        sa.Column("subscription_id", sa.String(length=64), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("trial", sa.Boolean(), nullable=False),
        sa.CheckConstraint("ends_at > started_at", name=op.f("ck_billing_periods_ends_at")),
        sa.ForeignKeyConstraint(
            ["subscription_id"],
            ["subscription_links.subscription_id"],
            name=op.f("fk_billing_periods_subscription_id"),
        ),
        sa.PrimaryKeyConstraint("subscription_id", "started_at", name=op.f("pk_billing_periods")),
    )
    op.execute(
        "INSERT INTO billing_periods (subscription_id, started_at, ends_at, trial) "
        "SELECT subscription_id, period_started_at, period_ends_at, false FROM subscription_links "
        "WHERE period_ends_at > period_started_at"
    )
    with op.batch_alter_table("intents") as intents:
        intents.add_column(sa.Column("sends", sa.Integer(), nullable=False, server_default="1"))
        intents.add_column(sa.Column("gave_up_at", sa.DateTime(timezone=True)))
        intents.add_column(sa.Column("missed_at", sa.DateTime(timezone=True)))
        intents.create_check_constraint(op.f("ck_intents_sends"), "sends >= 1")
    op.add_column("add_on_links", sa.Column("prices", sa.JSON()))
    op.add_column("subscription_links", sa.Column("billed_state", sa.String(length=16)))
    op.add_column("subscription_links", sa.Column("seen_at", sa.DateTime(timezone=True)))
    with op.batch_alter_table("usage_records", table_kwargs={"sqlite_autoincrement": True}) as records:
        records.drop_constraint(op.f("ck_usage_records_state"), type_="check")
        records.create_check_constraint(
            op.f("ck_usage_records_state"), "state IN ('recorded', 'reported', 'held', 'written_off')"
        )
