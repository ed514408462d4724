"""Define the commands for registries: pull, push."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cachedb.cli.context import open_cache, open_cache_or_empty
from cachedb.cli.fields import describe_image
from cachedb.cli.options import (
    NAME,
    check_selection,
    filter_options,
    format_examples,
    format_option,
    ignore_missing_option,
    quiet_option,
    registry_options,
    ttl_option,
)
from cachedb.cli.output import print_json, print_table
from cachedb.cli.progress import show_downloads, show_transfer
from cachedb.cli.streams import read_text
from cachedb.errors import CacheError
from cachedb.text import format_size, printable, shorten_digest
from cachedb.threads import in_threads

if TYPE_CHECKING:
    from cachedb.cache import Cache
    from cachedb.index.filters import Filters
    from cachedb.index.records import ImageInfo
    from cachedb.oci.names import Name
    from cachedb.operations.pull import Pulled, PullPlan
    from cachedb.operations.push import Pushed
    from cachedb.progress import Advance

__all__ = []


@click.command(
    epilog=format_examples(
        "cachedb pull alpine:3.20",
        "cachedb pull --platform linux/arm64 ghcr.io/team/app:1",
        "cachedb pull --if-missing registry.example.org:5000/team/app:1",
        "cachedb pull --referrers ghcr.io/team/app:1",
        "cachedb pull --from names.txt --jobs 4",
        "cachedb pull --dry-run ghcr.io/team/app:1",
    )
)
@click.argument("names", metavar="NAME...", nargs=-1, type=NAME)
@click.option(
    "--from",
    "file",
    metavar="FILE",
    type=click.Path(),
    help="Also pull the names in a file: one per line, # starts a comment, - is stdin. If a name fails, the "
    "others are pulled.",
)
@click.option(
    "--jobs",
    metavar="N",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Pull this many images at once.",
)
@click.option("--dry-run", is_flag=True, help="Store nothing; print how many blobs and bytes would be downloaded.")
@click.option(
    "--platform",
    metavar="OS/ARCH[/VARIANT]",
    help="Pull this platform of a multi-platform image.  [default: the host's]",
)
@click.option("--all-platforms", is_flag=True, help="Pull all platforms of an image.")
@click.option("--if-missing", is_flag=True, help="Do not contact the registry for an image that is complete here.")
@click.option("--allow-stale", is_flag=True, help="Use the cached image if the registry is unreachable.")
@click.option("--referrers", is_flag=True, help="Also pull signatures, SBOMs and other referrers of the images.")
@click.option(
    "--foreign-layers", is_flag=True, help="Download layers that the registry lacks from the URLs in the manifest."
)
@ttl_option
@registry_options
@format_option
@quiet_option("the images' names")
def pull(
    names: tuple[str, ...],
    file: str | None,
    jobs: int,
    dry_run: bool,
    platform: str | None,
    all_platforms: bool,
    if_missing: bool,
    allow_stale: bool,
    referrers: bool,
    foreign_layers: bool,
    ttl: int | None,
    form: str,
    quiet: bool,
    **access: Any,  # noqa: ANN401 - the options of `registry_options`
) -> None:
    """Pull images from their registries, downloading only missing blobs.

    A NAME without a registry belongs to Docker Hub. localhost is contacted over HTTP. The image is stored under NAME as
    given; docker:// may precede it. REPOSITORY:TAG@DIGEST pulls the digest, and stores it under the tag. Only the
    host's platform of a multi-platform image is pulled, unless --platform or --all-platforms is given.
    With --from, --dry-run or several --jobs, a failure of one name does not stop the others; the exit code is then 1.
    CACHEDB_MIRRORS="REGISTRY=[http://]HOST[:PORT][/PREFIX] ..." lists mirrors to try first.
    Mirrors, locations and aliases of podman's registries.conf are used too.
    """
    if platform and all_platforms:
        raise click.UsageError("--platform and --all-platforms exclude each other: give one of them")
    if dry_run and (if_missing or allow_stale or ttl is not None):
        raise click.UsageError("--dry-run excludes --if-missing, --allow-stale and --ttl: leave them out")
    if not names and file is None:
        raise click.UsageError("expected the names of images: give them, or --from with a file of names")
    from cachedb.oci.names import RemoteName

    for name in names:
        RemoteName.parse(name)  # before the first pull
    wanted = list(dict.fromkeys([*names, *(_read_names(file) if file is not None else [])]))
    options = {
        "platform": platform,
        "all_platforms": all_platforms,
        "referrers": referrers,
        "foreign_layers": foreign_layers,
        **access,
    }
    if dry_run:
        with open_cache_or_empty() as cache:
            plans = _plan_all(cache, wanted, options)
        _print_plans(plans, form, quiet=quiet)
        if len(plans) < len(wanted):
            click.get_current_context().exit(1)
        return
    with open_cache(create=True) as cache:
        options |= {"if_missing": if_missing, "allow_stale": allow_stale, "ttl": ttl}
        found: dict[str, Pulled] = {}
        try:
            if file is None and jobs == 1:
                for name in wanted:
                    with show_downloads(f"pulling {name}", quiet=quiet) as callbacks:
                        found[name] = _pull(cache, name, **options, **callbacks)
            else:
                _pull_all(cache, wanted, jobs, found, options, quiet=quiet)
        finally:  # print the images that were pulled before a failure
            _print_pulled([found[name] for name in wanted if name in found], form, quiet=quiet)
    if len(found) < len(wanted):
        click.get_current_context().exit(1)


def _read_names(file: str) -> list[str]:
    """Return the names in a file, or on stdin for ``-``; ``#`` starts a comment."""
    lines = [line.partition("#")[0].strip() for line in read_text(file, "the names").split("\n")]
    return [line for line in lines if line]


