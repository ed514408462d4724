"""Define the commands for images: ls, show, manifest, exists, tag, pin, unpin, rm."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import click

from cachedb.cli.context import open_cache
from cachedb.cli.fields import describe_image, print_images, uses_column
from cachedb.cli.options import (
    NAME,
    NAME_OR_DIGEST,
    Output,
    check_selection,
    dry_run_option,
    filter_options,
    format_examples,
    format_option,
    ignore_missing_option,
    output_options,
    quiet_option,
)
from cachedb.cli.output import describe_collected, print_collected, print_json, print_names, print_table
from cachedb.cli.streams import PrintingCommand, get_stdout
from cachedb.errors import NotInCache
from cachedb.oci.digests import parse_digest_prefix
from cachedb.oci.names import Name
from cachedb.oci.platforms import join_platform
from cachedb.text import format_age, format_size, shorten_digest, truncate

if TYPE_CHECKING:
    from cachedb.cache import Cache
    from cachedb.index.filters import Filters
    from cachedb.index.records import BlobDetails, ImageInfo, PlatformInfo

__all__ = ["ls", "rm", "show"]


@click.command(
    cls=PrintingCommand,
    epilog=format_examples(
        "cachedb ls",
        "cachedb ls -q 'team/*' --filter unused-for=30d",
        "cachedb ls --sort -size --limit 5 --columns name,size,last-used",
        "cachedb ls --format '{{.Name}}\\t{{.Digest}}'",
        "cachedb ls --format json",
    ),
)
@click.argument("names", metavar="[NAME|PATTERN]...", nargs=-1, type=NAME)
@filter_options
@output_options
@quiet_option("the images' names")
def ls(names: tuple[str, ...], filters: Filters | None, output: Output, quiet: bool) -> None:
    """List the images in the cache, or those that match.

    The columns PINNED and EXPIRES appear if one of the images is pinned or has a lifetime.

    A PATTERN such as 'team/*' must match a whole name; its * also matches a slash. ADDED is when the name came here,
    CREATED is when the image was built. A narrow terminal shows fewer columns, or a line for each value.
    """
    with open_cache() as cache:
        if quiet:
            print_names(cache.list_names(*names, filters=filters, ignore_missing=True))
            return
        found = cache.list_manifests(*names, filters=filters, ignore_missing=True)
        platforms = _read_platforms(cache) if uses_column(output, "platforms") else None
    print_images(found, output, platforms=platforms)


def _read_platforms(cache: Cache) -> dict[str, list[str]]:
    """Return the platforms of each image, by name.

    To read them takes longer than to read the rest of a list of images.
    """
    found: dict[str, list[str]] = {}
    with cache.sql("SELECT name, os, architecture, variant FROM platforms") as answer:
        for name, *parts in answer.rows:
            found.setdefault(name, []).append(join_platform(*parts))
    return found


@click.command(
    cls=PrintingCommand,
    epilog=format_examples("cachedb show app:1", "cachedb show --format json app:1", "cachedb show 9f86d081884c"),
)
@click.argument("name", metavar="NAME|DIGEST", type=NAME_OR_DIGEST)
@format_option
@quiet_option("the blobs' digests")
def show(name: str, form: str, quiet: bool) -> None:
    """Show an image, its config and its blobs; or a blob, and the images that have it.

    The first 12 digits or more of a digest are enough, if no other digest starts with them.
    """
    with open_cache() as cache:
        try:
            image, blobs, labels, platforms = cache.get_details(name)
        except NotInCache:
            if not parse_digest_prefix(name):
                raise
            _print_blob(cache.get_blob_details(name), form, quiet=quiet)
            return
    if quiet:
        for blob in blobs:
            click.echo(blob.digest)
    elif form == "json":
        found = {"platforms": [platform._asdict() for platform in platforms]}
        print_json({**describe_image(image), "labels": labels, **found, "blobs": [blob._asdict() for blob in blobs]})
    else:
        print_images([image], form)
        click.echo()
        _print_config(image, labels)
        _print_platforms(platforms, {blob.digest for blob in blobs if blob.stored})
        rows = (
            (
                str(blob.position),
                blob.role,
                shorten_digest(blob.digest),
                format_size(blob.size),
                "stored" if blob.stored else "missing",
                blob.media_type,
                truncate(blob.created_by or ""),
            )
            for blob in blobs
        )
        print_table(("#", "ROLE", "DIGEST", "SIZE", "STATE", "MEDIA TYPE", "CREATED BY"), rows, right=("#", "SIZE"))


def _print_blob(blob: BlobDetails, form: str, *, quiet: bool) -> None:
    if quiet:
        click.echo(blob.digest)
    elif form == "json":
        fields = blob._asdict()
        images = [{**use._asdict(), "name": str(use.name)} for use in fields.pop("uses")]
        print_json({**fields, "stored": blob.stored_at is not None, "images": images})
    else:
        stored = format_age(blob.stored_at) if blob.stored_at else "-"
        state = "stored" if blob.stored_at else "missing"
        row = (blob.digest, format_size(blob.size), stored, "yes" if blob.held else "no", state)
        print_table(("DIGEST", "SIZE", "STORED", "HELD", "STATE"), [row], right=("SIZE",))
        click.echo()
        rows = [(str(use.name), str(use.position), use.role, use.media_type) for use in blob.uses]
        print_table(("IMAGE", "#", "ROLE", "MEDIA TYPE"), rows, right=("#",))


def _print_config(image: ImageInfo, labels: dict[str, str]) -> None:
    created = f"{image.created:%Y-%m-%d %H:%M:%S} UTC" if image.created else ""
    values = [("platform", image.platform), ("built", created), ("author", image.author or "")]
    values += [("label", f"{key}={value}") for key, value in labels.items()]
    if rows := [(field, value) for field, value in values if value]:
        print_table(("CONFIG", "VALUE"), rows)
        click.echo()


def _print_platforms(platforms: list[PlatformInfo], stored: Container[str]) -> None:
    rows = [
        (
            child.platform or "-",
            shorten_digest(child.digest),
            "complete" if child.complete else "incomplete" if child.digest in stored else "not here",
        )
        for child in platforms
    ]
    if rows:
        print_table(("PLATFORM", "DIGEST", "STATE"), rows)
        click.echo()


@click.command(cls=PrintingCommand, epilog=format_examples("cachedb manifest app:1 | jq .layers"))
@click.argument("name", type=NAME)
def manifest(name: str) -> None:
    """Print the exact bytes of an image's manifest or index."""
    stdout = get_stdout()
    with open_cache() as cache:
        data = cache.get_manifest(name)
    stdout.write(data)


