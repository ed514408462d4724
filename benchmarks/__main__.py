"""Compare cachedb with every installed peer and with the limits of the machine, in one run.

python -m benchmarks [--quick] [--only WORD ...] [--rounds N] [--images N] [--archive FILE] [--directory DIR]

This prints a table for each section: medians, spread, CPU seconds, the memory of the largest process, and ratios to
works of the same run. A target, if there is one, follows its ratio. Works take turns. The image is made of the
machine's own files, or comes from --archive. A run takes about an hour and 10 GB of disk. --quick takes some minutes,
with smaller images and caches.
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

from benchmarks import adopt, archives, many_images, prune, registry, reports, start_up, stores, upgrade
from benchmarks.machine import print_machine
from benchmarks.plan import Plan

SECTIONS: dict[str, Callable[[Plan], None]] = {
    "start-up": start_up.start_up,
    "import": archives.imports,
    "export": archives.exports,
    "verify": archives.verify,
    "processes": archives.processes,
    "stores": stores.stores,
    "add-and-remove": many_images.measure_changes,
    "lists": many_images.measure_lists,
    "lookups": many_images.measure_lookups,
    "sweep": many_images.sweep,
    "collect": many_images.collect,
    "registry": registry.registry,
    "reports": reports.reports,
    "prune": prune.prune,
    "upgrade": upgrade.upgrade,
    "adopt": adopt.adopt,
}


def main() -> None:
    """Parse the arguments, run the sections, and print their tables."""
    words = ", ".join(SECTIONS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller images and caches, and one round")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help=f"only sections whose name contains one of the words: {words}"
    )
    parser.add_argument("--rounds", type=int, help="number of times that each work runs (5; with --quick 1)")
    parser.add_argument("--images", type=int, help="images in the largest cache (100000; with --quick 1000)")
    parser.add_argument(
        "--archive", type=Path, help="archive of the image to measure with; the default is a made image"
    )
    parser.add_argument("--directory", type=Path, help="folder to work in; the benchmark measures its file system")
    options = parser.parse_args()
    chosen = [name for name in SECTIONS if not options.only or any(word in name for word in options.only)]
    if not chosen:
        parser.error(f"no section matches {' '.join(options.only)!r}: use a word from {words}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the `with` block cleans up
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # let a checkout have bytecode, as an installed package has
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
        print(f"The run took {(time.monotonic() - began) / 60:.0f} minutes; load at the end {os.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    main()
