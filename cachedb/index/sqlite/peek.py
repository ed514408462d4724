"""Statements for a look into the index without SQLAlchemy."""

from __future__ import annotations

__all__ = ["CONTENTS", "REPOSITORIES"]


CONTENTS = """
SELECT root.digest, root.size, images.media_type, blobs.digest, blobs.stored_at IS NOT NULL
FROM images JOIN blobs AS root ON root.id = images.manifest_id
JOIN image_blobs ON image_blobs.image_id = images.id JOIN blobs ON blobs.id = image_blobs.blob_id
WHERE images.repository = ? AND images.reference = ? AND ? = (SELECT version_num FROM alembic_version)
"""
REPOSITORIES = """
SELECT DISTINCT images.repository FROM blobs
JOIN image_blobs ON image_blobs.blob_id = blobs.id JOIN images ON images.id = image_blobs.image_id
WHERE blobs.digest = ?
"""
