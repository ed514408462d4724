"""Commands about registries: pull, push."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from cachedb.cli.output import print_json, print_table
from cachedb.text import human, printable, short

if TYPE_CHECKING:
    from cachedb.index.images import ImageInfo
    from cachedb.operations.push import Pushed

from cachedb.cli.context import cache_directory, open_cache
from cachedb.cli.options import NAME, authfile_option, format_examples, format_option, plain_http_option, quiet_option
from cachedb.cli.output import print_images
from cachedb.cli.progress import show_transfer

__all__ = []


_TURN = 0.0001  # seconds that a thread has the interpreter for, where another downloads


@click.command(
    epilog=format_examples(
        "cachedb pull alpine:3.20",
        "cachedb pull --platform linux/arm64 ghcr.io/team/app:1",
        "cachedb pull --if-missing registry.example.org:5000/team/app:1",
        "cachedb pull --referrers ghcr.io/team/app:1",
    )
)
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=NAME)
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Of an image that has several.  [default: the host's]")
@click.option("--all-platforms", is_flag=True, help="Bring all platforms of an image.")
@click.option("--if-missing", is_flag=True, help="Ask no registry for an image that is here and complete.")
@click.option("--allow-stale", is_flag=True, help="If the registry cannot be reached, take the image that is here.")
@click.option("--referrers", is_flag=True, help="Bring signatures, SBOMs and what else refers to the images, too.")
@plain_http_option
@authfile_option
@format_option
@quiet_option("the images' names")
def pull(
    names: tuple[str, ...],
    platform: str | None,
    all_platforms: bool,
    if_missing: bool,
    allow_stale: bool,
    referrers: bool,
    plain_http: bool | None,
    authfile: str | None,
    form: str,
    quiet: bool,
) -> None:
    """Bring images from their registries: what is not here of them.

    A NAME without a registry is Docker Hub's, as Docker has it; with localhost HTTP is spoken. The image keeps the name
    as it is given. Of an image for several platforms the host's is brought, and another when it is asked for.
    CACHEDB_MIRRORS="REGISTRY=[http://]HOST[:PORT][/PREFIX] ..." says where to look first.
    """
    if platform and all_platforms:
        raise click.UsageError("--platform and --all-platforms exclude each other")
    from cachedb.oci.names import Name
    from cachedb.operations.pull_source import Source

    found: list[ImageInfo] = []
    try:
        with ExitStack() as opened:
            sources = [
                opened.enter_context(
                    Source(
                        cache_directory(),
                        Name.parse(name),
                        platform=platform,
                        all_platforms=all_platforms,
                        plain_http=plain_http,
                        authfile=authfile,
                    )
                )
                for name in names
            ]
            if not if_missing:
                # It comes while SQLAlchemy is imported, which must not keep the interpreter for longer than a chunk
                # takes.
                sys.setswitchinterval(_TURN)
                sources[0].begin()
            cache = opened.enter_context(open_cache())
            for source in sources:
                with show_transfer(f"pulling {source.name}", quiet=quiet) as told:
                    pulled = cache.pull(
                        source,
                        platform=platform,
                        if_missing=if_missing,
                        allow_stale=allow_stale,
                        referrers=referrers,
                        **told,
                    )
                source.close()  # of hundreds of names, one has connections at a time
                found.append(pulled.image)
                if pulled.stale:
                    click.echo(f"cachedb: {source.name} may be out of date: {printable(pulled.stale)}", err=True)
    finally:  # those are here that came before one could not be had
        if found:
            print_images(found, form, quiet=quiet)


@click.command(
    epilog=format_examples(
        "cachedb push registry.example.org:5000/team/app:1",
        "cachedb push app:1 registry.example.org:5000/team/app:1",
        "cachedb push --all-tags app localhost:5000/app",
    )
)
@click.argument("name", type=NAME)
@click.argument("target", required=False, type=NAME)
@click.option("-a", "--all-tags", is_flag=True, help="Push all tags of NAME, a repository, to TARGET, another.")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Push one platform of an image that has several.")
@plain_http_option
@authfile_option
@format_option
@quiet_option("the pushed images' names, by digest,")
def push(
    name: str,
    target: str | None,
    all_tags: bool,
    platform: str | None,
    plain_http: bool | None,
    authfile: str | None,
    form: str,
    quiet: bool,
) -> None:
    """Send an image to a registry, under its name or as TARGET: what is not there of it.

    It has the same digest there. What refers to it, brought by `cachedb pull --referrers`, goes with it. A name
    without a registry is Docker Hub's, as Docker has it; with localhost HTTP is spoken.
    """
    if all_tags and platform:
        raise click.UsageError("--all-tags and --platform exclude each other")
    from cachedb.oci.names import Name
    from cachedb.operations.push_target import Target

    found: list[Pushed] = []
    try:
        with ExitStack() as opened:
            options: dict[str, Any] = {"plain_http": plain_http, "authfile": authfile}
            if not all_tags:
                there = opened.enter_context(Target(cache_directory(), Name.parse(target or name), **options))
                if not platform:
                    sys.setswitchinterval(_TURN)
                    there.begin(Name.parse(name))
            cache = opened.enter_context(open_cache())
            told = opened.enter_context(show_transfer(f"pushing {name}", quiet=quiet))
            if all_tags:
                found.extend(cache.push_tags(name, target, **options, **told))
            else:
                found.append(cache.push(name, there, platform=platform, **told))
    finally:  # of several tags those are there that were pushed before one could not be
        _print_pushed(found, form, quiet=quiet)


def _print_pushed(found: list[Pushed], form: str, *, quiet: bool) -> None:
    if quiet:
        for pushed in found:
            click.echo(f"{pushed.name.repository}@{pushed.digest}")
    elif form == "json":
        print_json([{**pushed._asdict(), "name": str(pushed.name)} for pushed in found])
    elif found:
        rows = [
            (
                str(pushed.name),
                short(pushed.digest),
                f"{pushed.blobs} ({human(pushed.bytes)})" if pushed.blobs else "-",
                str(pushed.mounted or "-"),
                str(pushed.existing or "-"),
            )
            for pushed in found
        ]
        counts = ("UPLOADED", "MOUNTED", "EXISTING")
        print_table(("NAME", "DIGEST", *counts), rows, right=counts)
