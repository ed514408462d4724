"""holds that outlive a process

Revision: 0002
Revises: 0001
Created: 2026-11-23 23:10:00
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def is_time(column: str) -> str:
    return f"{column} LIKE '____-__-__T__:__:__.______Z' AND ltrim({column}, '0123456789-T:.Z') = ''"


def upgrade() -> None:
    op.create_table(
        "holds",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Text(), nullable=True),
        sa.CheckConstraint(is_time("created_at"), name=op.f("ck_holds_created_at")),
        sa.CheckConstraint(f"expires_at IS NULL OR ({is_time('expires_at')})", name=op.f("ck_holds_expires_at")),
        sa.CheckConstraint("id LIKE 'hold-____________'", name=op.f("ck_holds_id")),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 400", name=op.f("ck_holds_name")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_holds")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    # An older release would take the leases of a hold for those of a dead session, and delete them.
    op.execute("DELETE FROM leases WHERE session IN (SELECT id FROM holds)")
    op.drop_table("holds")
