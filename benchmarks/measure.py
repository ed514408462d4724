"""Time works in turns, as whole processes or inside an open process, and print tables of the results."""

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
    """The time, memory and disk writes of a work."""

    seconds: float
    cpu: float  # seconds, of all cores and children
    peak: int  # bytes of memory, of the largest process
    written: int  # bytes, to the page cache


class Failed(Exception):
    """A command failed; the message is its output."""


def cachedb(*arguments: str | Path) -> list[str]:
    """Return the command line of a cachedb command."""
    script = Path(sys.executable).with_name("cachedb")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "cachedb"]
    return [*command, *map(str, arguments)]


def run(*command: str | Path) -> Cost:
    """Run a command without output, and return its cost."""
    return run_together([[str(word) for word in command]])


def run_together(commands: list[list[str]]) -> Cost:
    """Run commands in parallel without output until the last has ended, and return their cost."""
    launch = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), json.dumps(commands)]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(done.stderr.strip()[-1000:])
    return Cost(*json.loads(done.stdout))


def run_in_child(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function in a new process, and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **named).result()


def measure_seconds(action: Callable[[], object]) -> float:
    """Run an action, and return the seconds it took."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure_cost(action: Callable[[], object]) -> Cost:
    """Run an action in this process, and return its cost; the memory is the peak of the whole process."""
    cpu, written = _get_usage()
    taken = measure_seconds(action)
    cpu_after, written_after = _get_usage()
    return Cost(taken, cpu_after - cpu, peak_memory(), written_after - written)


def add_costs(costs: Sequence[Cost], taken: float) -> Cost:
    """Return the total cost of several processes that took ``taken`` seconds in all."""
    cpu, written = sum(one.cpu for one in costs), sum(one.written for one in costs)
    return Cost(taken, cpu, max(one.peak for one in costs), written)


def _get_usage() -> tuple[float, int]:
    """Return the CPU seconds and the bytes written of this process and its children."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both), sum(one.ru_oublock * 512 for one in both)


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, since its own start."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


@dataclass(eq=False)
class Work:
    """A work to time, the program that runs it, and the ratios to print."""

    what: str
    runner: str
    action: Callable[[], Cost]
    size: int = 0  # bytes, to compute MB/s
    beside: Sequence[Callable[[Work], str]] = ()  # each returns the text of a ratio
    before: Callable[[], object] = lambda: None  # prepares the action, and is not timed
    most_rounds: int | None = None  # for a work that takes long
    costs: list[Cost] = field(default_factory=list)
    failure: str = ""

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(cost.seconds for cost in self.costs) if self.costs else math.nan


def compare_with_limit(*limits: Work, want: float | None = None) -> Callable[[Work], str]:
    """Return a function that formats the speed of a work as a fraction of the slowest limit's speed."""

    def format_ratio(work: Work) -> str:
        return f"{max(limit.median for limit in limits) / work.median:.2f} of the limit{_at_least(want)}"

    return format_ratio


def compare_speed(other: Work, want: float | None = None) -> Callable[[Work], str]:
    """Return a function that formats the speed of a work divided by the speed of another."""
    return lambda work: f"{other.median / work.median:.2f} times as fast as {other.runner}{_at_least(want)}"


def compare_time(other: Work, want: float | None = None) -> Callable[[Work], str]:
    """Return a function that formats the time of a work divided by the time of another."""
    return lambda work: f"{work.median / other.median:.2f} times `{other.what}`{_at_most(want)}"


def subtract_time(other: Work, want: float | None = None) -> Callable[[Work], str]:
    """Return a function that formats the time of a work minus the time of another."""
    return lambda work: f"{work.median - other.median:+.3f} s beyond {other.what}{_at_most(want, ' s')}"


def _at_least(want: float | None) -> str:
    return "" if want is None else f" (want ≥ {want:.2f})"


def _at_most(want: float | None, unit: str = "") -> str:
    return "" if want is None else f" (want ≤ {want:g}{unit})"


