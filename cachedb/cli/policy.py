"""Define the commands for the policy of a cache: policy show, policy check, policy edit."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import click

from cachedb.cli.context import cache_directory, open_cache
from cachedb.cli.options import format_examples
from cachedb.cli.output import print_json
from cachedb.cli.spelling import SpellingGroup
from cachedb.cli.streams import PrintingCommand, read_text
from cachedb.disk.existence import exists
from cachedb.disk.layout import POLICY_FILE
from cachedb.errors import CacheError, InvalidPolicy, NotInCache
from cachedb.text import format_count

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

#[[remove]]                # without such a rule, no image is removed for its age
#repository = "ci/*"
#unused-for = "7d"
"""


@click.group(cls=SpellingGroup, epilog=format_examples("cachedb policy edit", "cachedb policy show"))
def policy() -> None:
    """Show, check and edit the policy of the cache: what to keep, what to remove, and the limits.

    It is the file policy.toml in the cache directory.
    """


@policy.command(
    "show", cls=PrintingCommand, epilog=format_examples("cachedb policy show", "cachedb policy show --format json")
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["toml", "json"]),
    default="toml",
    show_default=True,
    help="How to print the policy.",
)
def policy_show(form: str) -> None:
    """Print the policy that applies.

    It includes the default rule, which keeps images that were used a moment ago.
    """
    from cachedb.operations.policy import Keep, Policy, format_policy
    from cachedb.operations.policy_file import load_policy
    from cachedb.operations.rules import RECENT_SECONDS

    directory = cache_directory()
    found = load_policy(directory)
    if form == "json":
        print_json(_describe_policy(found, int(RECENT_SECONDS) if found.keeps_recent else None))
        return
    if exists(directory / POLICY_FILE):
        click.echo(f"# {directory / POLICY_FILE}")
    else:
        click.echo(f"# there is no {POLICY_FILE}: `cachedb policy edit` writes one")
    if text := format_policy(found):
        click.echo(f"\n{text}", nl=False)
    if found.keeps_recent:
        default = format_policy(Policy(keep=(Keep(used_within=RECENT_SECONDS),)))
        click.echo(f"\n# cachedb adds this rule, because no other one has used-within\n{default}", nl=False)


def _describe_policy(found: Policy, default_used_within: int | None) -> dict[str, Any]:
    """Return a policy as its JSON has it."""
    keep, remove = ([{**rule._asdict(), "labels": dict(rule.labels)} for rule in rules] for rules in found[1:])
    limits = found.limits._asdict()
    return {"limits": limits, "keep": keep, "remove": remove, "default_used_within": default_used_within}


@policy.command("check", epilog=format_examples("cachedb policy check", "cachedb policy check ./policy.toml"))
@click.argument("file", metavar="[FILE]", required=False, type=click.Path())
def policy_check(file: str | None) -> None:
    """Check the policy of the cache, or a file.

    An error names the line. Queries are run on the cache, if there is one. FILE may be - for stdin.
    """
    from cachedb.operations.policy_file import read_policy

    source = POLICY_FILE if file is None else file
    text = read_policy(cache_directory()) if file is None else read_text(file, "the policy")
    if text is None:
        click.echo(f"there is no {POLICY_FILE}: `cachedb policy edit` writes one")
        return
    found = _check_text(text, source)
    rules = f"{format_count(len(found.keep), 'keep rule')}, {format_count(len(found.remove), 'remove rule')}"
    limits = sum(limit is not None for limit in (found.limits.max_size, found.limits.min_free))
    click.echo(f"{source} is valid: {format_count(limits, 'limit')}, {rules}")


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


@policy.command("edit", epilog=format_examples("cachedb policy edit", "EDITOR=nano cachedb policy edit"))
def policy_edit() -> None:
    """Edit the policy in $VISUAL or $EDITOR.

    The edited policy is installed only if it is valid. Otherwise an error names the file that contains it. The editor
    gets a copy, so no process sees a half-written policy.
    """
    from cachedb.operations.policy_file import read_policy

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
    from cachedb.operations.policy_file import read_policy

    with open_cache(create=True, announce=False) as cache:
        if read_policy(cache.directory) != before:
            raise CacheError(f"another process has changed {POLICY_FILE} meanwhile: edit it again")
        cache.set_policy(edited)
