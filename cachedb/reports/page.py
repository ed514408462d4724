"""Render a cache as one HTML page: disk usage, sharing, growth, and what can be cleaned up.

The figures come from the views. The page is complete without JavaScript, which only sorts, searches, zooms and copies.
The page loads no font, script or picture. The template escapes untrusted text (names, labels, commands, authors). A
Content-Security-Policy keeps the browser from running any other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, text

from cachedb.reports import charts, cleanup, image_table, usage
from cachedb.reports.charts import LIST_ROWS
from cachedb.reports.image_rows import ImageRow, fetch_image_rows, group_by_age
from cachedb.reports.tiles import find_drawn, make_tiles
from cachedb.reports.words import (
    AGE_DAYS,
    Row,
    clean_text,
    fetch_rows,
    format_age_group,
    format_count,
    shorten_path,
)
from cachedb.text import format_size, shorten_digest

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["render"]


def render(connection: Connection, directory: Path) -> str:
    """Return the HTML page of a cache.

    Args:
        connection: a connection in a read transaction, so that all figures are from one moment.
        directory: the cache directory, for the title and for commands.
    """
    now = datetime.now(UTC)
    repositories = fetch_rows(connection, "SELECT * FROM repository_usage ORDER BY size DESC, repository")
    rows = fetch_image_rows(connection, now)
    ages = group_by_age(rows)
    totals = _fetch_totals(connection, repositories, rows)
    outdated, outdated_images = cleanup.count_outdated_bases(connection)
    bases = fetch_rows(connection, "SELECT name, base, base_layers FROM image_bases")
    layers = image_table.fetch_layers(connection)
    images = image_table.fetch_images(connection, rows, layers, bases, outdated_images)
    listed = repositories[: image_table.TABLE_ROWS]
    tiles = make_tiles(connection, totals, repositories, rows, ages)
    return _load_template().render(
        directory=directory,
        now=now,
        age_days=AGE_DAYS,
        ages=[format_age_group(number) for number in range(len(AGE_DAYS) + 1)],
        list_rows=LIST_ROWS,
        totals=totals,
        tiles=tiles,
        drawn=find_drawn(tiles),
        growth=charts.fetch_growth(connection, now),
        uses=charts.fetch_uses(connection, ages, now),
        sharing=charts.compute_sharing(connection, repositories, rows),
        bases=charts.count_bases(bases),
        shared_layers=fetch_rows(
            connection,
            "SELECT digest, size, images, saved_size, substr(created_by, 1, 200) AS created_by FROM shared_layers "
            "ORDER BY saved_size DESC, digest LIMIT :limit",
            limit=LIST_ROWS,
        ),
        platforms=charts.count_platforms(images.platforms),
        labels=charts.fetch_label_keys(connection),
        images=images,
        details=image_table.LINKED,
        layer_numbers={layer.usage.digest: number for number, layer in enumerate(images.layers)},
        repositories=listed,
        repository_numbers={row.repository: number for number, row in enumerate(listed)},
        unused_days=cleanup.UNUSED_DAYS,
        removal=cleanup.propose_removal(connection, now),
        incomplete=cleanup.find_incomplete(rows, LIST_ROWS),
        holds=cleanup.fetch_holds(connection),
        duplicates=cleanup.find_duplicates(images.by_digest),
        outdated=outdated,
        outdated_images=len(outdated_images),
    )


def _load_template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # imported here: only this function needs it

    folder = Path(__file__).parent
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(folder),
    )
    environment.filters.update(
        clean=clean_text,
        command=cleanup.format_command_line,
        count=format_count,
        count_names=lambda manifests: sum(len(manifest["names"]) for manifest in manifests),
        exact=lambda size: f"{size:,} bytes",
        grouped=lambda number: f"{number:,}",
        format_size=format_size,
        json=_format_json,
        policy=_make_policy,
        shorten_digest=shorten_digest,
        shorten_path=shorten_path,
    )
    return environment.get_template("page.html.j2")


def _fetch_totals(connection: Connection, repositories: Sequence[Row], images: Sequence[ImageRow]) -> dict[str, Any]:
    """Return the totals; each stored blob is unique, shared, held or garbage."""
    found, saved = usage.measure_shares(connection)
    totals = {
        "repositories": len(repositories),
        "images": len(images),
        "incomplete": sum(not image.complete for image in images),
        "blobs": found["stored"].blobs,
        "stored": found["stored"].size,
        "unique": found["unique"].size,
        "shared_blobs": found["shared"].blobs,
        "shared": found["shared"].size,
        "saved": saved,
        "held_blobs": found["held"].blobs,
        "held": found["held"].size,
        "garbage_blobs": found["reclaimable"].blobs,
        "garbage": found["reclaimable"].size,
    }
    for query in (
        "SELECT count(*) AS missing_blobs, coalesce(sum(size), 0) AS missing "
        "FROM (SELECT DISTINCT digest, size FROM missing_blobs) AS m",
        "SELECT coalesce(sum(saved_size), 0) AS saved_by_layers FROM shared_layers",
        "SELECT count(DISTINCT blob_id) AS layers FROM image_blobs WHERE role = 'layer'",  # as in the view
    ):
        totals.update(connection.execute(text(query)).mappings().one())
    return totals


def _format_json(data: object) -> str:
    """Return data as JSON that cannot end the script element it is in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _make_policy(script: str) -> str:
    """Return a Content-Security-Policy that allows a page to run only this script."""
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hashed}'; base-uri 'none'"