def _pull(cache: Cache, name: str, **options: Any) -> Pulled:  # noqa: ANN401 - the arguments of `Cache.pull`
    pulled = cache.pull(name, **options)
    if pulled.stale:
        click.echo(f"cachedb: {name} may be out of date: {printable(pulled.stale)}", err=True)
    return pulled


def _pull_all(
    cache: Cache, names: list[str], jobs: int, found: dict[str, Pulled], options: dict[str, Any], *, quiet: bool
) -> None:
    """Pull several images at once, and put the results into ``found``.

    A failure is printed, and does not stop the other pulls.
    """
    with show_downloads(f"pulling {len(names)} images", quiet=quiet) as callbacks:
        callbacks.pop("progress", None)  # each image has a total of its own

        def pull_one(name: str, advance: Advance) -> None:
            try:
                # The call of `advance` ends the pull if the command is interrupted.
                found[name] = _pull(cache, name, **options, **callbacks, progress=lambda _done, _total: advance(0))
            except CacheError as error:
                click.echo(f"cachedb: {printable(name)}: {printable(str(error))}", err=True)

        in_threads(pull_one, names, lambda _: None, threads=jobs)


def _plan_all(cache: Cache, names: list[str], options: dict[str, Any]) -> list[PullPlan]:
    """Return the plans of several pulls; a failure is printed, and does not stop the others."""
    plans = []
    for name in names:
        try:
            plans.append(cache.plan_pull(name, **options))
        except CacheError as error:
            if len(names) == 1:
                raise
            click.echo(f"cachedb: {printable(name)}: {printable(str(error))}", err=True)
    return plans


def _print_plans(plans: list[PullPlan], form: str, *, quiet: bool) -> None:
    if quiet:
        for plan in plans:
            click.echo(str(plan.name))
    elif form == "json":
        print_json([{**plan._asdict(), "name": str(plan.name), "size": plan.bytes} for plan in plans])
    else:
        rows = [
            (
                str(plan.name),
                shorten_digest(plan.digest),
                f"{plan.blobs} ({format_size(plan.bytes)})" if plan.blobs else "-",
                "up to date" if plan.up_to_date else "would be pulled",
            )
            for plan in plans
        ]
        print_table(("NAME", "DIGEST", "BLOBS", "STATE"), rows, right=("BLOBS",))


def _print_pulled(found: list[Pulled], form: str, *, quiet: bool) -> None:
    if not found:
        return
    if quiet:
        for pulled in found:
            click.echo(str(pulled.image.name))
    elif form == "json":
        print_json([_flatten(pulled) for pulled in found])
    else:
        rows = [
            (
                str(pulled.image.name),
                shorten_digest(pulled.image.digest),
                f"{pulled.blobs} ({format_size(pulled.bytes)})" if pulled.blobs else "-",
                format_size(pulled.resumed) if pulled.resumed else "-",
                f"{pulled.seconds:.1f} s",
                "stale" if pulled.stale else "up to date" if pulled.up_to_date else "pulled",
            )
            for pulled in found
        ]
        counts = ("DOWNLOADED", "RESUMED", "TIME")
        print_table(("NAME", "DIGEST", *counts, "STATE"), rows, right=counts)


