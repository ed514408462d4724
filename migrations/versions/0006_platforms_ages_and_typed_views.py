"""platforms of images, plainer names, and views with types

`images.created_at` becomes `added_at`. The table `holds` becomes `lasting_holds`, and a view takes its name. A backfill
reads the configs and indexes of existing images again, for their platforms.

Revision: 0006
Revises: 0005
Created: 2026-11-29 17:30:00
"""

import sqlalchemy as sa
from alembic import context, op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None
# Releases before this one do not know the new names, and save images without their platforms.
oldest = "0006"

Integer = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def is_time(column: str) -> str:
    return f"{column} LIKE '____-__-__T__:__:__.______Z' AND ltrim({column}, '0123456789-T:.Z') = ''"


# Views
#
# A view starts with a comment that describes it, and each of its columns has a line with a comment. The documentation
# and `cachedb sql --schema` print these comments. CAST gives an expression a type for programs that ask for it.


def name_of(image: str) -> str:
    separator = f"CASE WHEN instr({image}.reference, ':') THEN '@' ELSE ':' END"
    return f"CAST({image}.repository || {separator} || {image}.reference AS TEXT)"


def number(expression: str) -> str:
    # SQLite takes BIGINT for INTEGER. In DuckDB, which runs the views itself, INTEGER has only 32 bits.
    return f"CAST({expression} AS BIGINT)"


def days_since(time: str) -> str:
    return f"CAST(julianday('now') - julianday({time}) AS REAL)"


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
BLOBS_OF_PLATFORM = (
    "b.id IN (SELECT o.blob_id FROM image_blobs AS o WHERE o.image_id = p.image_id "
    "AND o.position BETWEEN p.position AND p.last_position)"
)
IMAGES_OF_BLOB = "(SELECT count(DISTINCT o.image_id) FROM image_blobs AS o WHERE o.blob_id = b.id)"
COMMAND = "CAST((SELECT min(o.created_by) FROM image_blobs AS o WHERE o.blob_id = b.id AND o.role = 'layer') AS TEXT)"
# This is not EXISTS, because SQLite >= 3.51 would turn it into a join and compute the other columns for each match.
IS_LAYER = "(SELECT 1 FROM image_blobs AS o WHERE o.blob_id = b.id AND o.role = 'layer' LIMIT 1) IS NOT NULL"
# The planner does not know that a name identifies one image, and would read the contents of all images.
A_FEW = "likelihood(i.repository <> '', 0.0001)"
IS_SHARED = "(SELECT min(o.image_id) <> max(o.image_id) FROM image_blobs AS o WHERE o.blob_id = b.id)"
LAST_USE = "time of its last use (saved, pulled, exported, pushed, held, asked for), true to five minutes"


def size_of(condition: str) -> str:
    return number(f"(SELECT coalesce(sum(b.size), 0) FROM blobs AS b WHERE {condition})")


def view(
    description: str, columns: list[tuple[str, str, str]], source: str, *, before: str = "", distinct: bool = False
) -> str:
    """Return the SQL of a view.

    Args:
        description: of the view.
        columns: name, expression and description of each column.
        source: the SQL after the columns.
        before: the SQL before SELECT.
        distinct: leave out equal rows.
    """
    lines = []
    for number, (name, expression, comment) in enumerate(columns, 1):
        comma = "," if number < len(columns) else ""
        lines.append(f"    {expression} AS {name}{comma} -- {comment}")
    select = "SELECT DISTINCT" if distinct else "SELECT"
    return "\n".join([f"\n-- {description}", f"{before}{select}", *lines, source])


