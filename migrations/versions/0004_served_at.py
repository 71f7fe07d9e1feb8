"""When Amplify last showed a subscription as served.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("subscription_links", sa.Column("served_at", sa.DateTime(timezone=True)))
    # what goes on was served when everything was listed the last time; there may have been no listing yet
    op.execute(
        "UPDATE subscription_links SET served_at = (SELECT at FROM marks WHERE name = 'resynced') "
        "WHERE state IN ('created', 'active')"
    )
