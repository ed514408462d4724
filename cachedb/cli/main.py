"""The command line: each command parses, calls one method of `Cache`, and prints.

Only click is imported here; what a command needs beyond that, it imports when it runs.
"""

from __future__ import annotations

import gc as gc_
import io
import os
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, NoReturn

import click

from cachedb import __version__
from cachedb.cli.output import ROW_FORMATS, print_json, print_rows, print_table
from cachedb.errors import (
    CacheError,
    InvalidDigest,
    InvalidName,
    InvalidQuery,
    InvalidRevision,
    NotInCache,
    explain,
)
from cachedb.text import ago, cut, human, parse_size, printable, short

if TYPE_CHECKING:
    from pathlib import Path

    import rich.progress
    from click.shell_completion import CompletionItem

    from cachedb.cache import Cache, Progress
    from cachedb.content.collect import Collected
    from cachedb.content.save import ImageInfo, PlatformInfo
    from cachedb.index.holds import HoldInfo
    from cachedb.index.schema import Change
    from cachedb.operations.push import Pushed
    from cachedb.operations.rebuild import Restored
    from cachedb.threads import BlobProgress

    _Parameter = click.ParamType[str]
else:
    _Parameter = click.ParamType

__all__ = ["cli", "main"]


_COMPLETE = "_CACHEDB_COMPLETE"  # the variable by which a shell asks for completion
_TURN = 0.0001  # seconds that a thread has the interpreter for, where another downloads
_EXPORT_FORMATS = ("docker", "docker-archive", "oci-archive", "oci-dir")  # export.FORMATS, without its import


def main() -> NoReturn:
    """Run the command line; errors are one line on stderr, and exit codes as the README lists them."""
    import signal

    _ended.clear()
    _open_standard_files()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # of what the user's encoding has not
    # The collector would look through all that SQLAlchemy makes while it is imported, and find nothing.
    gc_.disable()
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as behind `nohup`
        signal.signal(signal.SIGINT, _interrupted)
    try:
        if _COMPLETE in os.environ:
            import cachedb.cli.candidates  # noqa: F401 - click takes the bash script from there
        code = cli.main(prog_name="cachedb", standalone_mode=False) or 0
        sys.stdout.flush()
        sys.exit(code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "cachedb"
        _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except NotInCache as error:
        _fail(str(error), 3)
    except (InvalidName, InvalidDigest, InvalidRevision, InvalidQuery) as error:
        _fail(str(error), 2)
    except CacheError as error:
        _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        _discard_output(1)  # whoever read our output has seen enough
        sys.exit(1)
    except MemoryError:
        _fail("there is not enough memory; a query needs less of it with --format csv", 1)
    except OSError as error:
        _discard_output(1)
        _fail(f"cannot print the result: {explain(error)}", 1)
    finally:
        _ended.append(True)


_closed: set[str] = set()  # standard files that were closed when we began: "stdin", "stdout", "stderr"


def _open_standard_files() -> None:
    """Open the standard files that are closed, as by `>&-`: no file of the cache may come to be in their place."""
    for name in ("stdin", "stdout", "stderr"):  # in the order of their numbers, of which each gets its own
        if getattr(sys, name) is None:
            _closed.add(name)
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def _discard_output(descriptor: int) -> None:
    """Have nothing more be written to stdout or stderr, which cannot be: not what is flushed at exit either."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _stdin() -> IO[bytes]:
    """Return stdin, to read content from."""
    if "stdin" in _closed:
        raise click.UsageError("stdin is closed: send the content to it, or name a file")
    if sys.stdin.isatty():
        raise click.UsageError("stdin is a terminal: send the content to it, or name a file")
    return sys.stdin.buffer


def _stdout() -> IO[bytes]:
    """Return stdout, to write content to."""
    if "stdout" in _closed:
        raise click.UsageError("stdout is closed: redirect it")
    return sys.stdout.buffer


_signals: list[int] = []  # that have come


def _terminated(number: int, _frame: object) -> NoReturn:
    _signals.append(number)
    sys.exit(143)


def _interrupted(number: int, _frame: object) -> NoReturn:
    _signals.append(number)
    if _ended:
        os._exit(130)  # all is done and printed: where the interpreter ends, an exception would only be printed
    raise KeyboardInterrupt


_ended: list[bool] = []  # not empty once the command is over


def _fail(message: str, code: int) -> NoReturn:
    try:
        print(f"cachedb: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        _discard_output(2)  # the exit code still says that it failed
    sys.exit(code)


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _directory() -> Path:
    from cachedb.disk.layout import chosen

    return chosen(click.get_current_context().find_root().params["directory"])


@contextmanager
def _opened(*, damaged: bool = False, existing: bool = False) -> Iterator[Cache]:
    import logging

    from cachedb.cache import Cache

    if existing and not any((_directory() / name).exists() for name in ("index.db", "blobs")):
        raise NotInCache(f"there is no cache in {str(_directory())!r}")
    gc_.freeze()
    gc_.enable()
    # SQLAlchemy logs an interrupt that comes while it closes a connection, with a traceback, and raises it as well.
    logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())
    with Cache.open(_directory(), damaged=damaged) as cache:
        yield cache


# Parameters


class _InCache(_Parameter):
    """What a shell completes to the names in the cache, or the digests, or both."""

    def __init__(self, name: str, *, names: bool = False, digests: bool = False) -> None:
        self.name, self._names, self._digests = name, names, digests

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from cachedb.cli.candidates import candidates

        return candidates(ctx, incomplete, names=self._names, digests=self._digests)


class _Held(_Parameter):
    name = "hold"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from cachedb.cli.candidates import held

        return held(ctx, incomplete)


class _Size(_Parameter):
    """A number of bytes, such as 500MB or 64GiB."""

    name = "size"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        size = parse_size(value)
        if size is None:
            self.fail(f"{value!r} is not a size such as 500MB or 64GiB", param, ctx)
        return size


_NAME = _InCache("name", names=True)
_DIGEST = _InCache("digest", digests=True)
_NAME_OR_DIGEST = _InCache("name or digest", names=True, digests=True)
_format = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="How to print the result.",
)
_plain_http = click.option(
    "--plain-http/--tls", "plain_http", default=None, help="Speak HTTP, or HTTPS with this host too."
)
_authfile = click.option(
    "--authfile", type=click.Path(), help="Credentials.  [default: as podman and Docker keep them]"
)
_dry_run = click.option("--dry-run", is_flag=True, help="Remove nothing; say what would be freed.")


def _quiet(what: str) -> Callable[[Any], Any]:
    return click.option("-q", "--quiet", is_flag=True, help=f"Print {what} alone.")


# Printing


def _print_images(found: list[ImageInfo], form: str, *, quiet: bool) -> None:
    if quiet:
        for image in found:
            click.echo(str(image.name))
    elif form == "json":
        print_json([image._asdict() for image in found])
    else:
        rows = (
            (
                str(image.name),
                short(image.digest),
                human(image.size),
                ago(image.created_at),
                "complete" if image.complete else "incomplete",
            )
            for image in found
        )
        print_table(("NAME", "DIGEST", "SIZE", "CREATED", "STATE"), rows, right=("SIZE",))


def _print_collected(freed: Collected, form: str, *, dry_run: bool) -> None:
    if form == "json":
        print_json(freed._asdict())
    else:
        blobs = f"{freed.blobs} blob{'' if freed.blobs == 1 else 's'}"
        click.echo(f"{'would free' if dry_run else 'freed'} {blobs}, {human(freed.bytes)}")


def _print_holds(found: list[HoldInfo], form: str, *, quiet: bool) -> None:
    if quiet:
        for hold in found:
            click.echo(hold.id)
    elif form == "json":
        print_json([hold._asdict() for hold in found])
    else:
        rows = (
            (
                hold.id,
                hold.name,
                str(hold.blobs),
                human(hold.size),
                ago(hold.created_at),
                f"{hold.expires_at:%Y-%m-%d %H:%M:%S} UTC" if hold.expires_at else "when released",
            )
            for hold in found
        )
        print_table(("HOLD", "NAME", "BLOBS", "SIZE", "CREATED", "ENDS"), rows, right=("BLOBS", "SIZE"))


@contextmanager
def _bars(*, quiet: bool = False) -> Iterator[rich.progress.Progress | None]:
    """Show bars of bytes on stderr, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from cachedb.cli.log import log_above

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars,
        log_above(lambda line: bars.console.print(line, markup=False, highlight=False)),
    ):
        yield bars