VIEWS = {
    "image_usage": view(
        "images: what they take, share, lack, and what removing one would free",
        [
            ("name", name_of("i"), "name of the image, as `cachedb ls` prints it"),
            ("repository", "i.repository", "part of the name before the tag or digest"),
            ("reference", "i.reference", "tag or digest of the name"),
            ("digest", "m.digest", "digest of the manifest or index; several names of one image have the same digest"),
            ("media_type", "i.media_type", "media type of the manifest or index"),
            (
                "os",
                "i.os",
                "old: the operating system, NULL if the platforms of the image differ; see the view `platforms`",
            ),
            (
                "architecture",
                "i.architecture",
                "old: the architecture, NULL if the platforms of the image differ; see the view `platforms`",
            ),
            (
                "variant",
                "i.variant",
                "old: the variant, NULL if the platforms of the image differ; see the view `platforms`",
            ),
            ("author", "i.author", "author that the config names"),
            ("created", "i.created", "time at which the image was built"),
            ("created_at", "i.added_at", "old: `added_at`"),
            ("last_used_at", "i.last_used_at", LAST_USE),
            ("complete", number(f"NOT {MISSING}"), "whether all its blobs are stored; left-out platforms do not count"),
            (
                "blobs",
                number("(SELECT count(DISTINCT o.blob_id) FROM image_blobs AS o WHERE o.image_id = i.id)"),
                "number of its blobs; here and in the sizes, a blob that occurs twice counts once",
            ),
            (
                "size",
                size_of(BLOBS_OF_IMAGE),
                "bytes of its blobs, missing blobs included; a sum over images counts shared blobs several times",
            ),
            ("missing_size", size_of(f"{BLOBS_OF_IMAGE} AND NOT {STORED}"), "bytes of its blobs that are not stored"),
            (
                "unique_size",
                size_of(f"{BLOBS_OF_IMAGE} AND {STORED} AND NOT {IN_ANOTHER}"),
                "bytes of its stored blobs that no other image has; a second name is another image",
            ),
            (
                "shared_size",
                size_of(f"{BLOBS_OF_IMAGE} AND {STORED} AND {IN_ANOTHER}"),
                "bytes of its stored blobs that other images have too",
            ),
            (
                "freed_size",
                size_of(f"{BLOBS_OF_IMAGE} AND {STORED} AND NOT {IN_ANOTHER} AND NOT {HELD}"),
                "bytes that `cachedb rm` of only this image frees: `unique_size` without held blobs",
            ),
            ("added_at", "i.added_at", "time at which its name came to point to this manifest"),
            ("built_days", days_since("i.created"), "days since `created`"),
            ("added_days", days_since("i.added_at"), "days since `added_at`"),
            ("unused_days", days_since("i.last_used_at"), "days since `last_used_at`"),
        ],
        """FROM images AS i JOIN blobs AS m ON m.id = i.manifest_id""",
    ),
    "platforms": view(
        "platforms of images, a row for each platform that the cache has",
        [
            ("name", name_of("i"), "name of the image"),
            ("os", "p.os", "`linux`, `windows`, ..."),
            ("architecture", "p.architecture", "`amd64`, `arm64`, ..."),
            ("variant", "p.variant", "variant of the architecture, such as `v7`; NULL for most"),
            ("digest", "m.digest", "digest of the platform's manifest"),
            (
                "size",
                size_of(BLOBS_OF_PLATFORM),
                "bytes of its manifest, config and layers, missing ones included; each blob counts once",
            ),
            (
                "complete",
                number(f"NOT EXISTS (SELECT 1 FROM blobs AS b WHERE {BLOBS_OF_PLATFORM} AND NOT {STORED})"),
                "whether all these blobs are stored",
            ),
        ],
        f"""FROM images AS i
JOIN image_platforms AS p ON p.image_id = i.id
JOIN image_blobs AS c ON c.image_id = p.image_id AND c.position = p.position
JOIN blobs AS m ON m.id = c.blob_id
WHERE {A_FEW}""",
    ),
    "image_contents": view(
        "what images are made of, a row for each position",
        [
            ("name", name_of("i"), "name of the image"),
            (
                "position",
                "o.position",
                "0 is the manifest or index; a manifest comes before its config, and the config before the layers",
            ),
            ("role", "o.role", "`manifest`, `index`, `config`, `layer` or `other`"),
            ("digest", "b.digest", "digest of the blob"),
            ("size", "b.size", "bytes of the blob"),
            ("stored", number(STORED), "whether its bytes are on disk"),
            ("media_type", "o.media_type", "media type that the image gives it"),
            ("diff_id", "o.diff_id", "for a layer: its digest before compression"),
            ("created_by", "o.created_by", "for a layer: the command that created it"),
        ],
        f"""FROM images AS i JOIN image_blobs AS o ON o.image_id = i.id JOIN blobs AS b ON b.id = o.blob_id
WHERE {A_FEW}""",
    ),
    "labels": view(
        "labels of images",
        [
            ("name", name_of("i"), "name of the image"),
            ("key", "l.key", "key of the label"),
            ("value", "l.value", "value of the label"),
        ],
        f"""FROM images AS i JOIN image_labels AS l ON l.image_id = i.id
WHERE {A_FEW}""",
    ),
    "image_ages": view(
        "old: the ages of images, which `image_usage` has too",
        [
            ("name", name_of("i"), "name of the image"),
            ("created", "i.created", "time at which the image was built"),
            ("created_at", "i.added_at", "old: the `added_at` of `image_usage`"),
            ("last_used_at", "i.last_used_at", LAST_USE),
            ("built_days", days_since("i.created"), "days since `created`"),
            ("added_days", days_since("i.added_at"), "days since its name came to point to this manifest"),
            ("unused_days", days_since("i.last_used_at"), "days since `last_used_at`"),
        ],
        """FROM images AS i""",
    ),
    "image_bases": view(
        "the image that an image is built on: the one with the most layers, if they are the first layers of the image",
        [
            ("name", name_of("i"), "name of the image"),
            ("layers", number("f.layers"), "number of its layers"),
            (
                "base",
                name_of("j"),
                "name of its base; if several images have these layers, the one that was added first",
            ),
            ("base_digest", "m.digest", "digest of the base's manifest or index"),
            ("base_layers", number("(f.nearest >> 32) + 1"), "number of the base's layers"),
        ],
        """FROM found AS f
JOIN images AS i ON i.id = f.image_id
JOIN images AS j ON j.id = (((f.nearest >> 32) + 1) << 32) - f.nearest
JOIN blobs AS m ON m.id = j.manifest_id""",
        before="""WITH stacks AS MATERIALIZED (
    SELECT image_id, min(position) AS first, count(position) AS layers, max(position) AS last
    FROM image_blobs WHERE role = 'layer' GROUP BY image_id HAVING max(position) - min(position) = count(position) - 1
), tops AS MATERIALIZED (
    SELECT s.image_id, s.first, s.layers, o.blob_id
    FROM stacks AS s JOIN image_blobs AS o ON o.image_id = s.image_id AND o.position = s.last
    WHERE EXISTS (SELECT 1 FROM image_blobs AS p WHERE p.blob_id = o.blob_id AND p.image_id <> o.image_id)
), found AS (
    -- The nearest base has the most layers, then the smallest id. One number has both, so one maximum finds it.
    SELECT s.image_id, max(s.layers) AS layers, max((t.layers << 32) - t.image_id) AS nearest
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
""",
    ),
    "blob_usage": view(
        "blobs: how many images use them, and whether something else holds them",
        [
            ("digest", "b.digest", "digest of the blob"),
            ("size", "b.size", "bytes; for a missing blob, as a manifest declares"),
            ("stored", number(STORED), "whether its bytes are on disk"),
            ("stored_at", "b.stored_at", "time at which it was stored"),
            ("images", number(IMAGES_OF_BLOB), "number of images that have it"),
            ("held", number(HELD), "whether a process works with it or a hold keeps it"),
        ],
        """FROM blobs AS b""",
    ),
    "layers": view(
        "layers, and the command that made each",
        [
            ("digest", "b.digest", "digest of the layer"),
            ("size", "b.size", "bytes"),
            ("stored", number(STORED), "whether its bytes are on disk"),
            ("images", number(IMAGES_OF_BLOB), "number of images that have it"),
            (
                "created_by",
                COMMAND,
                "the command that created it; if images name different commands, the first in alphabetical order",
            ),
        ],
        f"""FROM blobs AS b
WHERE {IS_LAYER}""",
    ),
    "shared_layers": view(
        "layers that several images have, and the bytes saved by it",
        [
            ("digest", "b.digest", "digest of the layer"),
            ("size", "b.size", "bytes"),
            ("images", number(IMAGES_OF_BLOB), "number of images that have it, at least 2"),
            (
                "saved_size",
                number(f"b.size * ({IMAGES_OF_BLOB} - 1)"),
                "bytes that sharing saves: `size` for each image but one",
            ),
            ("created_by", COMMAND, "the command that created it"),
        ],
        f"""FROM blobs AS b
WHERE {STORED} AND {IS_SHARED} AND {IS_LAYER}""",
    ),
    "common_layers": view(
        "layers that two images have in common",
        [
            ("name", name_of("i"), "name of one image"),
            ("other", name_of("j"), "name of the other image"),
            ("digest", "b.digest", "digest of the layer"),
            ("size", "b.size", "bytes"),
            ("stored", number(STORED), "whether its bytes are on disk"),
        ],
        """FROM images AS i
CROSS JOIN image_blobs AS o
CROSS JOIN image_blobs AS p
CROSS JOIN images AS j
CROSS JOIN blobs AS b
WHERE o.image_id = i.id AND o.role = 'layer'
    AND p.blob_id = o.blob_id AND p.image_id <> i.id AND p.role = 'layer'
    AND j.id = p.image_id AND b.id = o.blob_id""",
        distinct=True,
    ),
    "repository_usage": view(
        "repositories: what their images take together, share with others, lack, and what removing them would free",
        [
            ("repository", "r.repository", "name of the repository"),
            ("images", number("r.images"), "number of its images"),
            (
                "blobs",
                number(f"(SELECT count(*) FROM blobs AS b WHERE {BLOBS_OF_REPOSITORY})"),
                "number of their blobs; here and in the sizes, each blob counts once",
            ),
            ("size", size_of(BLOBS_OF_REPOSITORY), "bytes of the blobs, missing blobs included"),
            (
                "missing_size",
                size_of(f"{BLOBS_OF_REPOSITORY} AND NOT {STORED}"),
                "bytes of the blobs that are not stored",
            ),
            (
                "unique_size",
                size_of(f"{BLOBS_OF_REPOSITORY} AND {STORED} AND NOT {IN_ANOTHER_REPOSITORY}"),
                "bytes of the stored blobs that no image of another repository has",
            ),
            (
                "shared_size",
                size_of(f"{BLOBS_OF_REPOSITORY} AND {STORED} AND {IN_ANOTHER_REPOSITORY}"),
                "bytes of the stored blobs that images of other repositories have too",
            ),
            (
                "freed_size",
                size_of(f"{BLOBS_OF_REPOSITORY} AND {STORED} AND NOT {IN_ANOTHER_REPOSITORY} AND NOT {HELD}"),
                "bytes that `cachedb rm` of all its images frees: `unique_size` without held blobs",
            ),
        ],
        """FROM (SELECT repository, count(*) AS images FROM images GROUP BY repository) AS r""",
    ),
    "missing_blobs": view(
        "what incomplete images lack",
        [
            ("name", name_of("i"), "name of the image"),
            ("position", "o.position", "position in the image, as in `image_contents`"),
            ("role", "o.role", "`manifest`, `index`, `config`, `layer` or `other`"),
            ("digest", "b.digest", "digest of the missing blob"),
            ("size", "b.size", "bytes, as the manifest declares"),
        ],
        f"""FROM blobs AS b
CROSS JOIN image_blobs AS o
CROSS JOIN images AS i
WHERE NOT {STORED} AND o.blob_id = b.id AND i.id = o.image_id""",
    ),
    "garbage": view(
        "what `cachedb gc` would free",
        [
            ("digest", "b.digest", "digest of the blob"),
            ("size", "b.size", "bytes"),
            ("stored_at", "b.stored_at", "time at which it was stored"),
        ],
        f"""FROM blobs AS b
WHERE {STORED}
    AND NOT EXISTS (SELECT 1 FROM image_blobs AS o WHERE o.blob_id = b.id)
    AND NOT {HELD}""",
    ),
    "holds": view(
        "holds that have not expired; they keep blobs until they expire or are released",
        [
            ("id", "h.id", "id of the hold"),
            ("name", "h.name", "the held image or digest"),
            ("blobs", number("(SELECT count(*) FROM leases AS l WHERE l.session = h.id)"), "number of the held blobs"),
            (
                "size",
                size_of("b.digest IN (SELECT l.digest FROM leases AS l WHERE l.session = h.id)"),
                "bytes of the held blobs",
            ),
            ("created_at", "h.created_at", "time at which the hold was made"),
            ("expires_at", "h.expires_at", "time at which it ends; NULL if it lasts until released"),
        ],
        """FROM lasting_holds AS h
WHERE h.expires_at IS NULL OR julianday(h.expires_at) > julianday('now')""",
    ),
    "growth": view(
        "what came on each day, and is still here",
        [
            ("day", "CAST(day AS TEXT)", "day in UTC, `2026-01-31`"),
            ("images", number("sum(images)"), "number of images whose name began to point to its manifest on that day"),
            ("blobs", number("sum(blobs)"), "number of blobs that were stored on that day"),
            ("size", number("sum(size)"), "bytes of these blobs"),
        ],
        """FROM (
    SELECT substr(stored_at, 1, 10) AS day, 0 AS images, count(*) AS blobs, sum(size) AS size
    FROM blobs WHERE stored_at IS NOT NULL GROUP BY 1
    UNION ALL
    SELECT substr(added_at, 1, 10), count(*), 0, 0 FROM images GROUP BY 1
)
GROUP BY 1""",
    ),
}


