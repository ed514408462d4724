"""cachedb measured beside every peer that is installed, and beside what the machine can do, in one run.

python -m benchmarks [--quick] [--only WORD ...] [--rounds N] [--images N] [--archive FILE] [--directory DIR]

Prints a table for each section: medians, spread, CPU seconds, the memory of the largest process, and ratios to
works of the same run; beside a ratio stands what is wanted of it. Works take turns. Images are made of the machine's
own files, or are the one in --archive. About an hour and 10 GB of disk; --quick takes some minutes, with smaller
images and caches.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import adopt, archives, many_images, registry, reports, start_up, stores, upgrade
from benchmarks.machine import print_machine
from benchmarks.plan import Plan

SECTIONS: dict[str, Callable[[Plan], None]] = {
    "start-up": start_up.start_up,
    "import": archives.imports,
    "export": archives.exports,
    "verify": archives.verify,
    "processes": archives.processes,
    "stores": stores.stores,
    "add-and-remove": many_images.add_and_remove,
    "lists": many_images.lists,
    "lookups": many_images.lookups,
    "sweep": many_images.sweep,
    "collect": many_images.collect,
    "registry": registry.registry,
    "reports": reports.reports,
    "upgrade": upgrade.upgrade,
    "adopt": adopt.adopt,
}


def main() -> None:
    """Parse, measure, print."""
    words = ", ".join(SECTIONS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller images and caches, and one round")
    parser.add_argument("--only", nargs="+", metavar="WORD", help=f"sections whose name has one of the words: {words}")
    parser.add_argument("--rounds", type=int, help="how often each work is done (5; with --quick 1)")
    parser.add_argument("--images", type=int, help="of the largest cache (100000; with --quick 1000)")
    parser.add_argument("--archive", type=Path, help="an image to measure with, instead of one that is made")
    parser.add_argument("--directory", type=Path, help="where to work; its file system is what is measured")
    options = parser.parse_args()
    chosen = [name for name in SECTIONS if not options.only or any(word in name for word in options.only)]
    if not chosen:
        parser.error(f"there is no section of that name: they are {words}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of the end of the block, that cleans up
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode; a checkout gets it here
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cachedb-benchmarks-", dir=options.directory) as folder:
        plan = Plan(
            place=Path(folder).resolve(),
            quick=options.quick,
            rounds=options.rounds or (1 if options.quick else 5),
            images=options.images or (1_000 if options.quick else 100_000),
            archive=options.archive,
        )
        print(f"`python -m benchmarks {' '.join(sys.argv[1:])}`\n")
        print_machine(plan.place)
        for name in chosen:
            print(f"## {name}\n", flush=True)
            SECTIONS[name](plan)
        print(
            f"All of it took {(time.monotonic() - began) / 60:.0f} minutes; load at its end {os.getloadavg()[0]:.1f}."
        )


if __name__ == "__main__":
    main()