@contextmanager
def _progress(action: str, *, quiet: bool = False) -> Iterator[Progress | None]:
    """Show a bar for the whole."""
    with _bars(quiet=quiet) as bars:
        yield _whole(bars, action) if bars else None


@contextmanager
def _transfer(action: str, *, quiet: bool) -> Iterator[dict[str, Any]]:
    """Show a bar for the whole, and one for each blob that is on its way."""
    with _bars(quiet=quiet) as bars:
        yield {"progress": _whole(bars, action), "blob_progress": _each(bars)} if bars else {}


def _whole(bars: rich.progress.Progress, action: str) -> Progress:
    task = bars.add_task(action, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


def _each(bars: rich.progress.Progress) -> BlobProgress:
    tasks: dict[str, Any] = {}

    def show(digest: str, done: int, total: int) -> None:
        if digest not in tasks:
            tasks[digest] = bars.add_task(f"  {short(digest)}", total=total)
        bars.update(tasks[digest], completed=done, visible=done < total)

    return show


# Commands


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_examples("cachedb import app.tar", "cachedb ls", "docker save app:1 | cachedb import -"),
)
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    type=click.Path(),
    envvar="CACHEDB_DIR",
    help="The cache directory.  [default: $CACHEDB_DIR, else the user's cache directory]",
)
@click.option(
    "--wait",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    envvar="CACHEDB_WAIT",
    help="How long to wait for another process; inf for no limit.  [default: $CACHEDB_WAIT, else 60]",
)
@click.option("--trust", is_flag=True, help="Write to a cache of another user, though it is not shared.")
@click.option("--verbose", is_flag=True, help="Say on stderr what is being done.")
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli(directory: str | None, wait: float | None, trust: bool, verbose: bool) -> None:
    """Keep container images in a local cache that many processes share.

    Exit codes: 0 done; 1 failed, or problems found; 2 wrong usage; 3 not in the cache.
    """
    if wait is not None:
        os.environ["CACHEDB_WAIT"] = f"{wait:g}"  # of all that this process begins, too
    from cachedb.cli.log import show_log

    show_log(verbose=verbose)
    if trust:
        os.environ["CACHEDB_TRUST"] = "1"  # for the commands that this one runs, too


@cli.command(epilog=_examples("cachedb init", "cachedb --dir /srv/cache init --shared=builders"))
@click.option(
    "--shared",
    metavar="[GROUP]",
    is_flag=False,
    flag_value="",
    help="Let a group of users write to the cache, too.  [default: your own group]",
)
def init(shared: str | None) -> None:
    """Make a cache, and share it with a group if asked to.

    Every other command makes the cache as well, for its user alone. A cache that is there is kept as it is. Only the
    owner can share a cache, with a group that he is a member of.
    """
    with _opened() as cache:
        group = None if shared is None else cache.share(shared or None)
        click.echo(f"{cache.directory}" + (f" is shared with group {group}" if group else " is a cache"))


@cli.command(
    "import",
    epilog=_examples(
        "cachedb import app.tar",
        "cachedb import layout/ team/app:2",
        "cachedb import --link layout/",
        "docker save app:1 | cachedb import -",
    ),
)
@click.argument("source", type=click.Path())
@click.argument("name", required=False, type=_NAME)
@click.option("--link", is_flag=True, help="Make hard links to a layout's files; nobody may write to them then.")
@click.option(
    "--max-unpacked",
    metavar="SIZE",
    type=_Size(),
    help="Refuse what unpacks to more.  [default: $CACHEDB_MAX_UNPACKED, else 64GiB, and 100 times its size]",
)
@_format
@_quiet("the images' names")
def import_(source: str, name: str | None, link: bool, max_unpacked: int | None, form: str, quiet: bool) -> None:
    """Import the images of an archive, under their names in it.

    SOURCE is a docker-archive or an OCI archive, compressed or not, an OCI image layout folder, or - for stdin.
    NAME is instead of the name in the archive, where it holds one image.
    """
    opened: str | IO[bytes] = source
    if source == "-":
        opened = _stdin()
    with _opened() as cache, _progress("importing", quiet=quiet) as progress:
        found = cache.cache_from_tar(
            opened,  # type: ignore[arg-type]
            name,
            link=link,
            max_unpacked=max_unpacked,
            progress=progress,
        )
    _print_images(found, form, quiet=quiet)


