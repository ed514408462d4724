"""Define the command prune."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from cachedb.cli.context import open_cache
from cachedb.cli.fields import Field, print_records
from cachedb.cli.options import (
    NAME,
    DurationParameter,
    Output,
    format_examples,
    format_option,
    quiet_option,
)
from cachedb.cli.output import print_json, print_names, to_json
from cachedb.cli.progress import show_progress
from cachedb.cli.streams import read_text, write_text
from cachedb.errors import CacheError, InvalidQuery
from cachedb.text import format_age, format_count, format_size, shorten_digest

if TYPE_CHECKING:
    from cachedb.cache import Cache
    from cachedb.operations.plan import Plan, PlannedImage
    from cachedb.operations.policy import Policy, Remove
    from cachedb.operations.prune import Pruned

    _Parameter = click.ParamType[str]
else:
    _Parameter = click.ParamType

__all__ = []


class _LimitParameter(_Parameter):
    """The value of a limit, as the policy has it: a percentage, a size, or one of both."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        from cachedb.operations.policy import parse_disk_size, parse_free_space, parse_percentage

        parsers = {"percentage": parse_percentage, "size": parse_disk_size, "percentage or size": parse_free_space}
        try:
            return parsers[self.name](value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _PruneOptions(NamedTuple):
    """The values of the options."""

    max_size: int | None = None  # bytes
    min_free: int | float | None = None  # bytes, or a fraction
    down_to: float | None = None  # a fraction
    unused_for: int | None = None  # seconds
    added_before: int | None = None  # seconds
    conditions: tuple[str, ...] = ()  # of --filter
    keep: tuple[str, ...] = ()
    newest: int | None = None
    to_free: int | None = None  # bytes

    @property
    def has_any(self) -> bool:
        """Whether any option is given."""
        return any(value not in (None, ()) for value in self)


@click.command(
    epilog=format_examples(
        "cachedb prune --dry-run",
        "cachedb prune --max-size 200GB --min-free 15%",
        "cachedb prune --unused-for 7d --newest 2 --keep 'base/*'",
        "cachedb prune --plan plan.json && cachedb prune --apply plan.json",
        "cachedb prune --explain app:1",
    )
)
@click.option(
    "--max-size", metavar="SIZE", type=_LimitParameter("size"), help="The most that all files of the cache may take."
)
@click.option(
    "--min-free",
    metavar="PERCENT|SIZE",
    type=_LimitParameter("percentage or size"),
    help="The space that must be free on the file system.",
)
@click.option(
    "--down-to",
    metavar="PERCENT",
    type=_LimitParameter("percentage"),
    help="If the cache exceeds --max-size, remove images down to this part of it.  [default: 100%]",
)
@click.option("--to-free", metavar="SIZE", type=_LimitParameter("size"), help="Free at least this many bytes now.")
@click.option(
    "--unused-for", metavar="TIME", type=DurationParameter(), help="Remove images that were not used for TIME."
)
@click.option(
    "--added-before",
    metavar="TIME",
    type=DurationParameter(),
    help="Remove images whose names came here TIME ago or earlier.",
)
@click.option(
    "--filter",
    "conditions",
    metavar="KEY=VALUE",
    multiple=True,
    help="Remove images with label=KEY[=VALUE] or platform=[OS/]ARCH, or that are incomplete; repeatable.",
)
@click.option(
    "--keep",
    metavar="NAME|PATTERN",
    multiple=True,
    help="Keep images with this name, or that match a pattern or re:EXPRESSION; repeatable.",
)
@click.option("--newest", metavar="N", type=click.IntRange(min=1), help="Keep the newest N images of each repository.")
@click.option("--dry-run", is_flag=True, help="Remove nothing; print the plan.")
@click.option("--explain", metavar="NAME", type=NAME, help="Print what keeps an image, or what would remove it.")
@click.option(
    "--plan",
    "plan_file",
    metavar="FILE",
    type=click.Path(),
    help="Remove nothing; write the plan to FILE; - is stdout.",
)
@click.option(
    "--apply",
    "applied_file",
    metavar="FILE",
    type=click.Path(),
    help="Remove what the plan in FILE says, except images that were used, replaced, pinned or held since; - is stdin.",
)
@format_option
@quiet_option("the names of the removed images")
def prune(
    dry_run: bool,
    explain: str | None,
    plan_file: str | None,
    applied_file: str | None,
    form: str,
    quiet: bool,
    **options: Any,  # noqa: ANN401 - those of `_PruneOptions`
) -> None:
    """Remove the images that the policy and the options select, and as few others as the limits require.

    Images whose lifetime has ended go first, even without any policy. Then the images that rules select go, and then
    the least recently used, until the limits hold. Each limit of the options replaces that of the policy. --unused-for,
    --added-before and --filter are one rule: an image must fulfil all of them. This rule replaces the rules of the
    policy that remove. --keep and --newest add to its rules that keep.

    Images that a keep rule selects, and images that are pinned, held or in use, always stay. Without a used-within in
    the policy, images that were used in the last 10 minutes stay too. The exit code is 1 if the limits cannot be met.
    """
    given = _PruneOptions(**options)
    modes = {"--dry-run": dry_run, "--explain": explain, "--plan": plan_file, "--apply": applied_file}
    chosen = [name for name, value in modes.items() if value]
    if len(chosen) > 1:
        raise click.UsageError(f"{chosen[0]} and {chosen[1]} exclude each other: give one of them")
    if applied_file is not None:
        if given.has_any:
            raise click.UsageError("--apply removes what the plan says: give the other options to --plan")
        _apply(applied_file, form, quiet=quiet)
        return
    with open_cache() as cache:
        policy = _merge(cache.get_policy(), given)
        if explain is not None:
            with _naming_lines(cache):
                found = cache.explain_prune(explain, policy, to_free=given.to_free)
            if form == "json":
                planned = None if found.planned is None else _describe_planned(found.planned)
                print_json({**found._asdict(), "name": str(found.name), "planned": planned})
            else:
                click.echo(str(found))
            return
        _check_purpose(policy, given, quiet=quiet)
        with _naming_lines(cache):
            if dry_run or plan_file is not None:
                _print_plan(cache, cache.plan_prune(policy, to_free=given.to_free), form, plan_file, quiet=quiet)
            else:
                with show_progress("pruning", quiet=quiet) as progress:
                    pruned = cache.prune(policy, to_free=given.to_free, progress=progress)
                _print_pruned(pruned, policy, form, quiet=quiet)


def _merge(policy: Policy, given: _PruneOptions) -> Policy:
    """Return the policy of the cache, changed by the options."""
    from cachedb.operations.policy import Keep, parse_name_or_pattern

    limits = {name: getattr(given, name) for name in ("max_size", "min_free", "down_to")}
    merged = policy.limits._replace(**{name: limit for name, limit in limits.items() if limit is not None})
    if given.down_to is not None and merged.max_size is None:
        raise click.UsageError("--down-to is a part of --max-size, which is missing: add --max-size")
    keep = policy.keep
    if given.keep:
        try:
            keep += (Keep(names=tuple(map(parse_name_or_pattern, given.keep))),)
        except ValueError as error:
            raise click.UsageError(f"--keep: {error}") from None
    if given.newest is not None:
        keep += (Keep(newest=given.newest),)
    rule = _make_rule(given)
    return policy._replace(limits=merged, keep=keep, remove=policy.remove if rule is None else (rule,))


def _make_rule(given: _PruneOptions) -> Remove | None:
    """Return the rule that the options make; None if they make none."""
    from cachedb.index.filters import parse_filters
    from cachedb.operations.policy import Remove

    filters = parse_filters(given.conditions)
    for key in ("unused_for", "added_before"):
        if getattr(given, key) is not None and getattr(filters, key) is not None:
            name = key.replace("_", "-")
            raise click.UsageError(f"--{name} and --filter {name}=... exclude each other: give one of them")
    others = (filters.base, filters.digest, filters.pinned, filters.expired)
    if any(other is not None for other in others) or len(filters.platforms) > 1:
        raise click.UsageError(
            "--filter takes neither base, digest, pinned, expired nor several platforms: write a policy rule with sql"
        )
    age = None if filters.added_before is None else (datetime.now(UTC) - filters.added_before).total_seconds()
    rule = Remove(
        labels=filters.labels,
        platform=filters.platforms[0] if filters.platforms else None,
        unused_for=filters.unused_for if given.unused_for is None else given.unused_for,
        added_before=age if given.added_before is None else given.added_before,
        incomplete=filters.incomplete,
    )
    return None if rule == Remove() else rule


def _check_purpose(policy: Policy, given: _PruneOptions, *, quiet: bool) -> None:
    """Fail with a usage error if the options say only what to keep.

    Without a policy and options, print that only images whose lifetime has ended are removed.
    """
    if not (policy.limits.max_size is policy.limits.min_free is given.to_free is None and not policy.remove):
        return
    if given.has_any:
        raise click.UsageError(
            "nothing says what to remove: give --max-size, --min-free, --to-free, --unused-for, --added-before or "
            "--filter, or write a policy with `cachedb policy edit`"
        )
    if not quiet:
        click.echo("cachedb: no policy: only images whose lifetime has ended are removed", err=True)


@contextmanager
def _naming_lines(cache: Cache) -> Iterator[None]:
    """Name the line of the policy if the block raises an error for a query."""
    from cachedb.operations.policy_file import read_policy

    try:
        yield
    except InvalidQuery:
        cache.check_policy(read_policy(cache.directory) or "")
        raise


def _apply(file: str, form: str, *, quiet: bool) -> None:
    from cachedb.operations.plan_file import parse_plan

    planned = parse_plan(read_text(file, "the plan"), repr(file))
    with open_cache() as cache:
        policy = cache.get_policy()  # for the summary; if it is invalid, nothing is removed
        with show_progress("pruning", quiet=quiet) as progress:
            pruned = cache.prune(plan=planned, progress=progress)
        _print_pruned(pruned, policy, form, quiet=quiet)


_PLAN_FIELDS: Final = (
    Field("name", "name"),
    Field("digest", "digest", shorten_digest, place=2),
    Field("last_used_at", "last used", format_age),
    Field("size", "size", format_size, right=True),
    Field("freed_size", "freed", format_size, right=True),
    Field("total_freed_size", "in all", format_size, right=True),
    Field("rule", "rule"),
)


_SIZE_FIELDS: Final = (Field("name", "name"), Field("size", "size", format_size, right=True))


def _describe_planned(image: PlannedImage) -> dict[str, Any]:
    return {**image._asdict(), "name": str(image.name)}


def _print_plan(cache: Cache, plan: Plan, form: str, file: str | None, *, quiet: bool) -> None:
    images = list(map(_describe_planned, plan.images))
    sums = {"garbage_size": plan.garbage_size, "unmet_size": plan.unmet_size}
    document = {**plan._asdict(), "images": images, **sums}
    summary = f"would prune {_describe_freed(len(images), plan.garbage_size + plan.freed_size)}"
    if file is not None:
        write_text(file, f"{_format_json(document)}\n", outside=cache.directory)
    if file == "-":  # a program reads stdout
        click.echo(summary, err=True)
    elif form == "json":
        print_json(document)
    elif quiet:
        print_names(image.name for image in plan.images)
    else:
        if file is None:
            _print_sizes("freed first", plan.garbage_sizes)
            if images:
                print_records(images, _PLAN_FIELDS, Output("table", (), has_heading=True))
                click.echo()
            _print_sizes("kept", plan.kept_sizes)
        click.echo(summary)
    if form != "json" and not quiet:
        _tell_recent(plan.recent_images)
    _check_unmet(plan.unmet_size, plan.kept_sizes)


def _print_sizes(heading: str, sizes: Mapping[str, int]) -> None:
    """Print a table of the sizes that are not 0, the largest first, and an empty line."""
    from cachedb.operations.plan import sort_sizes

    records = [{"name": name, "size": size} for name, size in sort_sizes(sizes)]
    if records:
        name, size = _SIZE_FIELDS
        print_records(records, (name._replace(column=heading), size), Output("table", (), has_heading=True))
        click.echo()


def _print_pruned(pruned: Pruned, policy: Policy, form: str, *, quiet: bool) -> None:
    freed_size = sum(pruned.garbage_sizes.values()) + pruned.freed_size
    if form == "json":
        images = [{"name": str(name)} for name in pruned.images]
        skipped = [{"name": str(image.name), "reason": image.reason} for image in pruned.skipped]
        garbage = {"blobs": pruned.garbage.blobs, "size": pruned.garbage.bytes}
        sizes = {"garbage_sizes": dict(pruned.garbage_sizes), "kept_sizes": dict(pruned.kept_sizes)}
        print_json({**pruned._asdict(), "images": images, "skipped": skipped, "garbage": garbage, **sizes})
    elif quiet:
        print_names(pruned.images)
    else:
        for image in pruned.skipped:
            click.echo(f"skipped {image.name}: {image.reason}", err=True)
        limit = policy.limits.max_size
        used = format_size(pruned.used_size) + (f" of {format_size(limit)}" if limit is not None else "")
        click.echo(f"pruned {_describe_freed(len(pruned.images), freed_size)}; {used} used")
        _tell_recent(pruned.recent_images)
    _check_unmet(pruned.unmet_size, pruned.kept_sizes)


def _tell_recent(count: int) -> None:
    """Tell how many images stay only because they were used a moment ago."""
    from cachedb.operations.rules import RECENT_SECONDS

    if count:
        click.echo(
            f"cachedb: kept {format_count(count, 'image')} used in the last {RECENT_SECONDS / 60:g} minutes: "
            "to change this time, write a keep rule with used-within",
            err=True,
        )


def _format_json(document: object) -> str:
    import json

    return json.dumps(document, indent=2, default=to_json)


def _describe_freed(images: int, size: int) -> str:
    return f"{format_count(images, 'image')}, {format_size(size)}"


def _check_unmet(unmet_size: int, kept_sizes: Mapping[str, int]) -> None:
    """Raise if the limits cannot be met.

    Raises:
        CacheError: with what keeps the space.
    """
    from cachedb.operations.plan import explain_unmet

    if unmet_size:
        raise CacheError(explain_unmet(unmet_size, kept_sizes))
