"""Define the commands for holds: hold, holds, release, produce."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import click

from cachedb.cli.context import cache_directory, open_cache
from cachedb.cli.fields import Field, print_records
from cachedb.cli.options import (
    NAME,
    NAME_OR_DIGEST,
    DurationParameter,
    HoldParameter,
    Output,
    check_selection,
    filter_options,
    format_examples,
    ignore_missing_option,
    output_options,
    quiet_option,
)
from cachedb.cli.process_tree import end_with_descendants
from cachedb.cli.signals import delaying_signals
from cachedb.cli.streams import PrintingCommand
from cachedb.errors import CacheError
from cachedb.text import format_age, format_size

if TYPE_CHECKING:
    from cachedb.index.filters import Filters
    from cachedb.index.holds import HoldInfo

__all__ = []


_HOLD_FIELDS: Final = (
    Field("id", "hold"),
    Field("name", "name"),
    Field("blobs", "blobs", right=True),
    Field("size", "size", format_size, right=True),
    Field("created_at", "created", format_age, place=2),
    Field("expires_at", "ends", lambda time: f"{time:%Y-%m-%d %H:%M:%S} UTC", missing="when released"),
)


def _print_holds(found: list[HoldInfo], output: Output, *, quiet: bool) -> None:
    if quiet:
        for hold in found:
            click.echo(hold.id)
    else:
        print_records([hold._asdict() for hold in found], _HOLD_FIELDS, output)


@click.command(
    epilog=format_examples(
        "cachedb hold app:1 --for 2h",
        "cachedb hold 'team/*' --filter label=stage=production",
        "cachedb release app:1",
    )
)
@click.argument("names", metavar="[NAME|PATTERN|DIGEST]...", nargs=-1, type=NAME_OR_DIGEST)
@click.option(
    "--for",
    "seconds",
    metavar="TIME",
    type=DurationParameter(),
    help="How long to hold, such as 30m, 2h or 7d.  [default: until released]",
)
@filter_options
@ignore_missing_option
@output_options
@quiet_option("the holds' ids")
def hold(
    names: tuple[str, ...],
    seconds: float | None,
    filters: Filters | None,
    ignore_missing: bool,
    output: Output,
    quiet: bool,
) -> None:
    """Hold blobs, so that they stay even if the names of their images are removed or moved.

    A hold keeps the blobs that an image has now. It lasts for a time, or until `cachedb release`. No process needs to
    stay alive for it. --filter without names selects from all images; each selected image gets its own hold.
    """
    check_selection(names, filters, ignore_missing=ignore_missing)
    with open_cache() as cache:
        made = cache.add_hold(*names, seconds=seconds, filters=filters, ignore_missing=ignore_missing)
    _print_holds(made, output, quiet=quiet)


@click.command(cls=PrintingCommand, epilog=format_examples("cachedb holds", "cachedb release $(cachedb holds -q)"))
@output_options
@quiet_option("the holds' ids")
def holds(output: Output, quiet: bool) -> None:
    """List the holds that keep blobs from being collected."""
    with open_cache() as cache:
        found = cache.list_holds()
    _print_holds(found, output, quiet=quiet)


@click.command(epilog=format_examples("cachedb release app:1", "cachedb release hold-3f2a90c1d4e5"))
@click.argument("names", metavar="HOLD|NAME|DIGEST...", nargs=-1, required=True, type=HoldParameter())
def release(names: tuple[str, ...]) -> None:
    """Release holds by id, or all holds of a name or digest.

    If one of them is unknown, none is released. The next `cachedb gc` frees blobs that nothing needs any more.
    """
    with open_cache() as cache:
        cache.release_hold(*names)


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog=format_examples("cachedb produce app:1 -- sh -c 'docker save app:1 | cachedb import -'"),
)
@click.argument("name", type=NAME)
@click.argument("command", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def produce(name: str, command: tuple[str, ...]) -> None:
    """Run a command that stores an image, unless it is already complete in the cache.

    Of several processes that want the same image, one runs its command and the others wait. If that command fails or
    is killed, the next process runs its own. The command finds the cache directory in CACHEDB_DIR. The exit code is
    the command's. An interrupt of cachedb also ends the command and all processes that it started, except daemons.
    """
    import subprocess

    from cachedb.oci.names import Name

    command = command[command[0] == "--" :]
    if not command:
        raise click.UsageError("there is no command: name the command to run after NAME")
    producing = os.environ.get("CACHEDB_PRODUCING", "")
    wanted = f"\n{Name.parse(name)} in {os.path.realpath(cache_directory())}\n"  # the same for all ways to write them
    if wanted in producing:  # search the text: a directory name may contain a newline, so lines cannot be split
        raise CacheError(f"a parent process is already producing {name!r}; nesting would deadlock")
    process: subprocess.Popen[bytes] | None = None

    def is_working() -> bool:
        """Return whether the command runs: False while it is stopped, for example by ^Z."""
        if process is None or process.returncode is not None:
            return True
        with suppress(ChildProcessError):
            return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None
        return True

    with open_cache(create=True) as cache, cache.producing(name, is_working=is_working) as image:
        if image is not None:
            return
        environment = {
            **os.environ,
            "CACHEDB_DIR": str(cache.directory),
            "CACHEDB_PRODUCING": producing + wanted,
        }
        try:
            with delaying_signals():  # an interrupt of Popen would leave its command running
                try:
                    process = subprocess.Popen(command, env=environment)  # noqa: S603 - the user's own command
                except OSError as error:
                    raise click.UsageError(f"cannot run {command[0]!r}: {error.strerror}") from error
            code = process.wait()
        except BaseException:
            if process is not None:
                end_with_descendants(process)
            raise
        if code:
            click.get_current_context().exit(code if code > 0 else 128 - code)
        if not cache.is_image_complete(name):
            raise CacheError(f"the command succeeded, but {name!r} is missing or incomplete: store it under this name")