@cli.command(
    epilog=_examples(
        "cachedb pull alpine:3.20",
        "cachedb pull --platform linux/arm64 ghcr.io/team/app:1",
        "cachedb pull --if-missing registry.example.org:5000/team/app:1",
        "cachedb pull --referrers ghcr.io/team/app:1",
    )
)
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=_NAME)
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Of an image that has several.  [default: the host's]")
@click.option("--all-platforms", is_flag=True, help="Bring all platforms of an image.")
@click.option("--if-missing", is_flag=True, help="Ask no registry for an image that is here and complete.")
@click.option("--allow-stale", is_flag=True, help="If the registry cannot be reached, take the image that is here.")
@click.option("--referrers", is_flag=True, help="Bring signatures, SBOMs and what else refers to the images, too.")
@_plain_http
@_authfile
@_format
@_quiet("the images' names")
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
                        _directory(),
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
            cache = opened.enter_context(_opened())
            for source in sources:
                with _transfer(f"pulling {source.name}", quiet=quiet) as told:
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
            _print_images(found, form, quiet=quiet)


@cli.command(
    epilog=_examples(
        "cachedb push registry.example.org:5000/team/app:1",
        "cachedb push app:1 registry.example.org:5000/team/app:1",
        "cachedb push --all-tags app localhost:5000/app",
    )
)
@click.argument("name", type=_NAME)
@click.argument("target", required=False, type=_NAME)
@click.option("-a", "--all-tags", is_flag=True, help="Push all tags of NAME, a repository, to TARGET, another.")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Push one platform of an image that has several.")
@_plain_http
@_authfile
@_format
@_quiet("the pushed images' names, by digest,")
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
                there = opened.enter_context(Target(_directory(), Name.parse(target or name), **options))
                if not platform:
                    sys.setswitchinterval(_TURN)
                    there.begin(Name.parse(name))
            cache = opened.enter_context(_opened())
            told = opened.enter_context(_transfer(f"pushing {name}", quiet=quiet))
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


@cli.command(
    epilog=_examples("cachedb adopt ~/old/.cache", "cachedb adopt --link ~/old/.cache", "cachedb adopt --move .cache")
)
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--link", is_flag=True, help="Make hard links where the file system can; nothing may write to DIR then.")
@click.option("--move", is_flag=True, help="Delete from DIR what is in the cache, once all of it is.")
@_format
@_quiet("the images' names")
def adopt(directory: str, link: bool, move: bool, form: str, quiet: bool) -> None:
    """Take over a cache whose index is one index.json.

    DIR has manifests/REPOSITORY/REFERENCE, blobs/sha256/HEX and index.json, which need not be whole. What is good is
    adopted; the rest is listed, and the exit code is 1. DIR is not changed, unless by --move. A name that is another
    image's in this cache stays that image's. Doing it again changes nothing.
    """
    if link and move:
        raise click.UsageError("--link and --move exclude each other")
    with _opened() as cache, _progress("adopting", quiet=quiet) as progress:
        found = cache.adopt(directory, how="link" if link else "move" if move else "copy", progress=progress)
    if form == "json":
        left_out = [item._asdict() for item in found.left_out]
        print_json({**found._asdict(), "images": [image._asdict() for image in found.images], "left_out": left_out})
    elif quiet:
        _print_images(found.images, form, quiet=True)
    else:
        if found.left_out:
            rows = [
                (item.kind, item.name or "-", item.digest or (str(item.path) if item.path else "-"), item.detail)
                for item in found.left_out
            ]
            print_table(("LEFT OUT", "NAME", "WHAT", "DETAIL"), rows)
            click.echo()
        unused = f", {found.unused} of them used by no image" if found.unused else ""
        click.echo(f"images: {len(found.images)}; new blobs: {found.blobs}{unused}, {human(found.bytes)}")
    if found.index_damage and form != "json":
        click.echo(f"index.json was not used: {printable(found.index_damage)}", err=True)
    if found.left_out:
        click.get_current_context().exit(1)


@cli.command(
    epilog=_examples(
        "cachedb copy /mnt/backup/cachedb",
        "cachedb --dir /var/cache/images copy -q ./snapshot",
        "cachedb copy new/ --format json | jq .bytes",
    )
)
@click.argument("directory", metavar="DIR", type=click.Path())
@_format
@_quiet("the directory of the copy")
def copy(directory: str, form: str, quiet: bool) -> None:
    """Copy the cache into a new or empty directory as it is at one moment, also while other processes use it.

    Blobs come as reflinks where the file system can, else as hard links, else as verified copies. DIR becomes a cache
    at the end; after an interrupt, copy again. Holds are copied, quarantine/ and backups/ are not. rsync, cp and tar
    make no consistent copy of a cache in use.
    """
    with _opened(existing=True) as cache, _progress("copying", quiet=quiet) as progress:
        done = cache.copy(directory, progress=progress)
    if quiet:
        click.echo(bytes(done.directory))  # which need not be text
    elif form == "json":
        print_json(done._asdict())
    else:
        links = [f"{count} {kind}" for count, kind in ((done.reflinks, "reflinks"), (done.hard_links, "hard links"))]
        shared = " and ".join(link for link in links if not link.startswith("0 "))
        click.echo(
            f"images: {done.images}; blobs: {done.blobs}, {human(done.bytes)}" + (f"; {shared}" if shared else "")
        )


@cli.command(
    epilog=_examples(
        "cachedb export app:1 app.tar",
        "cachedb export app:1 - | docker load",
        "cachedb export --format oci-dir --link app:1 layout/",
    )
)
@click.argument("name", type=_NAME)
@click.argument("destination", metavar="DEST", type=click.Path())
@click.option(
    "--format",
    "form",
    type=click.Choice(_EXPORT_FORMATS),
    default="docker",
    show_default=True,
    help="docker: an OCI archive that `docker load` takes too.",
)
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Export one platform of an image that has several.")
@click.option("--link", is_flag=True, help="In an oci-dir, make hard links where the file system can.")
def export(name: str, destination: str, form: str, platform: str | None, link: bool) -> None:
    """Write an image to an archive or a folder; the same image gives the same bytes.

    DEST is a file, a folder for oci-dir, or - for stdout. An existing file is replaced when the new one is whole; to
    an existing image layout the image is added.
    """
    if link and form != "oci-dir":
        raise click.UsageError("--link is for --format oci-dir")
    if destination == "-" and form == "oci-dir":
        raise click.UsageError("an oci-dir is a folder, and cannot go to stdout: name the folder")
    opened: str | IO[bytes] = destination
    if destination == "-":
        if sys.stdout.isatty():
            raise click.UsageError("stdout is a terminal: redirect it, or name a file")
        opened = _stdout()
    with _opened() as cache, _progress("exporting") as progress:
        cache.export(name, opened, format=form, platform=platform, link=link, progress=progress)  # type: ignore[arg-type]


@cli.command(epilog=_examples("cachedb ls", "cachedb ls -q", "cachedb ls --format json"))
@_format
@_quiet("the images' names")
def ls(form: str, quiet: bool) -> None:
    """List the images in the cache."""
    with _opened() as cache:
        if quiet:
            click.echo("".join(f"{name}\n" for name in cache.list_names()), nl=False)
            return
        found = cache.list_manifests()
    _print_images(found, form, quiet=False)


@cli.command(epilog=_examples("cachedb show app:1", "cachedb show --format json app:1"))
@click.argument("name", type=_NAME)
@_format
@_quiet("the blobs' digests")
def show(name: str, form: str, quiet: bool) -> None:
    """Show an image and its blobs."""
    with _opened() as cache:
        image, blobs, labels = cache.get_image(name), cache.get_image_blobs(name), cache.get_labels(name)
        platforms = cache.get_platforms(name)
    if quiet:
        for blob in blobs:
            click.echo(blob.digest)
    elif form == "json":
        found = {"platforms": [platform._asdict() for platform in platforms]}
        print_json({**image._asdict(), "labels": labels, **found, "blobs": [blob._asdict() for blob in blobs]})
    else:
        _print_images([image], form, quiet=False)
        click.echo()
        _print_config(image, labels)
        _print_platforms(platforms, {blob.digest for blob in blobs if blob.stored})
        rows = (
            (
                str(blob.position),
                blob.role,
                short(blob.digest),
                human(blob.size),
                "stored" if blob.stored else "missing",
                blob.media_type,
                cut(blob.created_by or ""),
            )
            for blob in blobs
        )
        print_table(("#", "ROLE", "DIGEST", "SIZE", "STATE", "MEDIA TYPE", "CREATED BY"), rows, right=("#", "SIZE"))


def _print_config(image: ImageInfo, labels: dict[str, str]) -> None:
    created = f"{image.created:%Y-%m-%d %H:%M:%S} UTC" if image.created else ""
    said = [("platform", image.platform), ("built", created), ("author", image.author or "")]
    said += [("label", f"{key}={value}") for key, value in labels.items()]
    if said := [(what, value) for what, value in said if value]:
        print_table(("CONFIG", "SAYS"), said)
        click.echo()


def _print_platforms(platforms: list[PlatformInfo], here: Container[str]) -> None:
    rows = [
        (
            child.platform or "-",
            short(child.digest),
            "complete" if child.complete else "incomplete" if child.digest in here else "not here",
        )
        for child in platforms
    ]
    if rows:
        print_table(("PLATFORM", "DIGEST", "STATE"), rows)
        click.echo()


@cli.command(epilog=_examples("cachedb manifest app:1 | jq .layers"))
@click.argument("name", type=_NAME)
def manifest(name: str) -> None:
    """Print the exact bytes of an image's manifest or index."""
    stdout = _stdout()
    with _opened() as cache:
        data = cache.get_manifest(name)
    stdout.write(data)


@cli.command(epilog=_examples("cachedb exists app:1 || cachedb import app.tar"))
@click.argument("name", metavar="NAME|DIGEST", type=_NAME_OR_DIGEST)
def exists(name: str) -> None:
    """Say by the exit code whether an image is here with all its blobs, or a blob is: 0 if so, 3 if not."""
    with _opened() as cache:
        try:
            here = cache.has_blob(name)
        except InvalidDigest:
            here = cache.is_image_complete(name)
    if not here:
        click.get_current_context().exit(3)


@cli.command(epilog=_examples("cachedb tag app:1 app:stable"))
@click.argument("source", type=_NAME)
@click.argument("target", type=_NAME)
def tag(source: str, target: str) -> None:
    """Give an image a second name; what TARGET pointed to before is let go."""
    with _opened() as cache:
        cache.tag(source, target)


@cli.command(epilog=_examples("cachedb rm app:1", "cachedb rm --dry-run app:1 app:2"))
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=_NAME)
@_dry_run
@_format
@_quiet("the removed images' names")
def rm(names: tuple[str, ...], dry_run: bool, form: str, quiet: bool) -> None:
    """Remove images, all of them or none, and free what only they used."""
    with _opened() as cache:
        freed = cache.remove_manifest(*names, dry_run=dry_run)
    if quiet:
        for name in names:
            click.echo(name)
    else:
        _print_collected(freed, form, dry_run=dry_run)


