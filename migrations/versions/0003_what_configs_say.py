"""values from the configs of images and layers

A backfill reads the configs of existing images afterwards, in batches. `backfills` records its progress.

Revision: 0003
Revises: 0002
Created: 2026-11-24 07:20:00
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None
# Releases before this one work only with their own schema.
oldest = "0003"

Integer = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
IS_DIGEST = (
    "(substr(diff_id, 1, 7) = 'sha256:' AND length(diff_id) = 71"
    " AND ltrim(substr(diff_id, 8), '0123456789abcdef') = '')"
    " OR (substr(diff_id, 1, 7) = 'sha512:' AND length(diff_id) = 135"
    " AND ltrim(substr(diff_id, 8), '0123456789abcdef') = '')"
)
IS_TIME = "created LIKE '____-__-__T__:__:__.______Z' AND ltrim(created, '0123456789-T:.Z') = ''"
IMAGE = {
    "architecture": "length(architecture) BETWEEN 1 AND 64",
    "os": "length(os) BETWEEN 1 AND 64",
    "variant": "length(variant) BETWEEN 1 AND 64",
    "created": IS_TIME,
    "author": "length(author) BETWEEN 1 AND 65536",
}
ASSOCIATION = {"diff_id": IS_DIGEST, "created_by": "length(created_by) BETWEEN 1 AND 65536"}


def upgrade() -> None:
    # SQLite adds a nullable column without copying the table.
    for table, columns in (("images", IMAGE), ("image_blobs", ASSOCIATION)):
        for name, condition in columns.items():
            check = sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{name}"))
            op.add_column(table, sa.Column(name, sa.Text(), check, nullable=True))
    op.create_table(
        "image_labels",
        sa.Column("image_id", Integer, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.CheckConstraint("length(key) <= 65536", name=op.f("ck_image_labels_key")),
        sa.CheckConstraint("length(value) <= 65536", name=op.f("ck_image_labels_value")),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name=op.f("fk_image_labels_image_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("image_id", "key", name=op.f("pk_image_labels")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_image_labels_key"), "image_labels", ["key"])
    op.create_table(
        "backfills",
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("image_id", Integer, nullable=False),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_backfills")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.execute("INSERT INTO backfills SELECT '0003', 0 WHERE EXISTS (SELECT 1 FROM images)")


def downgrade() -> None:
    op.drop_table("backfills")
    op.drop_table("image_labels")
    for table, columns in (("images", IMAGE), ("image_blobs", ASSOCIATION)):
        for name in reversed(columns):
            op.drop_column(table, name)
