"""views for queries

Revision: 0005
Revises: 0004
Created: 2026-11-25 09:00:00
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None
# A release that does not know the views works with them.
oldest = "0004"


def name_of(image: str) -> str:
    return f"{image}.repository || CASE WHEN instr({image}.reference, ':') THEN '@' ELSE ':' END || {image}.reference"


# SQLite runs these subqueries row by row with its indexes, and skips the columns that a query does not use.
# A CROSS JOIN keeps the order of its tables. It has no ON, because DuckDB parses the views and does not accept it.
STORED = "b.stored_at IS NOT NULL"
BLOBS_OF_IMAGE = "b.id IN (SELECT o.blob_id FROM image_blobs AS o WHERE o.image_id = i.id)"
IN_ANOTHER = "EXISTS (SELECT 1 FROM image_blobs AS o WHERE o.blob_id = b.id AND o.image_id <> i.id)"
BLOBS_OF_REPOSITORY = (
    "b.id IN (SELECT o.blob_id FROM images AS i JOIN image_blobs AS o ON o.image_id = i.id "
    "WHERE i.repository = r.repository)"
)
IN_ANOTHER_REPOSITORY = (
    "EXISTS (SELECT 1 FROM image_blobs AS o JOIN images AS j ON j.id = o.image_id "
    "WHERE o.blob_id = b.id AND j.repository <> r.repository)"
)
HELD = "EXISTS (SELECT 1 FROM leases AS l WHERE l.digest = b.digest)"
MISSING = (
    "EXISTS (SELECT 1 FROM image_blobs AS o JOIN blobs AS b ON b.id = o.blob_id "
    f"WHERE o.image_id = i.id AND NOT {STORED})"
)
IMAGES_OF_BLOB = "(SELECT count(DISTINCT o.image_id) FROM image_blobs AS o WHERE o.blob_id = b.id)"
COMMAND = "(SELECT min(o.created_by) FROM image_blobs AS o WHERE o.blob_id = b.id AND o.role = 'layer')"
# This is not EXISTS, because SQLite >= 3.51 would turn it into a join and compute the other columns for each match.
IS_LAYER = "(SELECT 1 FROM image_blobs AS o WHERE o.blob_id = b.id AND o.role = 'layer' LIMIT 1) IS NOT NULL"
# The planner does not know that a name identifies one image, and would read the contents of all images.
A_FEW = "likelihood(i.repository <> '', 0.0001)"
IS_SHARED = "(SELECT min(o.image_id) <> max(o.image_id) FROM image_blobs AS o WHERE o.blob_id = b.id)"


def size_of(condition: str) -> str:
    return f"(SELECT coalesce(sum(b.size), 0) FROM blobs AS b WHERE {condition})"


def usage(own: str, others: str) -> str:
    """Return SQL for the sizes of the blobs that match ``own``; blobs that match ``others`` are shared."""
    return f"""{size_of(own)} AS size,
    {size_of(f"{own} AND NOT {STORED}")} AS missing_size,
    {size_of(f"{own} AND {STORED} AND NOT {others}")} AS unique_size,
    {size_of(f"{own} AND {STORED} AND {others}")} AS shared_size,
    {size_of(f"{own} AND {STORED} AND NOT {others} AND NOT {HELD}")} AS freed_size"""


VIEWS = {
    "image_usage": f"""
-- images: what they take, share, lack, and what removing one would free
SELECT
    {name_of("i")} AS name,
    i.repository,
    i.reference,
    m.digest,
    i.media_type,
    i.os,
    i.architecture,
    i.variant,
    i.author,
    i.created,
    i.created_at,
    i.last_used_at,
    NOT {MISSING} AS complete,
    (SELECT count(DISTINCT o.blob_id) FROM image_blobs AS o WHERE o.image_id = i.id) AS blobs,
    {usage(BLOBS_OF_IMAGE, IN_ANOTHER)}
FROM images AS i JOIN blobs AS m ON m.id = i.manifest_id""",
    "image_contents": f"""
-- what images are made of, a row for each position
SELECT
    {name_of("i")} AS name,
    o.position,
    o.role,
    b.digest,
    b.size,
    {STORED} AS stored,
    o.media_type,
    o.diff_id,
    o.created_by
FROM images AS i JOIN image_blobs AS o ON o.image_id = i.id JOIN blobs AS b ON b.id = o.blob_id
WHERE {A_FEW}""",
    "labels": f"""
-- labels of images
SELECT {name_of("i")} AS name, l.key, l.value
FROM images AS i JOIN image_labels AS l ON l.image_id = i.id
WHERE {A_FEW}""",
    "image_ages": f"""
-- how long ago images were built, added and used
SELECT
    {name_of("i")} AS name,
    i.created,
    i.created_at,
    i.last_used_at,
    julianday('now') - julianday(i.created) AS built_days,
    julianday('now') - julianday(i.created_at) AS added_days,
    julianday('now') - julianday(i.last_used_at) AS unused_days
FROM images AS i""",
    "image_bases": f"""
