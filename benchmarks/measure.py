"""Timing, in turns, of whole processes and of work in one that is open already; and the tables that tell of it."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

CORES = len(os.sched_getaffinity(0))


class Cost(NamedTuple):
    """What a work took."""

    seconds: float
    cpu: float  # seconds, of all cores and of all children
    peak: int  # bytes of memory, of the largest process
    written: int  # bytes, to the disk's cache


class Failed(Exception):
    """A command did not do its work; says what it said."""


def cachedb(*arguments: str | Path) -> list[str]:
    """Return a command line of cachedb."""
    script = Path(sys.executable).with_name("cachedb")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "cachedb"]
    return [*command, *map(str, arguments)]


def run(*command: str | Path) -> Cost:
    """Run a command, quietly."""
    return run_together([[str(word) for word in command]])


def run_together(commands: list[list[str]]) -> Cost:
    """Run commands side by side, quietly, until the last has ended."""
    launch = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), json.dumps(commands)]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(done.stderr.strip()[-1000:])
    return Cost(*json.loads(done.stdout))


def in_child(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function in a new process: that has a cache open, say, and times what it does there."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **named).result()


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action took."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def cost(action: Callable[[], object]) -> Cost:
    """Return what an action of this process took; of memory, what the process had at most."""
    cpu, written = _used()
    taken = seconds(action)
    cpu_after, written_after = _used()
    return Cost(taken, cpu_after - cpu, peak_memory(), written_after - written)


def together(costs: Sequence[Cost], taken: float) -> Cost:
    """Return the cost of several processes that took so many seconds in all."""
    cpu, written = sum(one.cpu for one in costs), sum(one.written for one in costs)
    return Cost(taken, cpu, max(one.peak for one in costs), written)


def _used() -> tuple[float, int]:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both), sum(one.ru_oublock * 512 for one in both)


def peak_memory() -> int:
    """Return the bytes of memory that this process had at most, from its own start on."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


@dataclass(eq=False)
class Work:
    """Something to be timed: what is done, by whom, and what its time is told beside."""

    what: str
    runner: str
    action: Callable[[], Cost]
    size: int = 0  # bytes, of which MB/s are told
    beside: Sequence[Callable[[Work], str]] = ()
    before: Callable[[], object] = lambda: None  # is not timed
    most_rounds: int | None = None  # of what takes long
    costs: list[Cost] = field(default_factory=list)
    failure: str = ""

    @property
    def median(self) -> float:
        """The median of its seconds."""
        return statistics.median(cost.seconds for cost in self.costs) if self.costs else math.nan


def of_limit(*limits: Work, want: float | None = None) -> Callable[[Work], str]:
    """Tell a work's speed as a part of the limit's: of several works that which takes the longest."""

    def told(work: Work) -> str:
        return f"{max(limit.median for limit in limits) / work.median:.2f} of the limit{_at_least(want)}"

    return told


def as_fast_as(other: Work, want: float | None = None) -> Callable[[Work], str]:
    """Tell how many times as fast as another a work is."""
    return lambda work: f"{other.median / work.median:.2f} times as fast as {other.runner}{_at_least(want)}"


def times(other: Work, want: float | None = None) -> Callable[[Work], str]:
    """Tell how many times the time of another a work takes."""
    return lambda work: f"{work.median / other.median:.2f} times `{other.what}`{_at_most(want)}"


def beyond(other: Work, want: float | None = None) -> Callable[[Work], str]:
    """Tell how much longer than another a work takes."""
    return lambda work: f"{work.median - other.median:+.3f} s beyond {other.what}{_at_most(want, ' s')}"


def _at_least(want: float | None) -> str:
    return "" if want is None else f" (want ≥ {want:.2f})"


def _at_most(want: float | None, unit: str = "") -> str:
    return "" if want is None else f" (want ≤ {want:g}{unit})"


def take_turns(works: Iterable[Work], rounds: int, *, warm: bool = True) -> list[Work]:
    """Do all works in turns, so many times; once more before if the page cache is to be warm."""
    works = list(works)
    for turn in range(0 if warm else 1, rounds + 1):
        note(f"  round {turn} of {rounds}, of {len(works)} works")
        for work in works:
            most = work.most_rounds
            if work.failure or (most is not None and not 0 < turn <= most):
                continue
            try:
                work.before()
                os.sync()  # what another has left unwritten is not for this one to wait for
                taken = work.action()
            except Exception as error:  # one that fails must not cost a long run its other works
                work.failure = str(error)
                note(f"  {work.what}, {work.runner} failed: {error}")
                continue
            if turn:
                work.costs.append(taken)
    return works


def note(text: str) -> None:
    """Say on stderr what is done now."""
    print(text, file=sys.stderr, flush=True)


