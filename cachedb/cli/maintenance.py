"""Define the commands that maintain a cache: init, gc, verify, adopt, copy, stats, df, ps."""

from __future__ import annotations

import click

from cachedb.cli.context import cache_directory, open_cache
from cachedb.cli.options import dry_run_option, format_examples, format_option, quiet_option
from cachedb.cli.output import print_collected, print_images, print_json, print_table
from cachedb.cli.progress import show_progress
from cachedb.text import format_age, format_size, printable

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

    Other commands create a missing cache too, but only for their user. An existing cache is kept as it is. Only the
    owner can share a cache, and only with a group of which the owner is a member.
    """
    with open_cache() as cache:
        group = None if shared is None else cache.share(shared or None)
        click.echo(f"{cache.directory}" + (f" is shared with group {group}" if group else " is a cache"))


@click.command(
    epilog=format_examples(
        "cachedb adopt ~/old/.cache", "cachedb adopt --link ~/old/.cache", "cachedb adopt --move .cache"
    )
)
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option(
    "--link", is_flag=True, help="Hard-link blobs where the file system allows it. Do not write to DIR afterwards."
)
@click.option("--move", is_flag=True, help="Delete the adopted files from DIR once all of them are in the cache.")
@format_option
@quiet_option("the images' names")
def adopt(directory: str, link: bool, move: bool, form: str, quiet: bool) -> None:
    """Import the images of an older cache that has one index.json.

    DIR contains manifests/REPOSITORY/REFERENCE, blobs/sha256/HEX and index.json; parts may be missing. Intact content
    is adopted. The rest is listed, and the exit code is then 1. DIR is not changed without --move. A name that this
    cache already uses for another image keeps that image. Adopting again changes nothing.
    """
    if link and move:
        raise click.UsageError("--link and --move exclude each other: give one of them")
    with open_cache() as cache, show_progress("adopting", quiet=quiet) as progress:
        found = cache.adopt(directory, how="link" if link else "move" if move else "copy", progress=progress)
    if form == "json":
        left_out = [item._asdict() for item in found.left_out]
        print_json({**found._asdict(), "images": [image._asdict() for image in found.images], "left_out": left_out})
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
    the end; after an interrupt, copy again. Holds are copied; quarantine/ and backups/ are not.
    """
    with open_cache(existing=True) as cache, show_progress("copying", quiet=quiet) as progress:
        done = cache.copy(directory, verify=not no_verify, progress=progress)
    if quiet:
        click.echo(bytes(done.directory))  # a path need not be valid text
    elif form == "json":
        print_json(done._asdict())
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
    """Check that files match their digests, the index is sound, and both agree.

    The exit code is 1 if there are problems, even if they were repaired. An image that lost a blob is incomplete until
    it is imported or pulled again. With --repair, a lost or damaged index is rebuilt from its readable parts, the
    newest backup, and the blobs.
    """
    with open_cache(damaged=True) as cache, show_progress("verifying", quiet=quiet) as progress:
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
            print_table(("KIND", "DIGEST OR PATH", "DETAIL", "REPAIR"), rows)
        files = f"{found.checked} file{'' if found.checked == 1 else 's'} checked"
        click.echo(f"{files}, {len(rows) or 'no'} problem{'' if len(rows) == 1 else 's'}")
    if found.problems:
        click.get_current_context().exit(1)


@click.command(epilog=format_examples("cachedb ps", "cachedb ps --format json | jq '.[].pid'"))
@format_option
def ps(form: str) -> None:
    """List the processes that write to the cache, and what each is doing.

    A process may be writing, waiting, downloading or producing an image. A process that only reads is not listed.
    """
    from cachedb.index.sqlite.revision import is_ours
    from cachedb.reports.sessions import list_sessions

    directory = cache_directory()
    if is_ours(directory) and (directory / "locks").is_dir():
        found = list_sessions(directory)  # works even if another program locks the index
    else:
        with open_cache() as cache:
            found = cache.sessions()
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


@click.command(epilog=format_examples("cachedb stats", "cachedb stats --format json | jq .total_size"))
@format_option
def stats(form: str) -> None:
    """Print the totals of the cache."""
    with open_cache() as cache:
        totals = cache.get_stats()
    if form == "json":
        print_json(totals._asdict())
        return
    rows = [
        ("images", str(totals.manifest_count)),
        ("  incomplete", str(totals.incomplete_count)),
        ("blobs", str(totals.blob_count)),
        ("  reclaimable", str(totals.reclaimable_blobs)),
        ("size", format_size(totals.total_size)),
        ("  reclaimable", format_size(totals.reclaimable_size)),
    ]
    print_table(("", "TOTAL"), rows, right=("TOTAL",))


@click.command(epilog=format_examples("cachedb df", "cachedb df -v", "cachedb df --format json | jq .reclaimable.size"))
@click.option("-v", "--verbose", is_flag=True, help="List each image too, with its unique and shared size.")
@format_option
def df(verbose: bool, form: str) -> None:
    """Show the disk usage of the cache, exact to the byte.

    A blob is unique if one image uses it, and shared if several do. A blob of no image is held if a hold or a process
    keeps it. All other blobs are reclaimable by `cachedb gc`.
    """
    with open_cache(existing=True) as cache:
        found = cache.get_usage(by_image=verbose)
        leftovers = cache.get_leftovers()
    if form == "json":
        shares = {name: value._asdict() for name, value in found._asdict().items() if hasattr(value, "_asdict")}
        document = {**found._asdict(), **shares, "leftovers": [leftover._asdict() for leftover in leftovers]}
        listed = document.pop("image_usage")
        if verbose:
            document["image_usage"] = [image._asdict() for image in listed]
        print_json(document)
        return
    images = f"{found.images}, {found.incomplete} incomplete" if found.incomplete else str(found.images)
    rows = [("images", images, "")]
    for name in ("stored", "unique", "shared", "held", "reclaimable"):
        share = getattr(found, name)
        rows.append((f"  {name}" if name != "stored" else "blobs", str(share.blobs), format_size(share.size)))
    rows += [("saved by sharing", "", format_size(found.saved_size)), ("index", "", format_size(found.index_size))]
    others = {**found.folder_sizes, "reserve": found.reserve_size}
    rows += [(name, "", format_size(size)) for name, size in others.items() if size]
    if leftovers:
        rows.append(("cannot be cleaned up", str(len(leftovers)), ""))
        click.echo("cachedb: some leftovers of dead processes cannot be cleaned up: see `cachedb verify`", err=True)
    print_table(("", "COUNT", "SIZE"), rows, right=("COUNT", "SIZE"))
    if verbose:
        click.echo()
        listing = [
            (
                name,
                *map(format_size, sizes),
                "complete" if complete else "incomplete",
                format_age(last_used_at),
            )
            for name, *sizes, complete, last_used_at in found.image_usage
        ]
        headings = ("NAME", "SIZE", "UNIQUE", "SHARED", "FREED", "STATE", "LAST USED")
        print_table(headings, listing, right=headings[1:5])
