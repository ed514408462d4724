"""Measure archives and layouts: import, export, verify, and eight processes that import at once."""

from __future__ import annotations

import time
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from benchmarks.machine import are_installed
from benchmarks.measure import (
    Cost,
    Work,
    add_costs,
    cachedb,
    compare_speed,
    compare_with_limit,
    copy_with_fsync,
    copy_without_fsync,
    delete_paths,
    hash_on_all_cores,
    measure_cost,
    print_works,
    run,
    run_in_child,
    run_together,
    send_file,
    take_turns,
)
from benchmarks.plan import Plan
from benchmarks.real_images import NAME, TAG, write_docker_archive

SKOPEO = ["skopeo", "--insecure-policy", "copy", "-q"]
_PROCESSES = 8


def list_files(source: Path) -> list[Path]:
    """Return a file, or all files of a folder."""
    return sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]


def measure_size(source: Path) -> int:
    """Return the bytes of a file, or of all files of a folder."""
    return sum(path.stat().st_size for path in list_files(source))


def import_image(directory: Path, source: Path, link: bool = False) -> Cost:
    """Import the image in a process that has the cache open and cachedb's modules imported."""
    from cachedb import Cache
    from cachedb.transports.archive import read

    assert read
    with Cache.open(directory) as cache:
        return measure_cost(lambda: cache.cache_from_tar(source, NAME, link=link))


def export_image(directory: Path, target: Path, form: str, link: bool = False) -> Cost:
    """Export the image from a process that has the cache open and cachedb's modules imported."""
    from cachedb import Cache
    from cachedb.operations import export_archive

    assert export_archive
    with Cache.open(directory) as cache:
        return measure_cost(lambda: cache.export(NAME, target, format=form, link=link))  # type: ignore[arg-type]


def _verify_cache(directory: Path) -> Cost:
    from cachedb import Cache

    with Cache.open(directory) as cache:
        return measure_cost(cache.verify)


def imports(plan: Plan) -> None:
    """Import the image from each kind of source, into an empty cache and again."""
    for form, source in plan.image._asdict().items():
        print(f"### from {form.replace('_', ' ')}, {measure_size(source) / 1e6:.0f} MB\n")
        print_works(take_turns(_make_import_works(form, source, plan.folder("import")), plan.rounds))


def _make_import_works(form: str, source: Path, place: Path) -> list[Work]:
    opened, whole, linked, copied = (place / name for name in ("opened", "whole", "linked", "copied"))
    count = measure_size(source)
    hashing = Work("sha256, all cores", "limit", lambda: hash_on_all_cores(list_files(source)), count)
    copying = Work(
        "copy with fsync",
        "limit",
        lambda: copy_with_fsync(list_files(source), copied),
        count,
        before=lambda: delete_paths(copied),
    )
    peers = _make_peer_works(form, source, place)
    new = [compare_with_limit(hashing, copying, want=0.9)]
    new += [
        compare_speed(peer, 2.5 if form == "docker_archive" else None) for peer in peers if peer.runner.endswith("dir:")
    ]
    again = [compare_with_limit(hashing, want=0.95)]
    command = cachedb("--dir", whole, "import", source, NAME)
    works = [
        hashing,
        copying,
        Work(
            "new",
            "cachedb, open process",
            lambda: run_in_child(import_image, opened, source),
            count,
            new,
            lambda: delete_paths(opened),
        ),
        Work("again", "cachedb, open process", lambda: run_in_child(import_image, opened, source), count, again),
        Work("new", "cachedb import", lambda: run(*command), count, new, lambda: delete_paths(whole)),
        Work("again", "cachedb import", lambda: run(*command), count, again),
    ]
    if form == "layout":
        link = "cachedb, open process, link"
        works += [
            Work(
                "new",
                link,
                lambda: run_in_child(import_image, linked, source, link=True),
                count,
                again,
                lambda: delete_paths(linked),
            ),
            Work("again", link, lambda: run_in_child(import_image, linked, source, link=True), count, again),
        ]
    return works + peers


