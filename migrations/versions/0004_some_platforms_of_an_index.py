"""some platforms of an index

Revision: 0004
Revises: 0003
Created: 2026-11-25 06:30:00
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None
# Releases before this one would take an image with some platforms for an incomplete image with all platforms.
oldest = "0004"


def upgrade() -> None:
    # SQLite adds a nullable column without copying the table.
    check = sa.CheckConstraint("some_platforms = 1", name=op.f("ck_images_some_platforms"))
    op.add_column("images", sa.Column("some_platforms", sa.Integer(), check, nullable=True))


def downgrade() -> None:
    # An older release expects that the image is associated with all platforms, and its `verify` reports that it is not.
    op.drop_column("images", "some_platforms")