-- the image that an image is built on: that with the most layers, all of them the first of its own; the oldest such
WITH stacks AS MATERIALIZED (
    SELECT image_id, min(position) AS first, count(position) AS layers, max(position) AS last
    FROM image_blobs WHERE role = 'layer' GROUP BY image_id HAVING max(position) - min(position) = count(position) - 1
), tops AS MATERIALIZED (
    SELECT s.image_id, s.first, s.layers, o.blob_id
    FROM stacks AS s JOIN image_blobs AS o ON o.image_id = s.image_id AND o.position = s.last
    WHERE EXISTS (SELECT 1 FROM image_blobs AS p WHERE p.blob_id = o.blob_id AND p.image_id <> o.image_id)
), found AS (
    -- SQLite takes the other columns from the row with the maximum: most layers, then the smallest id.
    SELECT s.image_id, s.layers, t.image_id AS base_id, t.layers AS base_layers, max((t.layers << 32) - t.image_id)
    FROM tops AS t
    CROSS JOIN image_blobs AS o
    CROSS JOIN stacks AS s
    WHERE o.blob_id = t.blob_id AND o.image_id <> t.image_id
        AND s.image_id = o.image_id AND s.layers > t.layers AND o.position = s.first + t.layers - 1
        AND NOT EXISTS (
            SELECT 1
            FROM image_blobs AS x
            JOIN image_blobs AS y ON y.image_id = s.image_id AND y.position = x.position - t.first + s.first
            WHERE x.image_id = t.image_id AND x.position BETWEEN t.first AND t.first + t.layers - 2
                AND x.blob_id <> y.blob_id
        )
    GROUP BY s.image_id
)
SELECT
    {name_of("i")} AS name,
    f.layers,
    {name_of("j")} AS base,
    m.digest AS base_digest,
    f.base_layers
FROM found AS f
JOIN images AS i ON i.id = f.image_id
JOIN images AS j ON j.id = f.base_id
JOIN blobs AS m ON m.id = j.manifest_id""",
    "blob_usage": f"""
-- blobs: how many images use them, and whether something else holds them
SELECT
    b.digest,
    b.size,
    {STORED} AS stored,
    b.stored_at,
    {IMAGES_OF_BLOB} AS images,
    {HELD} AS held
FROM blobs AS b""",
    "layers": f"""
-- layers, and the command that made each
SELECT
    b.digest,
    b.size,
    {STORED} AS stored,
    {IMAGES_OF_BLOB} AS images,
    {COMMAND} AS created_by
FROM blobs AS b
WHERE {IS_LAYER}""",
    "shared_layers": f"""
-- layers that several images have, and the bytes saved by it
SELECT
    b.digest,
    b.size,
    {IMAGES_OF_BLOB} AS images,
    b.size * ({IMAGES_OF_BLOB} - 1) AS saved_size,
    {COMMAND} AS created_by
FROM blobs AS b
WHERE {STORED} AND {IS_SHARED} AND {IS_LAYER}""",
    "common_layers": f"""
-- layers that two images have in common
SELECT DISTINCT {name_of("i")} AS name, {name_of("j")} AS other, b.digest, b.size, {STORED} AS stored
FROM images AS i
CROSS JOIN image_blobs AS o
CROSS JOIN image_blobs AS p
CROSS JOIN images AS j
CROSS JOIN blobs AS b
WHERE o.image_id = i.id AND o.role = 'layer'
    AND p.blob_id = o.blob_id AND p.image_id <> i.id AND p.role = 'layer'
    AND j.id = p.image_id AND b.id = o.blob_id""",
    "repository_usage": f"""
-- repositories: what their images take together, share with others, lack, and what removing them would free
SELECT
    r.repository,
    r.images,
    (SELECT count(*) FROM blobs AS b WHERE {BLOBS_OF_REPOSITORY}) AS blobs,
    {usage(BLOBS_OF_REPOSITORY, IN_ANOTHER_REPOSITORY)}
FROM (SELECT repository, count(*) AS images FROM images GROUP BY repository) AS r""",
    "missing_blobs": f"""
-- what incomplete images lack
SELECT {name_of("i")} AS name, o.position, o.role, b.digest, b.size
FROM blobs AS b
CROSS JOIN image_blobs AS o
CROSS JOIN images AS i
WHERE NOT {STORED} AND o.blob_id = b.id AND i.id = o.image_id""",
    "garbage": f"""
-- what `cachedb gc` would free
SELECT b.digest, b.size, b.stored_at
FROM blobs AS b
WHERE {STORED}
    AND NOT EXISTS (SELECT 1 FROM image_blobs AS o WHERE o.blob_id = b.id)
    AND NOT {HELD}""",
    "growth": """
-- what came on each day, and is still here
SELECT day, sum(images) AS images, sum(blobs) AS blobs, sum(size) AS size
FROM (
    SELECT substr(stored_at, 1, 10) AS day, 0 AS images, count(*) AS blobs, sum(size) AS size
    FROM blobs WHERE stored_at IS NOT NULL GROUP BY 1
    UNION ALL
    SELECT substr(created_at, 1, 10), count(*), 0, 0 FROM images GROUP BY 1
)
GROUP BY day""",
}


def upgrade() -> None:
    for name, query in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS{query}")


def downgrade() -> None:
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
