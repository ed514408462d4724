"""Compare the checkout with an earlier commit: run the same work in turns, and print the ratios.

    python -m benchmarks.pair COMMIT [--rounds N] [--only WORD ...] [--size BYTES] [--directory DIR]

This prints the median of the ratios. Above 1.00, the checkout is slower. Each work runs in a separate process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from benchmarks.measure import print_note, print_table
from benchmarks.real_images import NAME, write_docker_archive

CHECKOUT = Path(__file__).resolve().parent.parent

PREAMBLE = """
import os, sys, time, shutil, subprocess, hashlib
from pathlib import Path
archive, name = sys.argv[1:]
place = Path.cwd()
def timed(action, times=1):
    os.sync()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    print(min(taken))
def command(*words):
    subprocess.run([sys.executable, "-m", "cachedb", "--dir", "filled", *words], check=True, stdout=subprocess.DEVNULL)
def opened(path="filled"):
    from cachedb import Cache
    return Cache.open(path)
"""

FILL = """
with opened() as cache:
    cache.cache_from_tar(archive, name)
    for number in range(100):
        cache.tag(name, f"{name}.{number}")
"""

WORKS = {
    "--version": 'timed(lambda: command("--version"), 5)',
    "exists": 'timed(lambda: command("exists", name), 5)',
    "ls": 'timed(lambda: command("ls"), 5)',
    "show": 'timed(lambda: command("show", name), 5)',
    "open": """
        import cachedb.cache
        timed(lambda: opened().close(), 20)
        """,
    "has_blob": """
        with opened() as cache:
            digest = next(iter(cache.list_blobs()))
            cache.has_blob(digest)
            timed(lambda: [cache.has_blob(digest) for _ in range(5000)], 5)
        """,
    "images, in an open process": """
        with opened() as cache:
            timed(lambda: [cache.list_manifests() for _ in range(50)], 5)
        """,
    "write 300 blobs": """
        with opened("new") as cache:
            cache.add_blob(b"first")
            timed(lambda: [cache.add_blob(b"%d" % number) for number in range(300)])
        """,
    "tag 300 times": """
        with opened("new") as cache:
            cache.cache_from_tar(archive, name)
            timed(lambda: [cache.tag(name, f"{name}-{number}") for number in range(300)])
        """,
    "import, new": """
        with opened("new") as cache:
            timed(lambda: cache.cache_from_tar(archive, name))
        """,
    "import, again": """
        with opened() as cache:
            timed(lambda: cache.cache_from_tar(archive, name), 3)
        """,
    "export docker-archive": """
        with opened() as cache:
            timed(lambda: cache.export(name, "out.tar", format="docker-archive"), 3)
        """,
    "export oci-archive": """
        with opened() as cache:
            timed(lambda: cache.export(name, "out.oci.tar", format="oci-archive"), 3)
        """,
    "export oci-dir": """
        with opened() as cache:
            timed(lambda: cache.export(name, "out.oci", format="oci-dir"))
        """,
    "verify": """
        with opened() as cache:
            timed(lambda: cache.verify(), 2)
        """,
    "gc": """
        with opened() as cache:
            timed(lambda: [cache.collect_garbage() for _ in range(20)])
        """,
}


def main() -> None:
    """Parse the arguments, run the works in turns, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="commit to compare the checkout with")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of runs of each work (10)")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help=f"only works whose name contains one of the words: {', '.join(WORKS)}"
    )
    parser.add_argument("--size", type=int, default=200_000_000, help="bytes of the image (200000000)")
    parser.add_argument("--directory", type=Path, help="folder to work in; the benchmark measures its file system")
    options = parser.parse_args()
    chosen = {
        name: code for name, code in WORKS.items() if not options.only or any(word in name for word in options.only)
    }
    with tempfile.TemporaryDirectory(prefix="cachedb-pair-", dir=options.directory) as folder:
        place = Path(folder).resolve()
        before = place / "before"
        git = ["git", "-C", str(CHECKOUT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), options.commit], check=True)
        try:
            archive = place / "archive.tar"
            write_docker_archive(archive, NAME, [options.size // 4] * 4)
            compare_trees(chosen, [before, CHECKOUT], place, archive, options.rounds)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)


def compare_trees(works: dict[str, str], trees: list[Path], place: Path, archive: Path, rounds: int) -> None:
    """Run each work in both trees in turns, and print the ratios."""
    for number, tree in enumerate(trees):
        run_in(tree, place / f"work-{number}", FILL, archive)
    rows = []
    for name, code in works.items():
        print_note(f"  {name}")
        pairs: list[list[float]] = []
        for turn in range(rounds + 1):  # the first turn warms the page cache
            order = [0, 1] if turn % 2 else [1, 0]
            taken = {number: run_in(trees[number], place / f"work-{number}", code, archive) for number in order}
            if turn:
                pairs.append([taken[0], taken[1]])
        ratios = sorted(after / before for before, after in pairs)
        best = [min(pair[number] for pair in pairs) for number in (0, 1)]
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        figures = [f"{best[0] * 1000:.2f}", f"{best[1] * 1000:.2f}", f"{best[1] / best[0]:.3f}"]
        rows.append([name, *figures, f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"])
    print_table(["work", "before, best ms", "after, best ms", "ratio of best", "median ratio", "middle half"], rows)


def run_in(tree: Path, place: Path, code: str, archive: Path) -> float:
    """Run code with the cachedb of a tree, and return the seconds that it prints.

    The code runs in a folder that is empty except for the cache `filled`, which stays for the next run.
    """
    place.mkdir(exist_ok=True)
    for old in place.iterdir():
        if old.name != "filled":
            subprocess.run(["rm", "-rf", str(old)], check=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "HOME": str(place)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), str(archive), NAME]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout or 0)


if __name__ == "__main__":
    main()
