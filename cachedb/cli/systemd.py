"""Define the commands that let systemd run `cachedb prune`: systemd install, systemd uninstall."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import click

from cachedb.cli.context import cache_directory
from cachedb.cli.options import format_examples
from cachedb.cli.spelling import SpellingGroup
from cachedb.cli.streams import write_text
from cachedb.disk.layout import POLICY_FILE
from cachedb.errors import CacheError, os_errors

__all__ = ["systemd"]


_SERVICE, _TIMER = "cachedb-prune.service", "cachedb-prune.timer"
_MARK = "# Written by `cachedb systemd install`"
_SYSTEM_FOLDER = "/etc/systemd/system"
_BOOTED = "/run/systemd/system"  # exists while systemd runs as the first process


def _scope_options(command: Callable[..., Any]) -> Callable[..., Any]:
    user = click.option("--user", "is_user", is_flag=True, help="Use the systemd of your user.")
    system = click.option("--system", "is_system", is_flag=True, help="Use the systemd of the host; needs root.")
    return user(system(command))


@click.group(cls=SpellingGroup)
def systemd() -> None:
    """Let systemd run `cachedb prune` every hour."""


@systemd.command(
    "install", epilog=format_examples("cachedb systemd install --user", "cachedb systemd install --system --dry-run")
)
@_scope_options
@click.option("--dry-run", is_flag=True, help="Write nothing; print the files.")
def systemd_install(is_user: bool, is_system: bool, dry_run: bool) -> None:
    """Write a service and a timer that prune the cache every hour, and start the timer.

    The service runs this cachedb on this cache, at a low priority. It does nothing while the cache has no policy.
    With --system, it runs as the user who owns the cache. Without a running systemd, the commands to run are printed.
    """
    folder = _choose_folder(is_user=is_user, is_system=is_system)
    texts = _render(cache_directory(), is_system=is_system)
    if dry_run:
        click.echo("\n".join(f"# {folder / name}\n{text}" for name, text in texts.items()), nl=False)
        return
    for name in texts:
        _check_ours(folder / name)
    with os_errors("write a unit of systemd"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(str(folder / name), text)
        os.chmod(folder / name, 0o644)
        click.echo(f"wrote {folder / name}")
    _run_systemctl(["daemon-reload"], ["enable", "--now", _TIMER], is_user=is_user)


@systemd.command("uninstall", epilog=format_examples("cachedb systemd uninstall --user"))
@_scope_options
def systemd_uninstall(is_user: bool, is_system: bool) -> None:
    """Stop the timer, and remove the files that `cachedb systemd install` wrote."""
    folder = _choose_folder(is_user=is_user, is_system=is_system)
    found = [folder / name for name in (_TIMER, _SERVICE) if os.path.lexists(folder / name)]
    for path in found:
        _check_ours(path)
    if not found:
        click.echo(f"there is nothing to remove in {folder}")
        return
    _run_systemctl(["disable", "--now", _TIMER], is_user=is_user)
    for path in found:
        with os_errors("remove a unit of systemd"):
            path.unlink()
        click.echo(f"removed {path}")
    _run_systemctl(["daemon-reload"], is_user=is_user)


def _choose_folder(*, is_user: bool, is_system: bool) -> Path:
    """Return the folder of the units.

    Raises:
        click.UsageError: if not exactly one of the two is given.
    """
    if is_user == is_system:
        raise click.UsageError("give one of --user and --system")
    if is_system:
        return Path(_SYSTEM_FOLDER)
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser().absolute() / "systemd" / "user"


def _check_ours(path: Path) -> None:
    """Raise if a file is there that `cachedb systemd install` has not written."""
    with os_errors("read a unit of systemd"):
        try:
            with open(path, encoding="utf-8", errors="replace", opener=_open_without_waiting) as file:
                is_ours = file.readline().startswith(_MARK)
        except FileNotFoundError:
            is_ours = not path.is_symlink()
    if not is_ours:
        raise CacheError(f"{str(path)!r} was not written by cachedb: remove it, or edit it yourself")


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe would otherwise wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _render(directory: Path, *, is_system: bool) -> dict[str, str]:
    """Return the text of each unit by its name."""
    program, *arguments = _find_command()
    # systemd expands variables in arguments, but not in the path of the program.
    command = " ".join([_quote(program), *(_quote(argument).replace("$", "$$") for argument in arguments)])
    values = {
        "@CACHE@": _escape_percent(str(directory)),
        "@POLICY@": _escape_percent(str(directory / POLICY_FILE)),
        "@ENVIRONMENT@": _quote(f"CACHEDB_DIR={directory}"),
        "@COMMAND@": command,
    }
    service, timer = (files("cachedb.cli").joinpath("units", name).read_text("utf-8") for name in (_SERVICE, _TIMER))
    if is_system and (owner := _find_owner(directory)):
        service = service.replace("[Service]\n", f"[Service]\nUser={owner}\n")
    service = re.sub("@[A-Z]+@", lambda found: values[found[0]], service)  # in one pass: a path may contain @USER@
    return {_SERVICE: service, _TIMER: timer}


def _find_command() -> list[str]:
    """Return the program that runs now, with its absolute path."""
    program = shutil.which(sys.argv[0])
    if program is None or os.path.basename(program) == "__main__.py":
        return [os.path.abspath(sys.executable), "-m", "cachedb"]
    return [os.path.abspath(program)]


def _find_owner(directory: Path) -> str | None:
    """Return the user who owns a cache, by name or number; None for root, or if there is no cache."""
    import pwd

    try:
        number = directory.stat().st_uid
    except OSError:
        return None
    try:
        return pwd.getpwuid(number).pw_name if number else None
    except KeyError:
        return str(number)


def _escape_percent(text: str) -> str:
    """Escape each % in a text, which has a meaning for systemd.

    Raises:
        CacheError: if it has characters that no line of a unit can have.
    """
    if not text.isprintable() or text != text.strip() or text.endswith("\\"):
        raise CacheError(f"systemd cannot use the path {text!r}: rename the directory")
    return text.replace("%", "%%")


def _quote(text: str) -> str:
    """Return a word in quotes, as systemd reads it."""
    escaped = _escape_percent(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _run_systemctl(*commands: list[str], is_user: bool) -> None:
    """Run systemctl, or print the commands if systemd does not run.

    Raises:
        CacheError: if a command fails.
    """
    words = ["systemctl", *(["--user"] if is_user else [])]
    lines = [" ".join([*words, *command]) for command in commands]
    if shutil.which("systemctl") is None or not os.path.isdir(_BOOTED):
        click.echo("systemd does not run here; on a host where it does, run:\n" + "\n".join(f"  {x}" for x in lines))
        return
    for command, line in zip(commands, lines, strict=True):
        done = subprocess.run(  # noqa: S603 - all words are ours
            [*words, *command], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise CacheError(f"`{line}` failed: {reason}: run it yourself")