def _make_peer_works(form: str, source: Path, place: Path) -> list[Work]:
    """Return works of the installed peers that are comparable to an import of this source."""
    target, count = place / "peer", measure_size(source)
    works: list[tuple[str, list[str], int | None]] = []
    if are_installed("skopeo"):
        transport = "oci" if form == "layout" else form.replace("_", "-")
        image = f"{transport}:{source}"
        works.append(("skopeo copy to dir:", [*SKOPEO, image, f"dir:{target}"], None))
        if form != "docker_archive":  # skopeo would compress its layers, which is not comparable
            works.append(("skopeo copy to oci:", [*SKOPEO, image, f"oci:{target}:real"], None))
    if are_installed("podman") and form != "layout":
        # podman also unpacks the layers, because images in its storage are folders.
        storage = ["--root", f"{target}/root", "--runroot", f"{target}/run", "--storage-driver", "vfs"]
        works.append(("podman load (vfs)", ["podman", *storage, "load", "-q", "-i", str(source)], 1))
    if are_installed("regctl"):
        if form == "layout":
            command = ["regctl", "image", "copy", f"ocidir://{source}:{TAG}", f"ocidir://{target}:1"]
            works.append(("regctl image copy", command, None))
        else:
            command = ["regctl", "image", "import", f"ocidir://{target}:1", str(source)]
            works.append(("regctl image import", command, 1 if form == "docker_archive" else None))
    if are_installed("oras") and form != "docker_archive":
        copy = ["oras", "copy", "--from-oci-layout", f"{source}:{TAG}", "--to-oci-layout", f"{target}:1"]
        works.append(("oras copy", copy, None))
    return [
        Work("new", runner, partial(run, *command), count, (), lambda: delete_paths(target), most)
        for runner, command, most in works
    ]


def exports(plan: Plan) -> None:
    """Export the image in each form."""
    place = plan.folder("export")
    run_in_child(import_image, place / "cache", plan.image.docker_archive)
    run_in_child(import_image, place / "compressed", plan.image.oci_archive)
    for form, cache, source in (
        ("docker-archive", place / "cache", plan.image.docker_archive),
        ("oci-archive", place / "compressed", plan.image.oci_archive),
        ("oci-dir", place / "compressed", plan.image.layout),
    ):
        print(f"### to {form}, {measure_size(source) / 1e6:.0f} MB\n")
        print_works(take_turns(_make_export_works(form, cache, source, plan.image.layout, place), plan.rounds))


def _make_export_works(form: str, cache: Path, source: Path, layout: Path, place: Path) -> list[Work]:
    target, count = place / "target", measure_size(source)

    def clear() -> None:
        delete_paths(target)

    whole = cachedb("--dir", cache, "export", "--format", form, NAME, target)
    peers: list[tuple[str, list[str]]] = []
    if are_installed("skopeo"):
        to = {"docker-archive": f"docker-archive:{target}:{NAME}", "oci-archive": f"oci-archive:{target}:{NAME}"}
        peers.append(("skopeo copy", [*SKOPEO, f"oci:{layout}:{TAG}", to.get(form, f"oci:{target}:{NAME}")]))
    if are_installed("regctl") and form == "oci-archive":
        peers.append(("regctl image export", ["regctl", "image", "export", f"ocidir://{layout}:{TAG}", str(target)]))
    if form == "oci-dir":
        copying = Work(
            "copy with fsync", "limit", lambda: copy_with_fsync(list_files(source), target), count, before=clear
        )
        limits = [copying]
        link = "cachedb, open process, link"
        ours = [
            Work(
                "export",
                "cachedb, open process",
                lambda: run_in_child(export_image, cache, target, form),
                count,
                (),
                clear,
            ),
            Work("export", link, lambda: run_in_child(export_image, cache, target, form, True), count, (), clear),
            Work("export", "cachedb export --link", lambda: run(*whole, "--link"), count, (), clear),
        ]
    else:
        # An export is on the disk before it returns, so the comparison uses fsync too.
        copying = Work("copy with fsync", "limit", lambda: copy_with_fsync([source], target), count, before=clear)
        no_fsync = "for comparison, no fsync"
        limits = [
            copying,
            Work("copy_file_range", no_fsync, lambda: copy_without_fsync(source, target), count, before=clear),
            Work("sendfile", no_fsync, lambda: send_file(source, target), count, before=clear),
        ]
        ours = [
            Work(
                "export",
                "cachedb, open process",
                lambda: run_in_child(export_image, cache, target, form),
                count,
                (),
                clear,
            ),
            Work("export", "cachedb export", lambda: run(*whole), count, (), clear),
        ]
    for one in ours:
        one.beside = [compare_with_limit(copying, want=None if form == "oci-dir" else 0.9)]
    others = [Work("export", runner, partial(run, *command), count, (), clear) for runner, command in peers]
    return limits + ours + others