@cli.command(epilog=_examples("cachedb gc", "cachedb gc --dry-run --format json"))
@_dry_run
@_format
def gc(dry_run: bool, form: str) -> None:
    """Free every blob that no image uses and no process works with."""
    with _opened() as cache:
        freed = cache.collect_garbage(dry_run=dry_run)
    _print_collected(freed, form, dry_run=dry_run)


@cli.command(epilog=_examples("cachedb verify", "cachedb verify --quick --format json", "cachedb verify --repair"))
@click.option("--quick", is_flag=True, help="Look at the presence and size of files only, not into them.")
@click.option("--repair", is_flag=True, help="Put right what can be; what is damaged is moved to quarantine/.")
@_format
@_quiet("the digests of damaged blobs")
def verify(quick: bool, repair: bool, form: str, quiet: bool) -> None:
    """Check that every file is what its name says, the index is sound, and the two agree.

    The exit code is 1 if there are problems, also if they were repaired. An image that lost a blob is incomplete
    until it is imported or pulled again. A lost or damaged index is rebuilt from what can be read of it, the newest
    backup, and the blobs.
    """
    with _opened(damaged=True) as cache, _progress("verifying", quiet=quiet) as progress:
        found = cache.verify(quick=quick, repair=repair, progress=progress)
    if quiet:
        for digest in dict.fromkeys(problem.digest for problem in found.problems if problem.digest):
            click.echo(digest)
    elif form == "json":
        problems = [problem._asdict() for problem in found.problems]
        print_json({"checked": found.checked, "problems": problems})
    else:
        rows = [
            (problem.kind, problem.digest or str(problem.path), problem.detail, problem.repair or "-")
            for problem in found.problems
        ]
        if rows:
            print_table(("KIND", "WHAT", "DETAIL", "REPAIR"), rows)
        files = f"{found.checked} file{'' if found.checked == 1 else 's'} checked"
        click.echo(f"{files}, {len(rows) or 'no'} problem{'' if len(rows) == 1 else 's'}")
    if found.problems:
        click.get_current_context().exit(1)