def take_turns(works: Iterable[Work], rounds: int, *, warm: bool = True) -> list[Work]:
    """Run all works in turns, ``rounds`` times; ``warm`` adds a first round to warm the page cache."""
    works = list(works)
    for turn in range(0 if warm else 1, rounds + 1):
        print_note(f"  round {turn} of {rounds}, {len(works)} works")
        for work in works:
            most = work.most_rounds
            if work.failure or (most is not None and not 0 < turn <= most):
                continue
            try:
                work.before()
                os.sync()  # so that this work does not wait for writes of another
                taken = work.action()
            except Exception as error:  # a long run continues with the other works
                work.failure = str(error)
                print_note(f"  {work.what}, {work.runner} failed: {error}")
                continue
            if turn:
                work.costs.append(taken)
    return works


def print_note(text: str) -> None:
    """Print a line of progress on stderr."""
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
                    "; ".join(format_ratio(work) for format_ratio in work.beside),
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
    wants: tuple[float | None, float | None] = (None, None)  # targets in seconds: median, 99th percentile
    ratio: str = ""

    def extend(self, more: Calls) -> None:
        """Add the calls of another turn."""
        self.each += more.each
        self.cost = add_costs([self.cost, more.cost], self.cost.seconds + more.cost.seconds)

    @property
    def median(self) -> float:
        """The median of the calls' seconds."""
        return statistics.median(self.each)

    @property
    def slow(self) -> float:
        """The 99th percentile of the calls' seconds."""
        return sorted(self.each)[math.ceil(len(self.each) * 0.99) - 1]


def print_calls(calls: Sequence[Calls]) -> None:
    """Print a table of calls, in milliseconds."""

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


def delete_paths(*paths: Path) -> None:
    """Delete files and folders, if they exist."""
    for path in paths:
        if path.is_dir():
            # podman's storage may have read-only folders.
            subprocess.run(["chmod", "-R", "u+w", str(path)], check=False, stderr=subprocess.DEVNULL)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# The limits of the machine: it hashes or copies the same bytes, and does nothing else.


def hash_on_all_cores(paths: Sequence[Path]) -> Cost:
    """Hash parts of files on all cores; each part has its own sha256."""
    return run_in_child(_hash_parts, list(paths))


def _hash_parts(paths: list[Path]) -> Cost:
    import hashlib
    from concurrent.futures import ThreadPoolExecutor

    part = 128 * 1024  # bytes; a larger part leaves the processor's cache before it is hashed

    def hash_part(path: Path, start: int, end: int) -> None:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(part))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end and (count := file.readinto(buffer[: min(part, end - start)])):
                digest.update(buffer[:count])
                start += count

    share = 16 * 2**20  # bytes of a file; small enough that all cores end at the same time
    parts = []
    for path in paths:
        size = path.stat().st_size
        parts += [(path, start, min(size, start + share)) for start in range(0, size, share)]
    with ThreadPoolExecutor(CORES) as pool:
        return measure_cost(lambda: list(pool.map(lambda arguments: hash_part(*arguments), parts)))


def copy_with_fsync(sources: Sequence[Path], target: Path) -> Cost:
    """Copy files into a new folder with `copy_file_range`, and fsync each."""
    return run_in_child(_copy_files, list(sources), target, True)


def copy_without_fsync(source: Path, target: Path) -> Cost:
    """Copy a file into a new folder with `copy_file_range`, without fsync."""
    return run_in_child(_copy_files, [source], target, False)


def _copy_files(sources: list[Path], target: Path, durably: bool) -> Cost:
    def copy() -> None:
        for source in sources:
            with source.open("rb") as reading, (target / source.name).open("wb") as writing:
                while os.copy_file_range(reading.fileno(), writing.fileno(), 2**30):
                    pass
                if durably:
                    os.fsync(writing.fileno())

    target.mkdir()
    return measure_cost(copy)


def send_file(source: Path, target: Path) -> Cost:
    """Copy a file with `sendfile`, without fsync."""
    return run_in_child(_send_file, source, target)


def _send_file(source: Path, target: Path) -> Cost:
    def send() -> None:
        with source.open("rb") as reading, target.open("wb") as writing:
            while os.sendfile(writing.fileno(), reading.fileno(), None, 2**30):
                pass

    return measure_cost(send)
