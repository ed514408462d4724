"""images, blobs and their association

Revision: 0001
Revises:
Created: 2026-11-23 20:05:13.890352
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

Integer = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
IS_DIGEST = (
    "(substr(digest, 1, 7) = 'sha256:' AND length(digest) = 71"
    " AND ltrim(substr(digest, 8), '0123456789abcdef') = '')"
    " OR (substr(digest, 1, 7) = 'sha512:' AND length(digest) = 135"
    " AND ltrim(substr(digest, 8), '0123456789abcdef') = '')"
)


def is_time(column: str) -> str:
    return f"{column} LIKE '____-__-__T__:__:__.______Z' AND ltrim({column}, '0123456789-T:.Z') = ''"


def upgrade() -> None:
    op.create_table(
        "blobs",
        sa.Column("id", Integer, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("size", Integer, nullable=False),
        sa.Column("stored_at", sa.Text(), nullable=True),
        sa.CheckConstraint(IS_DIGEST, name=op.f("ck_blobs_digest")),
        sa.CheckConstraint(f"stored_at IS NULL OR ({is_time('stored_at')})", name=op.f("ck_blobs_stored_at")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_blobs_size")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_blobs")),
        sa.UniqueConstraint("digest", name=op.f("uq_blobs_digest")),
        sqlite_strict=True,
    )
    op.create_table(
        "leases",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("session", sa.Text(), nullable=False),
        sa.Column("hold", Integer, nullable=False),
        sa.CheckConstraint(IS_DIGEST, name=op.f("ck_leases_digest")),
        sa.PrimaryKeyConstraint("digest", "session", "hold", name=op.f("pk_leases")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_leases_session_hold"), "leases", ["session", "hold"])

    op.create_table(
        "trash",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("size", Integer, nullable=False),
        sa.CheckConstraint(IS_DIGEST, name=op.f("ck_trash_digest")),
        sa.CheckConstraint("size >= 0", name=op.f("ck_trash_size")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_trash")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "images",
        sa.Column("id", Integer, nullable=False),
        sa.Column("repository", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("manifest_id", Integer, nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("last_used_at", sa.Text(), nullable=False),
        sa.CheckConstraint(is_time("created_at"), name=op.f("ck_images_created_at")),
        sa.CheckConstraint(is_time("last_used_at"), name=op.f("ck_images_last_used_at")),
        sa.CheckConstraint("media_type LIKE '_%/_%'", name=op.f("ck_images_media_type")),
        sa.CheckConstraint("length(reference) BETWEEN 1 AND 135", name=op.f("ck_images_reference")),
        sa.CheckConstraint("length(repository) BETWEEN 1 AND 255", name=op.f("ck_images_repository")),
        sa.ForeignKeyConstraint(["manifest_id"], ["blobs.id"], name=op.f("fk_images_manifest_id"), ondelete="RESTRICT"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_images")),
        sa.UniqueConstraint("repository", "reference", name=op.f("uq_images_repository_reference")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_images_manifest_id"), "images", ["manifest_id"])

    op.create_table(
        "image_blobs",
        sa.Column("image_id", Integer, nullable=False),
        sa.Column("position", Integer, nullable=False),
        sa.Column("blob_id", Integer, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.CheckConstraint("media_type LIKE '_%/_%'", name=op.f("ck_image_blobs_media_type")),
        sa.CheckConstraint(
            "role IN ('manifest', 'index', 'config', 'layer', 'other')", name=op.f("ck_image_blobs_role")
        ),
        sa.CheckConstraint("position >= 0", name=op.f("ck_image_blobs_position")),
        sa.ForeignKeyConstraint(["blob_id"], ["blobs.id"], name=op.f("fk_image_blobs_blob_id"), ondelete="RESTRICT"),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name=op.f("fk_image_blobs_image_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("image_id", "position", name=op.f("pk_image_blobs")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_image_blobs_blob_id"), "image_blobs", ["blob_id"])


def downgrade() -> None:
    op.drop_table("image_blobs")
    op.drop_table("images")
    op.drop_table("trash")
    op.drop_table("leases")
    op.drop_table("blobs")
