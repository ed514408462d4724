"""Start the command line: set up streams and signals, run a command, and turn errors into exit codes.

This module imports little except click. A command imports the rest when it runs, so `--help` stays fast.
"""

from __future__ import annotations

import gc as gc_
import io
import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

import click

from cachedb import __version__
from cachedb.cli.options import COMPLETE_VARIABLE, format_examples
from cachedb.cli.other_tools import ALIASES, OtherCommand, check_arguments, explain_option, translate
from cachedb.cli.signals import exit_terminated, finished, raise_interrupt
from cachedb.cli.spelling import SpellingGroup
from cachedb.cli.streams import discard_output, open_standard_files
from cachedb.errors import (
    CacheError,
    InvalidDigest,
    InvalidName,
    InvalidPolicy,
    InvalidQuery,
    InvalidRevision,
    NotInCache,
    explain,
)
from cachedb.text import printable

__all__ = ["cli", "main"]


def main() -> NoReturn:
    """Run the command line and exit; an error is one line on stderr.

    The exit codes are listed in docs/reference/exit-codes.md.
    """
    import signal

    finished.clear()
    open_standard_files()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters the user's encoding lacks
    # Importing SQLAlchemy creates many objects and no garbage, so Python's garbage collector would only cost time.
    gc_.disable()
    signal.signal(signal.SIGTERM, exit_terminated)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # `nohup` ignores it; keep that
        signal.signal(signal.SIGHUP, exit_terminated)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it; keep that
        signal.signal(signal.SIGINT, raise_interrupt)
    try:
        if COMPLETE_VARIABLE in os.environ:
            import cachedb.cli.shell_completion  # noqa: F401 - registers the bash script with click
        code = cli.main(prog_name="cachedb", standalone_mode=False) or 0
        sys.stdout.flush()
        sys.exit(code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        _fail(_explain_usage(error), 2)
    except click.ClickException as error:
        _fail(error.format_message(), 1)
    except NotInCache as error:
        _fail(str(error), 3)
    except (InvalidName, InvalidDigest, InvalidRevision, InvalidQuery, InvalidPolicy) as error:
        _fail(str(error), 2)
    except CacheError as error:
        _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        discard_output(1)  # the reader of our output is gone
        sys.exit(1)
    except MemoryError:
        _fail("out of memory: for a query, --format csv needs less", 1)
    except OSError as error:
        discard_output(1)
        _fail(f"cannot print the result: {explain(error)}", 1)
    finally:
        finished.append(True)


def _explain_usage(error: click.UsageError) -> str:
    if isinstance(error, OtherCommand):
        return error.format_message()
    if isinstance(error, click.NoSuchOption) and (advice := explain_option(error)):
        return f"no such option {error.option_name!r}: {advice}"
    command = error.ctx.command_path if error.ctx else "cachedb"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"


def _fail(message: str, code: int) -> NoReturn:
    try:
        print(f"cachedb: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        discard_output(2)  # the exit code still reports the failure
    sys.exit(code)


# Commands


_SECTIONS: dict[str, dict[str, str]] = {
    "Images": {
        "ls": "images",
        "show": "images",
        "manifest": "images",
        "exists": "images",
        "tag": "images",
        "pin": "images",
        "unpin": "images",
        "rm": "images",
    },
    "Archives": {"import": "archives", "export": "archives"},
    "Registries": {
        "pull": "registries",
        "push": "registries",
        "inspect": "remote",
        "digest": "remote",
        "tags": "remote",
    },
    "Queries": {"sql": "queries", "report": "queries", "stats": "maintenance", "df": "maintenance"},
    "Holds": {"hold": "holds", "holds": "holds", "release": "holds", "produce": "holds"},
    "Maintenance": {
        "init": "maintenance",
        "gc": "maintenance",
        "prune": "prune",
        "policy": "policy",
        "verify": "maintenance",
        "adopt": "maintenance",
        "copy": "maintenance",
        "ps": "maintenance",
        "systemd": "systemd",
        "blob": "blob",
        "completion": "completion",
        "help": "help",
    },
    "Schema": {"db": "db"},
}
"""The sections of `cachedb --help`, their commands, and the module of each command."""


_FUNCTIONS = {"import": "import_", "help": "help_"}
"""The functions whose name is not that of their command."""


class _Commands(SpellingGroup):
    """A group that imports the module of a command on first use, and knows the words of other tools."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in _SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for section in _SECTIONS.values():
            if module := section.get(cmd_name):
                name = _FUNCTIONS.get(cmd_name, cmd_name)
                command: click.Command = getattr(import_module(f"cachedb.cli.{module}"), name)
                return command
        if cmd_name in ALIASES:
            from cachedb.cli.aliases import HIDDEN_COMMANDS

            return HIDDEN_COMMANDS[cmd_name]
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if ctx.resilient_parsing:  # for completion
            with suppress(OtherCommand):
                args = translate(args)
            return super().resolve_command(ctx, args)
        args = translate(args)
        if command := self.get_command(ctx, args[0]):
            check_arguments(command, args)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in _SECTIONS.items():
            commands = {name: self.get_command(ctx, name) for name in section}
            with formatter.section(title):
                formatter.write_dl(
                    [(name, command.get_short_help_str(200)) for name, command in commands.items() if command]
                )


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=format_examples("cachedb import app.tar", "cachedb ls", "docker save app:1 | cachedb import -"),
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
    help="How long to wait for another process; inf waits forever.  [default: $CACHEDB_WAIT, else 60]",
)
@click.option("--trust", is_flag=True, help="Write to another user's cache even if it is not shared.")
@click.option("--verbose", is_flag=True, help="Print on stderr what the command does.")
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli(directory: str | None, wait: float | None, trust: bool, verbose: bool) -> None:
    """Keep container images in a local cache that many processes share.

    Exit codes: 0 done; 1 failed, or problems found; 2 wrong usage; 3 not in the cache.
    """
    if wait is not None:
        os.environ["CACHEDB_WAIT"] = f"{wait:g}"  # child processes wait as long
    from cachedb.cli.log import show_log

    show_log(verbose=verbose)
    if trust:
        os.environ["CACHEDB_TRUST"] = "1"  # child processes trust it too