def _flatten(pulled: Pulled) -> dict[str, object]:
    """Return the fields of the image and those of its pull."""
    fields = pulled._asdict()
    image: ImageInfo = fields.pop("image")
    return {**describe_image(image), **fields, "downloaded_size": pulled.bytes}


@click.command(
    epilog=format_examples(
        "cachedb push registry.example.org:5000/team/app:1",
        "cachedb push app:1 registry.example.org:5000/team/app:1",
        "cachedb push --all-tags app localhost:5000/app",
        "cachedb push 'team/*' 'registry.example.org:5000/team/*'",
        "cachedb push --filter label=stage=production",
    )
)
@click.argument("name", metavar="[NAME|PATTERN]", required=False, type=NAME)
@click.argument("target", metavar="[TARGET]", required=False, type=NAME)
@click.option("-a", "--all-tags", is_flag=True, help="Push all tags of the repository NAME to the repository TARGET.")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Push one platform of a multi-platform image.")
@registry_options
@filter_options
@ignore_missing_option
@format_option
@quiet_option("the pushed images' names by digest")
def push(
    name: str | None,
    target: str | None,
    all_tags: bool,
    platform: str | None,
    filters: Filters | None,
    ignore_missing: bool,
    form: str,
    quiet: bool,
    **access: Any,  # noqa: ANN401 - the options of `registry_options`
) -> None:
    """Push one or several images to a registry, uploading only missing blobs.

    The image is pushed to NAME, or to TARGET if given, and keeps its digest. Referrers that `cachedb pull --referrers`
    stored are pushed too. A name without a registry belongs to Docker Hub. localhost is contacted over HTTP.
    A PATTERN pushes each image that matches when the command begins. Each * of TARGET becomes what the * of PATTERN
    matched.
    The first failure ends the command.
    """
    if all_tags and (platform or filters or ignore_missing or name is None):
        raise click.UsageError("--all-tags takes a repository, and neither --platform nor filters")
    check_selection([name] if name else [], filters, ignore_missing=ignore_missing)
    found: list[Pushed] = []
    try:
        with open_cache() as cache:
            if all_tags and name:
                with show_transfer(f"pushing {name}", quiet=quiet) as callbacks:
                    found.extend(cache.push_tags(name, target, **access, **callbacks))
                return
            for source, pushed_name in _choose_pushes(cache, name, target, filters, ignore_missing=ignore_missing):
                with show_transfer(f"pushing {source}", quiet=quiet) as callbacks:
                    found.append(cache.push(source, pushed_name, platform=platform, **access, **callbacks))
    finally:  # print the images that were pushed before a failure
        _print_pushed(found, form, quiet=quiet)
    if not found:
        click.echo("no image matches: nothing is pushed", err=True)


def _choose_pushes(
    cache: Cache, name: str | None, target: str | None, filters: Filters | None, *, ignore_missing: bool
) -> list[tuple[str | Name, str | Name | None]]:
    """Return the names of the images to push, each with its name at the registry; None means the same."""
    from cachedb.index.patterns import is_pattern, rename_all

    if name and filters is None and not ignore_missing and not is_pattern(name):
        return [(name, target)]
    names = cache.list_names(*[name] if name else [], filters=filters, ignore_missing=ignore_missing)
    targets = names if target is None else rename_all(names, name or "*", target)
    return list(zip(names, targets, strict=True))


def _print_pushed(found: list[Pushed], form: str, *, quiet: bool) -> None:
    if quiet:
        for pushed in found:
            click.echo(f"{pushed.name.repository}@{pushed.digest}")
    elif form == "json":
        print_json([{**pushed._asdict(), "name": str(pushed.name), "size": pushed.bytes} for pushed in found])
    elif found:
        rows = [
            (
                str(pushed.name),
                shorten_digest(pushed.digest),
                f"{pushed.blobs} ({format_size(pushed.bytes)})" if pushed.blobs else "-",
                str(pushed.mounted or "-"),
                str(pushed.existing or "-"),
            )
            for pushed in found
        ]
        counts = ("UPLOADED", "MOUNTED", "EXISTING")
        print_table(("NAME", "DIGEST", *counts), rows, right=counts)
