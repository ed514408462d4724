"""Define the commands for single blobs: blob add, cat, path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cachedb.cli.context import open_cache
from cachedb.cli.options import DIGEST, format_examples
from cachedb.cli.spelling import SpellingGroup
from cachedb.cli.streams import PrintingCommand, get_stdin, get_stdout
from cachedb.oci.digests import Algorithm

__all__ = ["blob"]


@click.group(cls=SpellingGroup)
def blob() -> None:
    """Store and read single blobs."""


@blob.command(
    "add",
    epilog=format_examples("cachedb blob add layer.tar", "cachedb blob add --digest sha256:9f86d081884c... layer.tar"),
)
@click.argument("file", type=click.Path())
@click.option("--digest", help="The digest the content must have.  [default: computed]")
@click.option(
    "--algorithm", type=click.Choice(["sha256", "sha512"]), default="sha256", help="The algorithm to compute a digest."
)
def blob_add(file: str, digest: str | None, algorithm: Algorithm) -> None:
    """Store a file as a blob and print its digest; - reads stdin.

    The next `cachedb gc` frees a blob that no image uses.
    """
    data: Any = get_stdin() if file == "-" else Path(file)
    with open_cache(create=True) as cache:
        if digest:
            click.echo(cache.save_blob(digest, data))
        else:
            click.echo(cache.add_blob(data, algorithm=algorithm))


@blob.command("cat", cls=PrintingCommand, epilog=format_examples("cachedb blob cat sha256:9f86d081884c... | tar t"))
@click.argument("digest", type=DIGEST)
def blob_cat(digest: str) -> None:
    """Write a blob's content to stdout."""
    import shutil

    stdout = get_stdout()
    with open_cache() as cache, cache.open_blob(digest) as file:
        shutil.copyfileobj(file, stdout, 1024 * 1024)


@blob.command(
    "path", cls=PrintingCommand, epilog=format_examples('tar tf "$(cachedb blob path sha256:9f86d081884c...)"')
)
@click.argument("digest", type=DIGEST)
def blob_path(digest: str) -> None:
    """Print the path of a blob's file, for reading only.

    The path is valid until the blob is collected.
    """
    with open_cache() as cache:
        click.echo(str(cache.get_blob_path(digest)))