class _Duration(_Parameter):
    """A time such as 90s, 30m, 2h, 7d, or 1h30m, in seconds."""

    name = "duration"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        import re

        units = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
        if not re.fullmatch(r"(\d{1,9}[smhdw])+", value):
            self.fail(f"{value!r} is not a time such as 90s, 30m, 2h, 7d or 1h30m", param, ctx)
        return sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+)([smhdw])", value))


@cli.command(epilog=_examples("cachedb hold app:1 --for 2h", "cachedb hold app:1", "cachedb release app:1"))
@click.argument("names", metavar="NAME|DIGEST...", nargs=-1, required=True, type=_NAME_OR_DIGEST)
@click.option(
    "--for", "seconds", metavar="TIME", type=_Duration(), help="Such as 30m, 2h or 7d.  [default: until released]"
)
@_format
@_quiet("the holds' ids")
def hold(names: tuple[str, ...], seconds: float | None, form: str, quiet: bool) -> None:
    """Keep the blobs of images from collection, whatever becomes of the names.

    What the images are now is held. A hold lasts for a time, or until `cachedb release`; no process need live for it.
    """
    with _opened() as cache:
        made = cache.add_hold(*names, seconds=seconds)
    _print_holds(made, form, quiet=quiet)


@cli.command(epilog=_examples("cachedb holds", "cachedb release $(cachedb holds -q)"))
@_format
@_quiet("the holds' ids")
def holds(form: str, quiet: bool) -> None:
    """List the holds that keep blobs from collection."""
    with _opened() as cache:
        found = cache.list_holds()
    _print_holds(found, form, quiet=quiet)


@cli.command(epilog=_examples("cachedb release app:1", "cachedb release hold-3f2a90c1d4e5"))
@click.argument("names", metavar="HOLD|NAME|DIGEST...", nargs=-1, required=True, type=_Held())
def release(names: tuple[str, ...]) -> None:
    """End holds, all of them or none: single ones by their ids, or all that were taken on a name or digest.

    What nothing needs any more is freed by the next `cachedb gc`.
    """
    with _opened() as cache:
        cache.release_hold(*names)