@click.command(epilog=format_examples("cachedb exists app:1 || cachedb import app.tar"))
@click.argument("name", metavar="NAME|DIGEST", type=NAME_OR_DIGEST)
def exists(name: str) -> None:
    """Exit with 0 if an image is complete or a blob is stored, otherwise with 3."""
    from cachedb.index.filters import has_short_digest

    if parse_digest_prefix(name) is None and not has_short_digest(name):
        Name.parse(name)  # an invalid name is wrong usage, even without a cache
    with open_cache() as cache:
        is_stored = (parse_digest_prefix(name) and cache.has_blob(name)) or cache.is_image_complete(name)
    if not is_stored:
        click.get_current_context().exit(3)


@click.command(
    epilog=format_examples(
        "cachedb tag app:1 app:stable",
        "cachedb tag 'ci/*:1' 'mirror/*:1'",
        "cachedb tag '*:1' '*:old' --filter unused-for=30d",
    )
)
@click.argument("source", metavar="SOURCE", type=NAME)
@click.argument("target", metavar="TARGET", type=NAME)
@filter_options
@ignore_missing_option
def tag(source: str, target: str, filters: Filters | None, ignore_missing: bool) -> None:
    """Give one or several images another name.

    SOURCE may be a pattern. Then each * of TARGET becomes what the * of SOURCE matched. If TARGET already names an
    image, the name moves from that image to this one. The name keeps its pin, and gets no lifetime.
    """
    with open_cache() as cache:
        cache.tag_images(source, target, filters=filters, ignore_missing=ignore_missing)


@click.command(
    epilog=format_examples(
        "cachedb pin base:1", "cachedb pin 'base/*' --filter label=stage=production", "cachedb ls --filter pinned"
    )
)
@click.argument("names", metavar="[NAME|PATTERN]...", nargs=-1, type=NAME)
@filter_options
@ignore_missing_option
def pin(names: tuple[str, ...], filters: Filters | None, ignore_missing: bool) -> None:
    """Pin names of images, so that no prune removes them.

    A pin belongs to the name: it stays if the name moves to another image. It protects only from `cachedb prune`.
    `cachedb rm` removes the name with its pin; a hold keeps blobs from that too. --filter without names selects from
    all images. All images are pinned, or none. To pin a name again is no error.
    """
    check_selection(names, filters, ignore_missing=ignore_missing)
    with open_cache() as cache:
        if not cache.pin(*names, filters=filters, ignore_missing=ignore_missing):
            click.echo("no image matches: nothing is pinned", err=True)


@click.command(epilog=format_examples("cachedb unpin base:1", "cachedb unpin '*'"))
@click.argument("names", metavar="[NAME|PATTERN]...", nargs=-1, type=NAME)
@filter_options
@ignore_missing_option
def unpin(names: tuple[str, ...], filters: Filters | None, ignore_missing: bool) -> None:
    """Remove the pins of names, so that a prune may remove the names again.

    --filter without names selects from all images. A name without a pin is no error.
    """
    check_selection(names, filters, ignore_missing=ignore_missing)
    with open_cache() as cache:
        if not cache.unpin(*names, filters=filters, ignore_missing=ignore_missing):
            click.echo("no image matches: nothing is unpinned", err=True)


@click.command(
    epilog=format_examples(
        "cachedb rm app:1",
        "cachedb rm --dry-run app:1 app:2",
        "cachedb rm 'ci/*' --filter unused-for=7d",
        "cachedb ls -q --filter incomplete | xargs cachedb rm --ignore-missing",
    )
)
@click.argument("names", metavar="[NAME|PATTERN]...", nargs=-1, type=NAME)
@filter_options
@ignore_missing_option
@dry_run_option
@format_option
@quiet_option("the removed images' names")
def rm(
    names: tuple[str, ...], filters: Filters | None, ignore_missing: bool, dry_run: bool, form: str, quiet: bool
) -> None:
    """Remove images and free the blobs that only they used.

    If one of the names is not in the cache, or a pattern matches no image, none is removed. --filter without names
    selects from all images. Images are selected and removed at one moment, so an image that was just used stays. With
    --ignore-missing, the names may be missing too; then nothing is removed.
    """
    check_selection(names, filters, ignore_missing=ignore_missing)
    with open_cache() as cache:
        freed = cache.remove_manifest(*names, filters=filters, ignore_missing=ignore_missing, dry_run=dry_run)
    if quiet:
        print_names(freed.images)
    elif form == "json":
        print_json({**describe_collected(freed), "images": [{"name": str(name)} for name in freed.images]})
    else:
        if not freed.images:
            click.echo("no image matches: nothing is removed", err=True)
        elif dry_run:
            click.echo("".join(f"would remove {name}\n" for name in freed.images), nl=False)
        print_collected(freed, form, dry_run=dry_run)
