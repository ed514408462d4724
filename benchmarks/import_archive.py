"""How fast an archive is imported, beside skopeo and beside what the machine can do, in one run.

    python benchmarks/import_archive.py ARCHIVE [ROUNDS]

ARCHIVE is a docker-archive. In turns: `cachedb import` into a new cache, and again with all of it stored;
`skopeo copy` to a `dir:`; and, as the limits, the archive's sha256 in one thread and a copy with fsync. The
figures are medians.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CACHEDB = [sys.executable, "-m", "cachedb"]


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(*command: str) -> None:
    """Run a command, quietly."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def hash_file(path: Path) -> None:
    """Compute a file's sha256."""
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file durably."""
    shutil.copyfile(source, target)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    """Measure, and print a table."""
    archive = Path(sys.argv[1]).absolute()
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cached, copied = place / "cache", place / "skopeo"
        work: dict[str, Callable[[], object]] = {
            "cachedb import, new": lambda: run(*CACHEDB, "--dir", str(cached), "import", str(archive)),
            "cachedb import, again": lambda: run(*CACHEDB, "--dir", str(cached), "import", str(archive)),
            "sha256, one thread": lambda: hash_file(archive),
            "copy with fsync": lambda: copy_file(archive, place / "copy"),
        }
        if shutil.which("skopeo"):
            work["skopeo copy to dir:"] = lambda: run(
                "skopeo", "--insecure-policy", "copy", "-q", f"docker-archive:{archive}", f"dir:{copied}"
            )
        for turn in range(rounds + 1):  # the first warms the page cache
            shutil.rmtree(cached, ignore_errors=True)
            shutil.rmtree(copied, ignore_errors=True)
            for name, action in work.items():
                taken = seconds(action)
                if turn:
                    times.setdefault(name, []).append(taken)
    size = archive.stat().st_size
    first = statistics.median(times["cachedb import, new"])
    python = sys.version.split()[0]
    print(f"{archive.name}, {size / 1e6:.0f} MB, {os.cpu_count()} cores, {rounds} rounds, Python {python}\n")
    print("| work | median s | min to max s | MB/s | ratio to the first |")
    print("| --- | --- | --- | --- | --- |")
    for name, runs in times.items():
        median = statistics.median(runs)
        spread = f"{min(runs):.2f} to {max(runs):.2f}"
        print(f"| {name} | {median:.2f} | {spread} | {size / median / 1e6:.0f} | {median / first:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\nThe largest process of them all used {peak:.0f} MiB of memory.")


if __name__ == "__main__":
    main()
