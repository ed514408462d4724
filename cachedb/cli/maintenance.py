"""Define the commands that maintain a cache: init, gc, verify, adopt, copy, stats, df, ps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from cachedb.cli.context import cache_directory, open_cache
from cachedb.cli.fields import Field, describe_image, format_state, print_images, print_records
from cachedb.cli.options import (
    NAME,
    Output,
    dry_run_option,
    filter_options,
    format_examples,
    format_option,
    output_options,
    quiet_option,
    ttl_option,
)
from cachedb.cli.output import print_collected, print_json, print_table
from cachedb.cli.progress import show_progress
from cachedb.cli.streams import PrintingCommand
from cachedb.text import format_age, format_count, format_size, printable

if TYPE_CHECKING:
    from cachedb.disk.folders import Leftover
    from cachedb.index.filters import Filters
    from cachedb.oci.names import Name
    from cachedb.operations.adopt import How
    from cachedb.reports.usage import Share, Usage

__all__ = []


@click.command(epilog=format_examples("cachedb init", "cachedb --dir /srv/cache init --shared=builders"))
@click.option(
    "--shared",
    metavar="[GROUP]",
    is_flag=False,
    flag_value="",
    help="Let the users of a group write to the cache too.  [default: the group of a shared cache, else your own]",
)
def init(shared: str | None) -> None:
    """Create a cache, and share it with a group if --shared is given.

    `import`, `pull`, `adopt`, `produce` and `blob add` create a missing cache too, but only for their user. No other
    command does. An existing cache is kept as it is. Only the owner can share a cache, and only with a group of which
    the owner is a member.
    """
    with open_cache(create=True, announce=False) as cache:
        group = None if shared is None else cache.share(shared or None)
        click.echo(f"{cache.directory}" + (f" is shared with group {group}" if group else " is a cache"))


@click.command(
    epilog=format_examples(
        "cachedb adopt ~/old/.cache",
        "cachedb adopt --link ~/old/.cache",
        "cachedb adopt --move .cache",
        "cachedb adopt --ttl 7d ~/old/.cache",
    )
)
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option(
    "--link", is_flag=True, help="Hard-link blobs where the file system allows it. Do not write to DIR afterwards."
)
@click.option("--move", is_flag=True, help="Delete the adopted files from DIR once all of them are in the cache.")
@ttl_option
@format_option
@quiet_option("the images' names")
def adopt(directory: str, link: bool, move: bool, ttl: int | None, form: str, quiet: bool) -> None:
    """Import the images of an older cache that has one index.json.

    DIR contains manifests/REPOSITORY/REFERENCE, blobs/sha256/HEX and index.json; parts may be missing. Intact content
    is adopted. The rest is listed, and the exit code is then 1. DIR is not changed without --move. A name that this
    cache already uses for another image keeps that image. Adopting again changes nothing but lifetimes.
    """
    if link and move:
        raise click.UsageError("--link and --move exclude each other: give one of them")
    with open_cache(create=True) as cache, show_progress("adopting", quiet=quiet) as progress:
        how: How = "link" if link else "move" if move else "copy"
        found = cache.adopt(directory, how=how, ttl=ttl, progress=progress)
    if form == "json":
        left_out = [item._asdict() for item in found.left_out]
        images = [describe_image(image) for image in found.images]
        print_json({**found._asdict(), "images": images, "left_out": left_out, "size": found.bytes})
    elif quiet:
        print_images(found.images, form, quiet=True)
    else:
        if found.left_out:
            rows = [
                (item.kind, item.name or "-", item.digest or (str(item.path) if item.path else "-"), item.detail)
                for item in found.left_out
            ]
            print_table(("LEFT OUT", "NAME", "DIGEST OR PATH", "DETAIL"), rows)
            click.echo()
        unused = f", {found.unused} of them used by no image" if found.unused else ""
        click.echo(f"images: {len(found.images)}; new blobs: {found.blobs}{unused}, {format_size(found.bytes)}")
    if found.index_damage and form != "json":
        click.echo(f"index.json was not used: {printable(found.index_damage)}", err=True)
    if found.left_out:
        click.get_current_context().exit(1)


@click.command(
    epilog=format_examples(
        "cachedb copy /mnt/backup/cachedb",
        "cachedb --dir /var/cache/images copy -q ./snapshot",
        "cachedb copy new/ --format json | jq .bytes",
    )
)
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--no-verify", is_flag=True, help="Do not read reflinks and hard links to verify their digests.")
@format_option
@quiet_option("the directory of the copy")
def copy(directory: str, no_verify: bool, form: str, quiet: bool) -> None:
    """Copy the cache, as of one moment, into a new or empty directory.

    Other processes may keep using the cache; rsync, cp and tar would copy it inconsistently. Blobs become reflinks
    where the file system supports them, else hard links, else copies, and are verified. DIR becomes a cache only at
    the end; after an interrupt, copy again. Holds and the policy are copied; quarantine/ and backups/ are not.
    """
    with open_cache() as cache, show_progress("copying", quiet=quiet) as progress:
        done = cache.copy(directory, verify=not no_verify, progress=progress)
    if quiet:
        click.echo(bytes(done.directory))  # a path need not be valid text
    elif form == "json":
        print_json({**done._asdict(), "size": done.bytes})
    else:
        links = [f"{count} {kind}" for count, kind in ((done.reflinks, "reflinks"), (done.hard_links, "hard links"))]
        shared = " and ".join(link for link in links if not link.startswith("0 "))
        click.echo(
            f"images: {done.images}; blobs: {done.blobs}, {format_size(done.bytes)}" + (f"; {shared}" if shared else "")
        )


@click.command(epilog=format_examples("cachedb gc", "cachedb gc --dry-run --format json"))
@dry_run_option
@format_option
def gc(dry_run: bool, form: str) -> None:
    """Free every blob that no image, hold or process uses."""
    with open_cache() as cache:
        freed = cache.collect_garbage(dry_run=dry_run)
    print_collected(freed, form, dry_run=dry_run)


@click.command(
    epilog=format_examples("cachedb verify", "cachedb verify --quick --format json", "cachedb verify --repair")
)
@click.option("--quick", is_flag=True, help="Check only that files exist and have the right size.")
@click.option("--repair", is_flag=True, help="Repair what can be repaired, and move damaged files to quarantine/.")
@format_option
@quiet_option("the digests of damaged blobs")
def verify(quick: bool, repair: bool, form: str, quiet: bool) -> None:
    """Check that files match their digests, that the index is sound, and that both agree.

    The exit code is 1 if there are problems, even if they were repaired. A damaged blob is listed with the images that
    have it. An image that lost a blob is incomplete until it is imported or pulled again. With --repair, a lost or
    damaged index is rebuilt from its readable parts, the newest backup, and the blobs.
    """
    with open_cache(damaged=True) as cache, show_progress("verifying", quiet=quiet) as progress:
        found = cache.verify(quick=quick, repair=repair, progress=progress)
    if quiet:
        for digest in dict.fromkeys(problem.digest for problem in found.problems if problem.digest):
            click.echo(digest)
    elif form == "json":
        problems = [
            {**problem._asdict(), "images": [{"name": str(name)} for name in problem.images]}
            for problem in found.problems
        ]
        print_json({"checked": found.checked, "problems": problems})
    else:
        rows = [
            (
                problem.kind,
                problem.digest or str(problem.path),
                _list_names(problem.images),
                problem.detail,
                problem.repair or "-",
            )
            for problem in found.problems
        ]
        if rows:
            print_table(("KIND", "DIGEST OR PATH", "IMAGES", "DETAIL", "REPAIR"), rows)
        summary = format_count(len(rows), "problem") if rows else "no problems"
        click.echo(f"{format_count(found.checked, 'file')} checked, {summary}")
    if found.problems:
        click.get_current_context().exit(1)


def _list_names(names: tuple[Name, ...]) -> str:
    """Return the first names, and the number of the others: thousands of images may share a layer."""
    shown = ", ".join(map(str, names[:_NAMES_SHOWN]))
    return f"{shown} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else shown or "-"


_NAMES_SHOWN: Final = 3


@click.command(cls=PrintingCommand, epilog=format_examples("cachedb ps", "cachedb ps --format json | jq '.[].pid'"))
@format_option
def ps(form: str) -> None:
    """List the processes that write to the cache, and what each is doing.

    A process may be writing, waiting, downloading or producing an image. A process that only reads is not listed.
    """
    from cachedb.index.sqlite.revision import is_ours
    from cachedb.reports.sessions import list_sessions

    directory = cache_directory()
    if not is_ours(directory):
        with open_cache():
            pass  # raises if there is no cache, and gives a marker to a cache of an older release
    found = list_sessions(directory)  # needs no index, which another program may have locked
    if form == "json":
        print_json(
            [{**session._asdict(), "doing": [activity._asdict() for activity in session.doing]} for session in found]
        )
        return
    rows = []
    for session in found:
        activities = [
            (format_age(activity.since), f"{activity.kind} {activity.name}".rstrip()) for activity in session.doing
        ]
        for since, doing in activities or [(format_age(session.started_at), "idle")]:
            rows.append((str(session.pid or "?"), session.user or "?", since, doing, session.command or "?"))
    print_table(("PID", "USER", "SINCE", "DOING", "COMMAND"), rows, right=("PID",))


@click.command(
    cls=PrintingCommand, epilog=format_examples("cachedb stats", "cachedb stats --format json | jq .stored.size")
)
@format_option
def stats(form: str) -> None:
    """Print the totals of the cache, as df does; its JSON has the fields of older releases too."""
    with open_cache() as cache:
        found, leftovers = cache.get_usage(), cache.get_leftovers()
    if form == "json":
        old = {
            "manifest_count": found.images,
            "blob_count": found.stored.blobs,
            "total_size": found.stored.size,
            "incomplete_count": found.incomplete,
            "reclaimable_blobs": found.reclaimable.blobs,
            "reclaimable_size": found.reclaimable.size,
        }
        print_json({**_describe_usage(found, leftovers), **old})
    else:
        print_records(_list_totals(found, leftovers), _TOTAL_FIELDS, Output("table", (), has_heading=True))


_PARTS = ("incomplete", "unique", "shared", "held", "reclaimable", "freed")  # of the row above them
_TOTAL_FIELDS: Final = (
    Field("name", "name", lambda name: f"  {name}" if name in _PARTS else name),
    Field("count", "count", right=True, missing=""),
    Field("size", "size", format_size, right=True, missing=""),
)
_USAGE_FIELDS: Final = (
    Field("name", "name"),
    Field("size", "size", format_size, right=True),
    Field("unique_size", "unique", format_size, right=True),
    Field("shared_size", "shared", format_size, right=True),
    Field("freed_size", "freed", format_size, right=True),
    Field("complete", "state", format_state),
    Field("last_used_at", "last used", format_age),
)


@click.command(
    cls=PrintingCommand,
    epilog=format_examples(
        "cachedb df",
        "cachedb df -v",
        "cachedb df 'team/*' --filter unused-for=30d",
        "cachedb df --format json | jq .reclaimable.size",
    ),
)
@click.argument("names", metavar="[NAME|PATTERN]...", nargs=-1, type=NAME)
@click.option("-v", "--verbose", is_flag=True, help="List each image too, with its unique and shared size.")
@filter_options
@output_options
def df(names: tuple[str, ...], verbose: bool, filters: Filters | None, output: Output) -> None:
    """Show the disk usage of the cache, or of the images that match, exact to the byte.

    A blob is unique if one image uses it, and shared if several do. A blob of no image is held if a hold or a process
    keeps it. All other blobs are reclaimable: `gc` and `prune` free them. They also free old partial downloads, which
    nobody has resumed for a day, and the trash. All other files stay. The last row, used, is the size of all files.

    With names, patterns or filters, a blob is unique if only the selected images use it. Then each of them is listed.
    --columns chooses columns of that list.
    """
    if names or filters:
        _print_selected(names, filters, output)
        return
    with open_cache() as cache:
        found = cache.get_usage(by_image=verbose)
        leftovers = cache.get_leftovers()
    if output.form == "json":
        document = _describe_usage(found, leftovers)
        if verbose:
            document["image_usage"] = [image._asdict() for image in found.image_usage]
        print_json(document)
        return
    if leftovers:
        click.echo("cachedb: some leftovers of dead processes cannot be cleaned up: see `cachedb verify`", err=True)
    if verbose and (output.form != "table" or output.columns):
        print_records([image._asdict() for image in found.image_usage], _USAGE_FIELDS, output)
        return
    print_records(_list_totals(found, leftovers), _TOTAL_FIELDS, output)
    if verbose:
        click.echo()
        print_records([image._asdict() for image in found.image_usage], _USAGE_FIELDS, output)


def _print_selected(names: tuple[str, ...], filters: Filters | None, output: Output) -> None:
    with open_cache() as cache:
        found = cache.get_selected_usage(*names, filters=filters)
    listed = [image._asdict() for image in found.image_usage]
    if output.form == "json":
        shares = {name: value._asdict() for name, value in found._asdict().items() if hasattr(value, "_asdict")}
        print_json({**found._asdict(), **shares, "image_usage": listed})
        return
    if output.form == "table" and not output.columns:
        shares = {name: getattr(found, name) for name in ("stored", "unique", "shared", "freed")}
        print_records(_list_counts(found.images, found.incomplete, shares), _TOTAL_FIELDS, output)
        click.echo()
    print_records(listed, _USAGE_FIELDS, output)


def _list_counts(images: int, incomplete: int, shares: dict[str, Share]) -> list[dict[str, Any]]:
    counts = {"images": images, **({"incomplete": incomplete} if incomplete else {})}
    rows = [{"name": name, "count": count, "size": None} for name, count in counts.items()]
    return rows + [{"name": name, "count": share.blobs, "size": share.size} for name, share in shares.items()]


def _list_totals(found: Usage, leftovers: list[Leftover]) -> list[dict[str, Any]]:
    shares = {name: getattr(found, name) for name in ("stored", "unique", "shared", "held", "reclaimable")}
    sizes = {"saved by sharing": found.saved_size}
    sizes |= {name: size for name, size in found.file_sizes.items() if size}
    sizes["used"] = found.used_size
    rows = _list_counts(found.images, found.incomplete, shares)
    rows += [{"name": name, "count": None, "size": size} for name, size in sizes.items()]
    if leftovers:
        rows.append({"name": "cannot be cleaned up", "count": len(leftovers), "size": None})
    return rows


def _describe_usage(found: Usage, leftovers: list[Leftover]) -> dict[str, Any]:
    """Return the usage as its JSON has it, without that of each image."""
    shares = {name: value._asdict() for name, value in found._asdict().items() if hasattr(value, "_asdict")}
    document = {**found._asdict(), **shares, "leftovers": [leftover._asdict() for leftover in leftovers]}
    del document["image_usage"]
    return document
