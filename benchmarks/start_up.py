"""Measure the start-up of processes that do almost nothing."""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.archives import import_image
from benchmarks.measure import Work, cachedb, compare_time, print_works, run, run_in_child, take_turns
from benchmarks.plan import Plan
from benchmarks.real_images import NAME, write_docker_archive


def start_up(plan: Plan) -> None:
    """Compare commands with the import of the packages that they need."""
    place = plan.folder("start-up")
    write_docker_archive(place / "small.tar", NAME, [10_000])
    run_in_child(import_image, place / "cache", place / "small.tar")
    click = Work("import click", "python", lambda: run(sys.executable, "-c", "import click"))
    both = Work("import sqlalchemy, click", "python", lambda: run(sys.executable, "-c", "import sqlalchemy, click"))
    works = [Work("nothing", "python", lambda: run(sys.executable, "-c", "pass")), click, both]
    for words, limit, want in (
        (["--version"], click, 1.3),
        (["--help"], click, 1.3),
        (["exists", NAME], both, 1.3),
        (["ls", "-q"], both, None),
        (["stats"], both, None),
    ):
        command = cachedb("--dir", place / "cache", *words)
        beside = [compare_time(limit, want)]
        works.append(Work(" ".join(words[:2]), "cachedb", partial(run, *command), beside=beside))
    print_works(take_turns(works, plan.rounds if plan.quick else plan.rounds * 4))  # short works need more rounds