def verify(plan: Plan) -> None:
    """Verify a cache that contains the image."""
    cache = plan.folder("verify") / "cache"
    run_in_child(import_image, cache, plan.image.docker_archive)
    count = measure_size(cache / "blobs")
    hashing = Work("sha256, all cores", "limit", lambda: hash_on_all_cores(list_files(cache / "blobs")), count)
    limits = [compare_with_limit(hashing, want=0.9)]
    works = [
        hashing,
        Work("verify", "cachedb, open process", lambda: run_in_child(_verify_cache, cache), count, limits),
        Work("verify", "cachedb verify", lambda: run(*cachedb("--dir", cache, "verify")), count, limits),
    ]
    print_works(take_turns(works, plan.rounds))


def processes(plan: Plan) -> None:
    """Import eight images with eight processes at once, and with one process in sequence."""
    place = plan.folder("processes")
    archives = [place / f"{number}.tar" for number in range(_PROCESSES)]
    each = plan.bytes // _PROCESSES
    for number, archive in enumerate(archives):
        write_docker_archive(archive, f"image-{number}:1", [each // 2] * 2, seed=number + 1)
    cache, copied, count = place / "cache", place / "copied", sum(measure_size(archive) for archive in archives)
    hashing = Work("sha256, all cores", "limit", lambda: hash_on_all_cores(archives), count)
    copying = Work(
        "copy with fsync",
        "limit",
        lambda: copy_with_fsync(archives, copied),
        count,
        before=lambda: delete_paths(copied),
    )
    commands = [cachedb("--dir", cache, "import", archive) for archive in archives]

    def run_in_sequence() -> Cost:
        costs = [run(*command) for command in commands]
        return add_costs(costs, sum(one.seconds for one in costs))

    def clear() -> None:
        delete_paths(cache)

    limits = compare_with_limit(hashing, copying)
    one = Work("8 images", "one open process", lambda: _import_with(1, cache, archives), count, [limits], clear)
    whole = Work("8 images", "cachedb import, in sequence", run_in_sequence, count, [limits], clear)
    works = [
        hashing,
        copying,
        one,
        Work(
            "8 images",
            "8 open processes",
            lambda: _import_with(_PROCESSES, cache, archives),
            count,
            [compare_speed(one, want=1.6), limits],
            clear,
        ),
        whole,
        Work(
            "8 images",
            "cachedb import, 8 at once",
            lambda: run_together(commands),
            count,
            [compare_speed(whole, want=1.6), limits],
            clear,
        ),
    ]
    print_works(take_turns(works, plan.rounds))


def _import_with(count: int, cache: Path, archives: list[Path]) -> Cost:
    """Open the cache in ``count`` processes, then let each import its share of the archives."""
    context = get_context("spawn")
    ready = context.Barrier(count + 1)
    costs: SimpleQueue[Cost] = context.SimpleQueue()
    running = [
        context.Process(target=_import_when_ready, args=(cache, archives[number::count], ready, costs))
        for number in range(count)
    ]
    for process in running:
        process.start()
    ready.wait(60)
    began = time.perf_counter()
    each = [costs.get() for _ in running]
    taken = time.perf_counter() - began
    for process in running:
        process.join()
    return add_costs(each, taken)


def _import_when_ready(cache: Path, archives: list[Path], ready: Barrier, costs: SimpleQueue[Cost]) -> None:
    from cachedb import Cache
    from cachedb.transports.archive import read

    assert read
    with Cache.open(cache) as opened:
        ready.wait(60)
        costs.put(measure_cost(lambda: [opened.cache_from_tar(path) for path in archives]))