# Steps


def old_views() -> dict[str, str]:
    """Return the views of the revision before."""
    found = context.script.get_revision(down_revision)
    assert found is not None
    views: dict[str, str] = found.module.VIEWS
    return views


def create_holds(table: str) -> None:
    op.create_table(
        table,
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Text(), nullable=True),
        sa.CheckConstraint(is_time("created_at"), name=op.f(f"ck_{table}_created_at")),
        sa.CheckConstraint(f"expires_at IS NULL OR ({is_time('expires_at')})", name=op.f(f"ck_{table}_expires_at")),
        sa.CheckConstraint("id LIKE 'hold-____________'", name=op.f(f"ck_{table}_id")),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 400", name=op.f(f"ck_{table}_name")),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def upgrade() -> None:
    for name in old_views():
        op.execute(f"DROP VIEW {name}")
    op.execute("ALTER TABLE images RENAME COLUMN created_at TO added_at")
    create_holds("lasting_holds")
    op.execute("INSERT INTO lasting_holds SELECT id, name, created_at, expires_at FROM holds")
    op.drop_table("holds")
    op.create_table(
        "image_platforms",
        sa.Column("image_id", Integer, nullable=False),
        sa.Column("position", Integer, nullable=False),
        sa.Column("last_position", Integer, nullable=False),
        sa.Column("os", sa.Text(), nullable=True),
        sa.Column("architecture", sa.Text(), nullable=True),
        sa.Column("variant", sa.Text(), nullable=True),
        sa.CheckConstraint("last_position > position", name=op.f("ck_image_platforms_last_position")),
        sa.CheckConstraint("length(os) BETWEEN 1 AND 64", name=op.f("ck_image_platforms_os")),
        sa.CheckConstraint("length(architecture) BETWEEN 1 AND 64", name=op.f("ck_image_platforms_architecture")),
        sa.CheckConstraint("length(variant) BETWEEN 1 AND 64", name=op.f("ck_image_platforms_variant")),
        sa.CheckConstraint("os IS NOT NULL OR architecture IS NOT NULL", name=op.f("ck_image_platforms_known")),
        sa.ForeignKeyConstraint(
            ["image_id"], ["images.id"], name=op.f("fk_image_platforms_image_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("image_id", "position", name=op.f("pk_image_platforms")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    # The backfill of this revision does all that the backfill of 0003 did.
    op.execute("DELETE FROM backfills WHERE revision = '0003'")
    op.execute("INSERT INTO backfills SELECT '0006', 0 WHERE EXISTS (SELECT 1 FROM images)")
    for name, query in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS{query}")


def downgrade() -> None:
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
    op.execute("UPDATE backfills SET revision = '0003' WHERE revision = '0006'")
    op.drop_table("image_platforms")
    create_holds("holds")
    op.execute("INSERT INTO holds SELECT id, name, created_at, expires_at FROM lasting_holds")
    op.drop_table("lasting_holds")
    op.execute("ALTER TABLE images RENAME COLUMN added_at TO created_at")
    for name, query in old_views().items():
        op.execute(f"CREATE VIEW {name} AS{query}")
