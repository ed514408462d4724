"""Define the commands for images: ls, show, manifest, exists, tag, rm."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

import click

from cachedb.cli.context import open_cache
from cachedb.cli.options import NAME, NAME_OR_DIGEST, dry_run_option, format_examples, format_option, quiet_option
from cachedb.cli.output import print_collected, print_images, print_json, print_table
from cachedb.cli.streams import get_stdout
from cachedb.errors import InvalidDigest
from cachedb.text import format_size, shorten_digest, truncate

if TYPE_CHECKING:
    from cachedb.index.records import ImageInfo, PlatformInfo

__all__ = ["show"]


@click.command(epilog=format_examples("cachedb ls", "cachedb ls -q", "cachedb ls --format json"))
@format_option
@quiet_option("the images' names")
def ls(form: str, quiet: bool) -> None:
    """List the images in the cache."""
    with open_cache() as cache:
        if quiet:
            click.echo("".join(f"{name}\n" for name in cache.list_names()), nl=False)
            return
        found = cache.list_manifests()
    print_images(found, form, quiet=False)


@click.command(epilog=format_examples("cachedb show app:1", "cachedb show --format json app:1"))
@click.argument("name", type=NAME)
@format_option
@quiet_option("the blobs' digests")
def show(name: str, form: str, quiet: bool) -> None:
    """Show an image, its config and its blobs."""
    with open_cache() as cache:
        image, blobs, labels, platforms = cache.get_details(name)
    if quiet:
        for blob in blobs:
            click.echo(blob.digest)
    elif form == "json":
        found = {"platforms": [platform._asdict() for platform in platforms]}
        print_json({**image._asdict(), "labels": labels, **found, "blobs": [blob._asdict() for blob in blobs]})
    else:
        print_images([image], form, quiet=False)
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


@click.command(epilog=format_examples("cachedb manifest app:1 | jq .layers"))
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
    with open_cache() as cache:
        try:
            is_stored = cache.has_blob(name)
        except InvalidDigest:
            is_stored = cache.is_image_complete(name)
    if not is_stored:
        click.get_current_context().exit(3)


@click.command(epilog=format_examples("cachedb tag app:1 app:stable"))
@click.argument("source", type=NAME)
@click.argument("target", type=NAME)
def tag(source: str, target: str) -> None:
    """Give an image another name.

    If TARGET already names an image, the name moves from that image to this one.
    """
    with open_cache() as cache:
        cache.tag(source, target)


@click.command(epilog=format_examples("cachedb rm app:1", "cachedb rm --dry-run app:1 app:2"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=NAME)
@dry_run_option
@format_option
@quiet_option("the removed images' names")
def rm(names: tuple[str, ...], dry_run: bool, form: str, quiet: bool) -> None:
    """Remove images and free the blobs that only they used.

    If one of the images is not in the cache, none is removed.
    """
    with open_cache() as cache:
        freed = cache.remove_manifest(*names, dry_run=dry_run)
    if quiet:
        for name in names:
            click.echo(name)
    else:
        print_collected(freed, form, dry_run=dry_run)
