"""Define the commands that keep a cache within bounds: policy."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import TYPE_CHECKING

import click

from cachedb.cli.context import cache_directory, open_cache
from cachedb.cli.options import format_examples
from cachedb.cli.streams import read_text
from cachedb.disk.layout import POLICY_FILE
from cachedb.errors import CacheError, InvalidPolicy, NotInCache

if TYPE_CHECKING:
    from cachedb.operations.policy import Policy

__all__ = []


_TEMPLATE = """\
# What to keep and what to remove. Delete the # in front of the lines that you need.

#[limits]
#max-size = "200GB"        # of all files of the cache
#min-free = "15%"          # of the file system
#down-to = "90%"           # of max-size

#[[keep]]                  # a keep always wins
#names = ["base/*", "re:^release-"]

#[[remove]]                # without such a rule, nothing is removed by its age
#repository = "ci/*"
#unused-for = "7d"
"""


@click.group()
def policy() -> None:
    """Show, check and edit the policy of the cache: what to keep, what to remove, and the limits of its size.

    It is the file policy.toml in the cache directory.
    """


@policy.command("show", epilog=format_examples("cachedb policy show"))
def policy_show() -> None:
    """Print the policy that applies, in TOML, with the default rule that keeps images just used."""
    from cachedb.operations.policy import JUST_USED, format_policy, load_policy

    directory = cache_directory()
    found = load_policy(directory)
    if (directory / POLICY_FILE).exists():
        click.echo(f"# {directory / POLICY_FILE}")
    else:
        click.echo(f"# there is no {POLICY_FILE}: `cachedb policy edit` writes one")
    if text := format_policy(found):
        click.echo(f"\n{text}", nl=False)
    if not any(rule.used_within is not None for rule in found.keep):
        click.echo(f'\n[[keep]]  # the default, without another used-within\nused-within = "{JUST_USED}"')


@policy.command("check", epilog=format_examples("cachedb policy check", "cachedb policy check ./policy.toml"))
@click.argument("file", metavar="[FILE]", required=False, type=click.Path())
def policy_check(file: str | None) -> None:
    """Check the policy of the cache, or a file with one; an error names the line.

    Queries are run on the cache, if there is one. FILE may be - for stdin.
    """
    from cachedb.operations.policy import read_policy

    source = POLICY_FILE if file is None else file
    text = read_policy(cache_directory()) if file is None else read_text(file, "the policy")
    if text is None:
        click.echo(f"there is no {POLICY_FILE}: `cachedb policy edit` writes one")
        return
    found = _check_text(text, source)
    rules = f"{_count(len(found.keep), 'keep rule')}, {_count(len(found.remove), 'remove rule')}"
    limits = sum(limit is not None for limit in (found.limits.max_size, found.limits.min_free))
    click.echo(f"{source} is valid: {_count(limits, 'limit')}, {rules}")


def _check_text(text: str, source: str) -> Policy:
    from cachedb.operations.policy import parse_policy

    try:
        with open_cache() as cache:
            return cache.check_policy(text, source=source)
    except NotInCache:
        found = parse_policy(text, source)
        if any(rule.sql for rule in found.keep) or any(rule.sql for rule in found.remove):
            click.echo("cachedb: the queries were not run, because there is no cache", err=True)
        return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@policy.command("edit", epilog=format_examples("cachedb policy edit", "EDITOR=nano cachedb policy edit"))
def policy_edit() -> None:
    """Open the policy in $VISUAL or $EDITOR, and install the result if it is valid.

    The editor gets a copy, so no process sees a half-written policy. An invalid text is not installed; it is kept for
    the next try.
    """
    from cachedb.operations.policy import read_policy

    before = read_policy(cache_directory())
    text = _TEMPLATE if before is None else before
    file, path = tempfile.mkstemp(prefix="cachedb-policy-", suffix=".toml")
    with open(file, "w", encoding="utf-8") as copy:
        copy.write(text)
    while True:
        click.edit(filename=path)
        edited = read_text(path, "the policy")
        if edited == text:
            os.unlink(path)
            click.echo("the policy is unchanged")
            return
        try:
            _install_text(edited, before)
        except CacheError as error:
            if isinstance(error, InvalidPolicy) and sys.stdin.isatty():
                click.echo(f"cachedb: {error}", err=True)
                if click.confirm("edit it again?", default=True, err=True):
                    continue
            click.echo(f"cachedb: the edited text is in {path!r}", err=True)
            raise
        os.unlink(path)
        click.echo(f"installed {cache_directory() / POLICY_FILE}")
        return


def _install_text(edited: str, before: str | None) -> None:
    from cachedb.operations.policy import read_policy

    with open_cache(create=True, announce=False) as cache:
        if read_policy(cache.directory) != before:
            raise CacheError(f"another process has changed {POLICY_FILE} meanwhile: edit it again")
        cache.set_policy(edited)
