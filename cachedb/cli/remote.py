"""Define the commands that ask a registry without storing anything: inspect, digest, tags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cachedb.cli.context import open_cache_or_empty
from cachedb.cli.options import NAME, format_examples, format_option, quiet_option, registry_options
from cachedb.cli.output import print_json, print_table
from cachedb.cli.streams import PrintingCommand
from cachedb.errors import CacheError, RegistryError
from cachedb.oci.platforms import join_platform
from cachedb.text import format_size, printable, shorten_digest

if TYPE_CHECKING:
    from cachedb.cache import Cache
    from cachedb.operations.inspect import RemoteImage

__all__ = []


@click.command(
    cls=PrintingCommand,
    epilog=format_examples(
        "cachedb inspect alpine:3.20",
        "cachedb inspect --platform arm64 --format json docker://ghcr.io/team/app:1",
    ),
)
@click.argument("name", type=NAME)
@click.option(
    "--platform",
    metavar="OS/ARCH[/VARIANT]",
    help="Describe this platform of a multi-platform image.  [default: the host's]",
)
@registry_options
@format_option
@quiet_option("the digest")
def inspect(
    name: str,
    platform: str | None,
    form: str,
    quiet: bool,
    **access: Any,  # noqa: ANN401 - the options of `registry_options`
) -> None:
    """Show an image at its registry: its digest, platforms, config and layers.

    Nothing is stored. `cachedb show` shows an image in the cache.
    """
    with open_cache_or_empty() as cache:
        try:
            image = cache.inspect_remote(name, platform=platform, **access)
        except RegistryError as error:
            if not _is_in_cache(cache, name):
                raise
            raise RegistryError(f"{error}; `cachedb show {name}` shows the image in the cache") from error
    if quiet:
        click.echo(image.digest)
    elif form == "json":
        lists = {
            "platforms": [child._asdict() for child in image.platforms],
            "layers": [layer._asdict() for layer in image.layers],
        }
        print_json({**image._asdict(), "name": str(image.name), **lists})
    else:
        _print_image(image)


def _is_in_cache(cache: Cache, name: str) -> bool:
    try:
        cache.get_manifest(name)
    except CacheError:  # some names at a registry are not valid in a cache
        return False
    return True


def _print_image(image: RemoteImage) -> None:
    platform = join_platform(image.os, image.architecture, image.variant)
    built = f"{image.created:%Y-%m-%d %H:%M:%S} UTC" if image.created else ""
    values = [
        ("name", str(image.name)),
        ("digest", image.digest),
        ("media type", image.media_type),
        ("manifest", image.manifest if image.platforms else ""),
        ("platform", platform),
        ("size", format_size(image.size)),
        ("built", built),
        ("author", image.author or ""),
        *(("label", f"{key}={value}") for key, value in image.labels.items()),
    ]
    print_table(("FIELD", "VALUE"), [(field, value) for field, value in values if value])
    if image.platforms:
        click.echo()
        print_table(
            ("PLATFORM", "DIGEST"), [(child.platform or "-", shorten_digest(child.digest)) for child in image.platforms]
        )
    click.echo()
    rows = [(shorten_digest(layer.digest), format_size(layer.size), layer.media_type) for layer in image.layers]
    print_table(("LAYER", "SIZE", "MEDIA TYPE"), rows, right=("SIZE",))


@click.command(
    cls=PrintingCommand,
    epilog=format_examples("cachedb digest alpine:3.20", "cachedb digest --format json ghcr.io/team/app:1"),
)
@click.argument("name", type=NAME)
@registry_options
@format_option
def digest(name: str, form: str, **access: Any) -> None:  # noqa: ANN401 - the options of `registry_options`
    """Print the digest that a name has at its registry."""
    with open_cache_or_empty() as cache:
        found = cache.get_remote_digest(name, **access)
    if form == "json":
        print_json({"name": name, "digest": found})
    else:
        click.echo(found)


@click.command(
    cls=PrintingCommand, epilog=format_examples("cachedb tags alpine", "cachedb tags --format json ghcr.io/team/app")
)
@click.argument("repository")
@registry_options
@format_option
def tags(repository: str, form: str, **access: Any) -> None:  # noqa: ANN401 - the options of `registry_options`
    """List the tags of a repository at its registry."""
    with open_cache_or_empty() as cache:
        found = cache.list_remote_tags(repository, **access)
    if form == "json":
        print_json(found)
    else:
        click.echo("".join(f"{printable(tag)}\n" for tag in found), nl=False)
