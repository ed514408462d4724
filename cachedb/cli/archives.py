"""Define the commands for archives: import, export."""

from __future__ import annotations

import os
import sys
from typing import IO, TYPE_CHECKING, Literal

import click

from cachedb.cli.context import open_cache
from cachedb.cli.fields import describe_image, print_images
from cachedb.cli.options import (
    NAME,
    SizeParameter,
    check_selection,
    filter_options,
    format_examples,
    format_option,
    ignore_missing_option,
    quiet_option,
    ttl_option,
)
from cachedb.cli.output import print_json
from cachedb.cli.progress import show_progress
from cachedb.cli.streams import get_stdin, get_stdout
from cachedb.errors import os_errors
from cachedb.transports.archive.formats import FOLDER_FORMATS, FORMATS, Format
from cachedb.transports.archive.locations import parse_location

if TYPE_CHECKING:
    from cachedb.index.filters import Filters

__all__ = ["export", "import_"]


@click.command(
    "import",
    epilog=format_examples(
        "cachedb import app.tar",
        "cachedb import layout/ team/app:2",
        "cachedb import layout/ team/app:        # the tags of the layout: team/app:1.0, team/app:1.1",
        "cachedb import --select 3f57d9401f8d app.tar team/app:2",
        "cachedb import oci:layout:1.0 app:1.0",
        "cachedb import --link layout/",
        "cachedb import --ttl 6h app.tar",
        "docker save app:1 | cachedb import -",
    ),
)
@click.argument("source", metavar="[SOURCE]", required=False, type=click.Path())
@click.argument("name", required=False, type=NAME)
@click.option(
    "-i",
    "--input",
    "input_",
    metavar="SOURCE",
    type=click.Path(),
    help="Another way to give SOURCE, as in `docker load`.",
)
@click.option(
    "--repository",
    metavar="REPOSITORY",
    help="The repository for images that have only a tag in the archive, and for images without a name, which are "
    "named by digest. NAME with a colon at its end does the same.",
)
@click.option(
    "--select",
    metavar="NAME|DIGEST",
    help="Import one image: its name in the archive, or the digest of its manifest or config, or 12 digits of it.",
)
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Import only this platform of each image.")
@click.option("--no-replace", is_flag=True, help="Refuse an archive that would replace an image in the cache.")
@click.option(
    "--link", is_flag=True, help="Hard-link a layout's files instead of copying them. Do not write to them afterwards."
)
@click.option(
    "--max-unpacked",
    metavar="SIZE",
    type=SizeParameter(),
    help="Refuse an archive that unpacks to more.  "
    "[default: $CACHEDB_MAX_UNPACKED, else 64GiB or 100 times its size, if that is less]",
)
@ttl_option
@format_option
@quiet_option("the images' names")
def import_(
    source: str | None,
    name: str | None,
    input_: str | None,
    repository: str | None,
    select: str | None,
    platform: str | None,
    no_replace: bool,
    link: bool,
    max_unpacked: int | None,
    ttl: int | None,
    form: str,
    quiet: bool,
) -> None:
    """Import the images of an archive under the names stored in it.

    SOURCE is a docker-archive, an OCI archive, an OCI image layout folder, a folder of skopeo's dir:, or - for stdin.
    Archives may be compressed. SOURCE may begin with a transport of skopeo, as in oci:PATH[:TAG]. TAG then selects an
    image.

    NAME replaces the name in an archive of one image. NAME with a colon at its end is a repository for tags that have
    none. A warning on stderr names what is not imported, and what is replaced.
    """
    if input_ is not None:
        if name is not None:
            raise click.UsageError("give the source once: as SOURCE, or with -i SOURCE")
        source, name = input_, source
    if source is None:
        raise click.UsageError("give a source: cachedb import SOURCE [NAME]")
    if source.startswith("docker://"):
        raise click.UsageError(f"{source!r} is in a registry: use `cachedb pull {source.removeprefix('docker://')}`")
    location = parse_location(source)
    if location.tag is not None:
        if select is not None:
            raise click.UsageError("SOURCE has a tag, and --select was given too: give one of them")
        select = location.tag
    if name is not None and name.endswith(":"):
        if repository is not None:
            raise click.UsageError("NAME is a repository, and --repository was given too: give one of them")
        repository, name = name.removesuffix(":"), None
    opened: str | IO[bytes] = location.path
    if opened == "-":
        opened = get_stdin()
    else:
        with os_errors("read the archive"):
            os.stat(location.path)  # before the cache is created
    with open_cache(create=True) as cache, show_progress("importing", quiet=quiet) as progress:
        found = cache.cache_from_tar(
            opened,  # type: ignore[arg-type]
            name,
            repository=repository,
            select=select,
            platform=platform,
            replace=not no_replace,
            link=link,
            max_unpacked=max_unpacked,
            ttl=ttl,
            progress=progress,
        )
    for image in found:
        if image.replaced:
            click.echo(f"cachedb: replaced {image.name}, which was {image.replaced}", err=True)
    if form == "json" and not quiet:
        print_json([{**describe_image(image), "replaced": image.replaced} for image in found])
    else:
        print_images(list(found), form, quiet=quiet)