def print_works(works: Sequence[Work]) -> None:
    """Print works with their medians, spread and ratios."""
    rows = []
    for work in works:
        if work.failure:
            rows.append([work.what, work.runner, "failed: " + work.failure.splitlines()[-1], *[""] * 6])
        elif work.costs:
            all_seconds = [cost.seconds for cost in work.costs]
            rows.append(
                [
                    work.what,
                    work.runner,
                    f"{work.median:.3f}",
                    f"{min(all_seconds):.3f} to {max(all_seconds):.3f}",
                    f"{statistics.median(cost.cpu for cost in work.costs):.2f}",
                    f"{max(cost.peak for cost in work.costs) / 2**20:.0f}",
                    f"{statistics.median(cost.written for cost in work.costs) / 1e6:.1f}",
                    f"{work.size / work.median / 1e6:.0f}" if work.size else "",
                    "; ".join(told(work) for told in work.beside),
                ]
            )
    print_table(
        ["work", "runner", "median s", "min to max s", "CPU s", "peak MiB", "MB written", "MB/s", "ratio"], rows
    )


@dataclass(eq=False)
class Calls:
    """Many calls of one operation, in an open process."""

    what: str
    runner: str
    each: list[float]  # seconds
    cost: Cost
    wants: tuple[float | None, float | None] = (None, None)  # at most so many seconds: median, 99th percentile
    ratio: str = ""

    def extend(self, more: Calls) -> None:
        """Add calls that were made at another turn."""
        self.each += more.each
        self.cost = together([self.cost, more.cost], self.cost.seconds + more.cost.seconds)

    @property
    def median(self) -> float:
        """The median of the calls' seconds."""
        return statistics.median(self.each)

    @property
    def slow(self) -> float:
        """The 99th percentile of the calls' seconds."""
        return sorted(self.each)[math.ceil(len(self.each) * 0.99) - 1]


def print_calls(calls: Sequence[Calls]) -> None:
    """Print the calls of operations, in milliseconds."""

    def milliseconds(value: float, want: float | None = None) -> str:
        return f"{value * 1000:.2f}" + ("" if want is None else f" (want ≤ {want * 1000:g})")

    rows = [
        [
            one.what,
            one.runner,
            str(len(one.each)),
            milliseconds(one.median, one.wants[0]),
            milliseconds(one.slow, one.wants[1]),
            milliseconds(max(one.each)),
            f"{one.cost.cpu / len(one.each) * 1000:.2f}",
            f"{one.cost.peak / 2**20:.0f}",
            one.ratio,
        ]
        for one in calls
    ]
    columns = ["work", "runner", "times", "median ms", "99 % ms", "longest ms", "CPU ms each", "peak MiB", "ratio"]
    print_table(columns, rows)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    for row in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |")
    print(flush=True)


def empty(*paths: Path) -> None:
    """Delete files and folders, that may not be there."""
    for path in paths:
        if path.is_dir():
            # A folder of podman's storage may be closed to writing.
            subprocess.run(["chmod", "-R", "u+w", str(path)], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# The limits: what the machine does with the same bytes, and nothing else.


def hash_on_all_cores(paths: Sequence[Path]) -> Cost:
    """Hash files in parts, as many at once as there are cores, each part a sha256 of its own."""
    return in_child(_hash_parts, list(paths))


def _hash_parts(paths: list[Path]) -> Cost:
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    part = 128 * 1024  # larger ones are no longer in the processor's cache when they are hashed

    def hash_part(path: Path, start: int, end: int) -> None:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(part))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end and (count := file.readinto(buffer[: min(part, end - start)])):
                digest.update(buffer[:count])
                start += count

    share = 16 * 2**20  # of a file: small enough that all cores end at the same time
    parts = []
    for path in paths:
        size = path.stat().st_size
        parts += [(path, start, min(size, start + share)) for start in range(0, size, share)]
    with ThreadPoolExecutor(CORES) as pool:
        return cost(lambda: list(pool.map(lambda arguments: hash_part(*arguments), parts)))


def copy_with_fsync(sources: Sequence[Path], target: Path) -> Cost:
    """Copy files into a new folder by `copy_file_range`, durably."""
    return in_child(_copy_files, list(sources), target, True)


def copy_without_fsync(source: Path, target: Path) -> Cost:
    """Copy a file into a new folder by `copy_file_range`."""
    return in_child(_copy_files, [source], target, False)


def _copy_files(sources: list[Path], target: Path, durably: bool) -> Cost:
    def copy() -> None:
        for source in sources:
            with source.open("rb") as reading, (target / source.name).open("wb") as writing:
                while os.copy_file_range(reading.fileno(), writing.fileno(), 2**30):
                    pass
                if durably:
                    os.fsync(writing.fileno())

    target.mkdir()
    return cost(copy)


def send_file(source: Path, target: Path) -> Cost:
    """Copy a file by `sendfile`."""
    return in_child(_send_file, source, target)


def _send_file(source: Path, target: Path) -> Cost:
    def send() -> None:
        with source.open("rb") as reading, target.open("wb") as writing:
            while os.sendfile(writing.fileno(), reading.fileno(), None, 2**30):
                pass

    return cost(send)