@cli.command(
    context_settings={"allow_interspersed_args": False},
    epilog=_examples("cachedb produce app:1 -- sh -c 'docker save app:1 | cachedb import -'"),
)
@click.argument("name", type=_NAME)
@click.argument("command", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def produce(name: str, command: tuple[str, ...]) -> None:
    """Run a command that brings an image into the cache, unless it is there and complete.

    Of all who want the image at once on this host one runs its command, and the others wait; if that fails or is
    killed, the next one's turn has come. The command has the cache directory in CACHEDB_DIR. The exit code is the
    command's.
    """
    import subprocess

    from cachedb.oci.names import Name

    command = command[command[0] == "--" :]
    if not command:
        raise click.UsageError("name the command to run")
    making = os.environ.get("CACHEDB_PRODUCING", "")
    wanted = f"\n{Name.parse(name)} in {os.path.realpath(_directory())}\n"  # however both were written
    if wanted in making:  # as text: a directory may have a newline in its name
        raise CacheError(f"{name} is being made by a command that has begun this one, which would wait for itself")
    process: subprocess.Popen[bytes] | None = None

    def is_working() -> bool:
        """Return whether the command is not stopped, as by ^Z."""
        if process is None or process.returncode is not None:
            return True
        with suppress(ChildProcessError):
            return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is None
        return True

    with _opened() as cache, cache.producing(name, is_working=is_working) as image:
        if image is not None:
            return
        environment = {
            **os.environ,
            "CACHEDB_DIR": str(cache.directory),
            "CACHEDB_PRODUCING": making + wanted,
        }
        try:
            process = subprocess.Popen(command, env=environment)  # noqa: S603 - it is the user's
        except OSError as error:
            raise click.UsageError(f"cannot run {command[0]!r}: {error.strerror}") from error
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            raise
        if code:
            click.get_current_context().exit(code if code > 0 else 128 - code)
        if not cache.is_image_complete(name):
            raise CacheError(f"the command ended well, and {name} is not in the cache, or is incomplete")


@cli.command(epilog=_examples("cachedb ps", "cachedb ps --format json | jq '.[].pid'"))
@_format
def ps(form: str) -> None:
    """List the processes that work with the cache: who writes, who waits, and what is downloaded or produced.

    A process that only reads is not listed.
    """
    with _opened() as cache:
        found = cache.sessions()
    if form == "json":
        print_json([{**session._asdict(), "doing": [one._asdict() for one in session.doing]} for session in found])
        return
    rows = []
    for session in found:
        said = [(ago(one.since), f"{one.kind} {one.name}".rstrip()) for one in session.doing]
        for since, doing in said or [(ago(session.started_at), "idle")]:
            rows.append((str(session.pid or "?"), session.user or "?", since, doing, session.command or "?"))
    print_table(("PID", "USER", "SINCE", "DOING", "COMMAND"), rows, right=("PID",))


@cli.command(epilog=_examples("cachedb stats", "cachedb stats --format json | jq .total_size"))
@_format
def stats(form: str) -> None:
    """Print the cache's totals."""
    with _opened() as cache:
        totals = cache.get_stats()
    if form == "json":
        print_json(totals._asdict())
        return
    rows = [
        ("images", str(totals.manifest_count)),
        ("  incomplete", str(totals.incomplete_count)),
        ("blobs", str(totals.blob_count)),
        ("  reclaimable", str(totals.reclaimable_blobs)),
        ("size", human(totals.total_size)),
        ("  reclaimable", human(totals.reclaimable_size)),
    ]
    print_table(("", "TOTAL"), rows, right=("TOTAL",))


def _parameters(_context: click.Context, _option: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


_row_format = click.option(
    "--format",
    "form",
    type=click.Choice(ROW_FORMATS),
    default="table",
    show_default=True,
    help="How to print the rows; all but table and json a line each, as they come. In csv and tsv a text that a "
    "spreadsheet would take for a formula has a ' in front.",
)
_timeout = click.option(
    "--timeout", "seconds", metavar="TIME", type=_Duration(), help="Stop it after a time such as 30s or 5m."
)
_values = click.option(
    "-p", "parameters", metavar="NAME=VALUE", multiple=True, callback=_parameters, help="A value for :NAME; repeatable."
)


@cli.command(
    epilog=_examples(
        "cachedb sql",
        "cachedb sql 'SELECT name, human(unique_size) FROM image_usage ORDER BY unique_size DESC LIMIT 5'",
        "cachedb sql --format csv -p days=30 'SELECT name FROM image_ages WHERE unused_days > :days'",
    )
)
@click.argument("query", required=False)
@click.option("--file", type=click.Path(), help="Read the query from a file, or - for stdin.")
@click.option("--schema", is_flag=True, help="Print the SQL of the tables, indexes and views.")
@_values
@_row_format
@_timeout
def sql(
    query: str | None, file: str | None, schema: bool, parameters: dict[str, str], form: str, seconds: int | None
) -> None:
    """Ask the index a question in SQL; without one, list the views that there are to ask.

    QUERY is SQLite's SQL, with the functions human(bytes) and ago(time) besides; - reads it from stdin. Nothing can be
    changed by it, no writer waits for it, and it runs at the lowest priority. The columns of each view
    are in the README's SQL reference.
    """
    from cachedb.reports.named import number

    if sum(map(bool, (query, file, schema))) > 1:
        raise click.UsageError("give a query, or --file, or --schema")
    if schema:
        query = "SELECT sql || ';' AS sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type <> 'table', name"
        with _opened(existing=True) as cache, cache.sql(query) as found:
            for (definition,) in found.rows:
                click.echo(definition)
        return
    if query == "-" or file is not None:
        query = _text_of("-" if file is None else file)
    if query is None:
        with _opened(existing=True) as cache:
            views = cache.list_views()
        if form == "table":
            print_table(("VIEW", "WHAT IT HAS"), [(view.name, view.description) for view in views])
        else:
            rows = [(view.name, view.description, " ".join(view.columns)) for view in views]
            print_rows(("view", "description", "columns"), rows, form)
        return
    _ask(query, {name: number(value) for name, value in parameters.items()}, form, seconds)


def _text_of(file: str) -> str:
    if file == "-" and "stdin" in _closed:
        raise click.UsageError("stdin is closed: send the query to it, or name a file")
    try:
        with open(0 if file == "-" else file, encoding="utf-8-sig") as opened:  # editors may begin it with a mark
            return opened.read()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise click.UsageError(f"cannot read {file!r}: {reason}") from error


@contextmanager
def _giving_way() -> Iterator[None]:
    """A block that runs when those who work with the cache leave a processor free.

    It is for what reads, in a cache that is open: opening it may take the write lock, and who has that must not wait.
    """
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        os.nice(19)
    try:
        yield
    finally:
        # The last to close an index writes its WAL back, under a lock. Not everybody may have the priority back.
        with suppress(OSError):
            os.sched_setscheduler(0, policy, parameter)


def _ask(query: str, parameters: dict[str, Any], form: str, seconds: int | None, *, sizes: bool = False) -> None:
    try:
        with (
            _opened(existing=True) as cache,
            _giving_way(),
            cache.sql(query, parameters, timeout=seconds, stream=True) as found,
        ):
            print_rows(found.columns, found.rows, form, sizes=sizes)
            sys.stdout.flush()
    except InvalidQuery as error:
        if _signals:  # SQLite makes an error of its own of what a signal raises in `human` or `ago`
            raise KeyboardInterrupt from None
        if error.place is None:
            raise
        start, stop = error.place
        line = query.count("\n", 0, start)
        text = query.splitlines()[line] if query else ""
        column = start - (query.rfind("\n", 0, start) + 1)
        marked = f"  {printable(text)}\n  {' ' * len(printable(text[:column]))}{'^' * max(stop - start, 1)}"
        print(f"cachedb: {printable(str(error))}, in line {line + 1}:\n{marked}", file=sys.stderr)
        click.get_current_context().exit(2)


@cli.command(
    epilog=_examples(
        "cachedb report --list",
        "cachedb report --html cache.html",
        "cachedb report largest-unique",
        "cachedb report not-used -p days=90 --format json",
        "cachedb report freed-by -p names='app:1 app:2'",
    )
)
@click.argument("name", required=False)
@click.option("--list", "list_", is_flag=True, help="List the reports, with their parameters.")
@click.option("--html", "file", metavar="FILE", type=click.Path(), help="Write a page that shows the whole cache.")
@_values
@_row_format
@_timeout
def report(
    name: str | None, list_: bool, file: str | None, parameters: dict[str, str], form: str, seconds: int | None
) -> None:
    """Answer a question that has a name; or show all of the cache on one page, which needs no network.

    A report is a file of SQL, NAME.sql. Your own are in the folder of CACHEDB_REPORTS, by default reports/ in
    cachedb's folder of the user's configuration, and go before those of the same name. A file begins with comments:
    lines that say what it answers, and for each :parameter of its query a line "-- :parameter", or one with its
    default, "-- :parameter default". A table has sizes for people, all else bytes. It runs at the lowest priority.
    """
    if sum(map(bool, (name, list_, file))) != 1:
        raise click.UsageError("name a report, or use --list, or --html")
    if not name and (parameters or seconds is not None):
        raise click.UsageError("-p and --timeout are for a report that has a name")
    if file:
        _write_page(file)
    elif list_:
        _list_reports(form)
    else:
        from cachedb.reports.named import load

        chosen = load(name or "")
        _ask(chosen.query, chosen.values(parameters), form, seconds, sizes=True)


def _write_page(file: str) -> None:
    if file == "-":
        _stdout()  # before the work is done: it may be closed
    with _opened(existing=True) as cache, _giving_way():
        page = cache.get_html_report()
    try:
        if file != "-" and (not os.path.exists(file) or os.path.isfile(file)):
            _replace(file, page)
        else:  # a device, a fifo or stdout is written to, and not replaced
            with click.open_file(file, "w", encoding="utf-8") as opened:
                opened.write(page)
    except OSError as error:
        error.filename = None  # it may be that of the file which was to replace it
        raise click.UsageError(f"cannot write {file!r}: {explain(error)}") from error


def _list_reports(form: str) -> None:
    from cachedb.reports.named import reports

    found = reports()
    if form == "table":
        said = [(one.name, " ".join(one.wanted()), one.description) for one in found]
        print_table(("REPORT", "PARAMETERS", "WHAT IT SAYS"), said)
        return
    nested = form in ("json", "ndjson")
    rows = [
        (one.name, one.description, one.parameters if nested else " ".join(one.wanted()), one.path) for one in found
    ]
    print_rows(("report", "description", "parameters", "path"), rows, form)


def _replace(file: str, text: str) -> None:
    """Write a file whole, or leave what is there as it is."""
    from pathlib import Path

    from cachedb.disk.durable import atomic_file, remove_leftovers

    path = Path(os.path.realpath(file))
    remove_leftovers(path.parent)
    with atomic_file(path) as new:
        rest = memoryview(text.encode())
        while rest:
            rest = rest[new.write(rest) :]
        with suppress(FileNotFoundError):
            os.fchmod(new.fileno(), path.stat().st_mode & 0o777)


@cli.command(epilog=_examples("cachedb df", "cachedb df -v", "cachedb df --format json | jq .reclaimable.size"))
@click.option("-v", "--verbose", is_flag=True, help="List the images too, with what is theirs alone.")
@_format
def df(verbose: bool, form: str) -> None:
    """Show what the cache takes on the disk, true to the byte.

    A blob is unique if one image has it, shared if several have, held if none has and a hold or a process keeps it,
    and reclaimable by `cachedb gc` otherwise.
    """
    from datetime import datetime

    columns = ("name", "size", "unique_size", "shared_size", "freed_size", "complete", "last_used_at")
    with _opened(existing=True) as cache:
        found = cache.get_usage()
        left = cache.get_leftovers()
        images: list[Any] = []
        if verbose:
            with cache.sql(f"SELECT {', '.join(columns)} FROM image_usage ORDER BY unique_size DESC, name") as answer:  # noqa: S608
                images = list(answer.rows)
    if form == "json":
        shares = {name: value._asdict() for name, value in found._asdict().items() if hasattr(value, "_asdict")}
        listed = {"image_usage": [dict(zip(columns, row, strict=True)) for row in images]} if verbose else {}
        print_json({**found._asdict(), **shares, "leftovers": [leftover._asdict() for leftover in left], **listed})
        return
    images_said = f"{found.images}, {found.incomplete} incomplete" if found.incomplete else str(found.images)
    rows = [("images", images_said, "")]
    for name in ("stored", "unique", "shared", "held", "reclaimable"):
        share = getattr(found, name)
        rows.append((f"  {name}" if name != "stored" else "blobs", str(share.blobs), human(share.size)))
    rows += [("saved by sharing", "", human(found.saved_size)), ("index", "", human(found.index_size))]
    others = {**found.folder_sizes, "reserve": found.reserve_size}
    rows += [(name, "", human(size)) for name, size in others.items() if size]
    if left:
        rows.append(("cannot be cleaned up", str(len(left)), ""))
        click.echo("cachedb: `cachedb verify` names what dead processes left and cannot be cleaned up", err=True)
    print_table(("", "COUNT", "SIZE"), rows, right=("COUNT", "SIZE"))
    if verbose:
        click.echo()
        listing = [
            (
                name,
                *map(human, sizes),
                "complete" if complete else "incomplete",
                ago(datetime.fromisoformat(last_used_at)),
            )
            for name, *sizes, complete, last_used_at in images
        ]
        headings = ("NAME", "SIZE", "UNIQUE", "SHARED", "FREED", "STATE", "LAST USED")
        print_table(headings, listing, right=headings[1:5])


@cli.group()
def db() -> None:
    """Look at the index's schema, upgrade it, back it up and restore it."""


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a bar for each thing that is done, on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


@db.command("current", epilog=_examples("cachedb db current", "cachedb db current --format json | jq -r .revision"))
@_format
def db_current(form: str) -> None:
    """Say which schema the cache has, and which one this release works with."""
    from cachedb.index import schema

    found = schema.current(_directory())
    if form == "json":
        print_json(found._asdict())
    elif found.revision is None:
        click.echo(f"no cache yet; this release makes one with schema {found.newest}")
    elif found.pending:
        click.echo(f"{found.revision}; the configs of {found.pending} images are to be read: run `cachedb db upgrade`")
    elif found.revision == found.newest:
        click.echo(f"{found.revision}, the newest")
    elif found.revision < found.newest:
        click.echo(f"{found.revision}; this release works with {found.newest}: run `cachedb db upgrade`")
    else:
        can = "and can work with this one" if found.usable else "at most: use a newer release"
        click.echo(f"{found.revision}; this release knows {found.newest} {can}")


@db.command("history", epilog=_examples("cachedb db history"))
@_format
def db_history(form: str) -> None:
    """List the schemas that this release knows, the newest first.

    OLDEST is the oldest schema whose releases can still read and write a cache after the upgrade.
    """
    from cachedb.index import schema

    found = schema.history(_directory())
    if form == "json":
        print_json([revision._asdict() for revision in found])
        return
    rows = [
        (revision.revision, revision.oldest, "current" if revision.current else "", revision.message.splitlines()[0])
        for revision in found
    ]
    print_table(("REVISION", "OLDEST", "", "WHAT IT BRINGS"), rows)


def _print_unread(done: Change | Restored, form: str) -> None:
    """Print all of it as JSON, or the configs that were skipped as lines."""
    if form == "json":
        unread = [{**config._asdict(), "name": str(config.name)} for config in done.unread]
        print_json({**done._asdict(), "unread": unread})
        return
    for name, digest, detail in done.unread:
        click.echo(f"skipped the config {digest} of {name}: {printable(detail)}", err=True)


def _print_change(change: Change, form: str) -> None:
    _print_unread(change, form)
    if form == "json":
        return
    if change.backup is None:
        click.echo(f"the cache has schema {change.after} already")
    else:
        click.echo(f"from schema {change.before} to {change.after}; the index as it was is {change.backup}")


@db.command("upgrade", epilog=_examples("cachedb db upgrade", "cachedb db upgrade 0002"))
@click.argument("revision", default="head")
@_format
def db_upgrade(revision: str, form: str) -> None:
    """Bring the cache to a newer schema, the newest by default, also while other processes use it.

    The index is backed up first. A config that cannot be read is skipped and reported.
    """
    from cachedb.index import schema

    with _stages() as progress:
        change = schema.upgrade(_directory(), revision, progress=progress)
    _print_change(change, form)


@db.command(
    "downgrade",
    context_settings={"ignore_unknown_options": True},
    epilog=_examples("cachedb db downgrade 0002", "cachedb db downgrade -1"),
)
@click.argument("revision")
@_format
def db_downgrade(revision: str, form: str) -> None:
    """Take the cache back to an older schema, for an older release; this one refuses it then.

    The index is backed up first.
    """
    from cachedb.index import schema

    with _stages() as progress:
        change = schema.downgrade(_directory(), revision, progress=progress)
    _print_change(change, form)


@db.command("check", epilog=_examples("cachedb db check", "cachedb db check --format json"))
@_format
def db_check(form: str) -> None:
    """Compare the database with what this release would make: tables, columns, indexes, triggers, views.

    The exit code is 1 if there is a difference. `cachedb verify` looks at what is in the tables.
    """
    from cachedb.index import schema

    found = schema.check(_directory())
    if form == "json":
        print_json([drift._asdict() for drift in found])
    elif found:
        print_table(("KIND", "NAME", "DETAIL"), found)
    else:
        click.echo("no differences")
    if found:
        click.get_current_context().exit(1)


@db.command("backup", epilog=_examples("cachedb db backup", "cachedb db backup /mnt/usb/index.db"))
@click.argument("file", required=False, type=click.Path())
@_format
def db_backup(file: str | None, form: str) -> None:
    """Copy the index, also while other processes write to it, and print where the copy is.

    Without FILE it goes to the folder backups/ of the cache, where `cachedb verify --repair` looks for one, and stays.
    Blobs are not copied.
    """
    from pathlib import Path

    from cachedb.index import schema

    if file == "":
        raise click.UsageError("the name of the file is empty")
    if file and os.path.lexists(file):
        raise click.UsageError(f"{file!r} exists: name another file")
    with _stages() as progress:
        path = schema.back_up(_directory(), Path(file).absolute() if file else None, progress=progress)
    if form == "json":
        print_json({"path": path, "size": path.stat().st_size})
    else:
        click.echo(bytes(path))  # which need not be text


@db.command("restore", epilog=_examples("cachedb db restore ~/.cache/cachedb/backups/000003-0003.db"))
@click.argument("file", type=click.Path())
@_format
def db_restore(file: str, form: str) -> None:
    """Put a backup in the place of the index, at the newest schema, also while other processes use the cache.

    Images are as they were then, as far as their blobs are still there. What came since and no image of the backup
    uses is freed by the next `cachedb gc`. The index that was there is kept in quarantine/.
    """
    from pathlib import Path

    from cachedb.operations.rebuild import restore

    found = restore(_directory(), Path(file).absolute())
    _print_unread(found, form)
    if form == "json":
        return
    click.echo(f"images: {found.images}, incomplete: {found.incomplete}; blobs that no image uses: {found.unused}")
    if found.old:
        click.echo(f"the index as it was is {found.old}")


@cli.group()
def blob() -> None:
    """Store and read single blobs."""


@blob.command(
    "add",
    epilog=_examples("cachedb blob add layer.tar", "cachedb blob add --digest sha256:9f86d081884c... layer.tar"),
)
@click.argument("file", type=click.Path())
@click.option("--digest", help="The digest that the content must have.  [default: computed]")
@click.option(
    "--algorithm", type=click.Choice(["sha256", "sha512"]), default="sha256", help="To compute the digest with."
)
def blob_add(file: str, digest: str | None, algorithm: str) -> None:
    """Store a file, or - for stdin, and print its digest.

    A blob that no image uses is freed by the next `cachedb gc`.
    """
    data: str | IO[bytes] = _stdin() if file == "-" else file
    with _opened() as cache:
        if digest:
            click.echo(cache.save_blob(digest, data))  # type: ignore[arg-type]
        else:
            click.echo(cache.add_blob(data, algorithm=algorithm))  # type: ignore[arg-type]


@blob.command("cat", epilog=_examples("cachedb blob cat sha256:9f86d081884c... | tar t"))
@click.argument("digest", type=_DIGEST)
def blob_cat(digest: str) -> None:
    """Write a blob's content to stdout."""
    import shutil

    stdout = _stdout()
    with _opened() as cache, cache.open_blob(digest) as file:
        shutil.copyfileobj(file, stdout, 1024 * 1024)


@blob.command("path", epilog=_examples('tar tf "$(cachedb blob path sha256:9f86d081884c...)"'))
@click.argument("digest", type=_DIGEST)
def blob_path(digest: str) -> None:
    """Print the path of a blob's file, to be read only; it is valid until the blob is collected."""
    with _opened() as cache:
        click.echo(str(cache.get_blob_path(digest)))


@cli.command(
    epilog=_examples(
        'eval "$(cachedb completion bash)"',
        'eval "$(cachedb completion zsh)"',
        "cachedb completion fish > ~/.config/fish/completions/cachedb.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell: of commands, options, names and digests."""
    from cachedb.cli.candidates import script

    click.echo(script(cli, shell, _COMPLETE))