@click.command(
    epilog=format_examples(
        "cachedb export app:1 app.tar",
        "cachedb export app:1 -o app.tar",
        "cachedb export app:1 - | docker load",
        "cachedb export app:1 oci:layout:1",
        "cachedb export --format oci-dir --link app:1 layout/",
        "cachedb export --format oci-archive --referrers app:1 app.tar",
        "cachedb export --format oci-archive --convert oci app:1 app.tar",
        "cachedb export 'team/*' app:1 all.tar",
        "cachedb export --filter label=stage=production -o production.tar",
    )
)
@click.argument("names", metavar="[NAME|PATTERN]... [DEST]", nargs=-1, type=NAME)
@click.option(
    "-o", "--output", metavar="DEST", type=click.Path(), help="Another way to give DEST, as in `docker save`."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="The format to write; docker is an OCI archive that `docker load` reads too.  [default: docker]",
)
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Export one platform of a multi-platform image.")
@click.option("--link", is_flag=True, help="Hard-link blobs into a folder where the file system allows it.")
@click.option("--referrers", is_flag=True, help="Also export signatures, SBOMs and other referrers of the image.")
@click.option(
    "--convert",
    type=click.Choice(["oci"]),
    help="Replace Docker's media types by OCI's, so that skopeo finds the image by name. Its digest changes.",
)
@filter_options
@ignore_missing_option
def export(
    names: tuple[str, ...],
    output: str | None,
    form: Format | None,
    platform: str | None,
    link: bool,
    referrers: bool,
    convert: Literal["oci"] | None,
    filters: Filters | None,
    ignore_missing: bool,
) -> None:
    """Export one or several images to one archive or folder.

    DEST is a file, a folder for oci-dir and dir, or - for stdout. It may begin with a transport of skopeo, which sets
    the format: oci-archive:PATH[:TAG], oci:, docker-archive: or dir:. TAG is the name in the archive. An existing file
    is replaced only by a complete archive. Images are added to an existing image layout. The same image gives the same
    bytes on all hosts of one platform.
    """
    names, destination = _split_destination(names, output, is_selected=filters is not None)
    check_selection(names, filters, ignore_missing=ignore_missing)
    location = parse_location(destination)
    if location.format and form not in (None, location.format):
        raise click.UsageError(f"DEST begins with another format than --format {form}: leave one of them out")
    form = location.format or form or "docker"
    if link and form not in FOLDER_FORMATS:
        raise click.UsageError("--link works only with --format oci-dir or dir: use one of them, or leave out --link")
    opened: str | IO[bytes] = location.path
    if opened == "-":
        if form in FOLDER_FORMATS:
            raise click.UsageError(f"the format {form} cannot be written to stdout: name a folder")
        if sys.stdout.isatty():
            raise click.UsageError("stdout is a terminal: redirect it or name a file")
        opened = get_stdout()
    with open_cache() as cache, show_progress("exporting") as progress:
        exported = cache.export(
            names,
            opened,  # type: ignore[arg-type]
            format=form,
            tag=location.tag,
            platform=platform,
            link=link,
            referrers=referrers,
            convert=convert,
            filters=filters,
            ignore_missing=ignore_missing,
            progress=progress,
        )
    if not exported:
        click.echo("no image matches: nothing is exported", err=True)


def _split_destination(names: tuple[str, ...], output: str | None, *, is_selected: bool) -> tuple[tuple[str, ...], str]:
    """Return the names and the destination, which is the last argument unless -o gives it.

    Args:
        names: the arguments.
        output: the value of -o.
        is_selected: whether filters select images, so that names are not needed.
    """
    if output is not None:
        return names, output
    if len(names) < (1 if is_selected else 2):
        raise click.UsageError("expected names and a destination: give DEST as the last argument, or with -o DEST")
    return names[:-1], names[-1]
