"""Power cuts against a cache: `python -m tests.attacks.powercuts --states 50000 --seed 1 --jobs 2`.

A scenario is a process that acknowledges its steps, with the state that must hold after each step. The attack records
the process and cuts the recording at any event. The cache that is left must open and keep P1 to P6. Its images and
blobs must be those after the last acknowledged step, or after the step that was running (P7).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cachedb import Cache
from cachedb.content import collect as collecting
from tests.conftest import files_of, stored_rows
from tests.support import make, powercut
from tests.support.promises import check

STEPS_PER_LANE = 100  # acknowledgement numbers per thread: 203 is the fourth step of the third thread

A, B, C, D, E = (
    make.image(1, 2),
    make.image(2, 3, 4),
    make.image(1, 5),
    make.image(2, 6, 7, 8, size=9000),
    make.image(7),
)
LOOSE, OTHER, NEW = b"attached to an image", b"not referenced", b"stored after the power cut"
CONTENT = {
    **{digest: data for made in (A, B, C, D, E) for digest, data in made.blobs.items()},
    **{make.digest_of(data): data for data in (LOOSE, OTHER)},
}


class Known(NamedTuple):
    """The state that must hold after a step, as far as one thread's images are concerned."""

    images: dict[str, tuple[str, frozenset[str]]]  # by name: the manifest's digest, and the associated blobs
    blobs: frozenset[str]  # the blobs that must be stored, with their content


class Step(NamedTuple):
    """An operation, and the state that must hold once it is acknowledged."""

    do: Callable[[], object]
    known: Known


class Lane:
    """The steps of one thread, and the state that must hold after each."""

    def __init__(self, before: Known) -> None:
        self._images, self._loose, self._missing = dict(before.images), set[str](), set[str]()
        self.before = before
        self.steps: list[Step] = []

    def add(
        self,
        do: Callable[[], object],
        *,
        images: Mapping[str, make.ImageContent | None] | None = None,
        attached: tuple[str, bytes] | None = None,
        loose: Iterable[bytes] = (),
        missing: Iterable[bytes] = (),
        stored: Iterable[bytes] = (),
        closed: bool = False,
    ) -> None:
        """Add a step.

        Args:
            do: the operation.
            images: the images that it saves or, with None, removes.
            attached: the name of an image, and a blob that it attaches to the image.
            loose: blobs that it stores, and that stay until an image uses them or the cache is closed.
            missing: blobs of the images that are not stored yet.
            stored: blobs that were missing and that it stores.
            closed: whether it closes the cache, after which loose blobs may be collected.
        """
        for name, made in (images or {}).items():
            if made is None:
                del self._images[name]
                continue
            if self._images.get(name, ("",))[0] != made.digest:
                self._images[name] = (made.digest, frozenset(made.blobs))
            self._loose -= made.blobs.keys()
        if attached:
            digest, closure = self._images[attached[0]]
            self._images[attached[0]] = (digest, closure | {make.digest_of(attached[1])})
            self._loose.discard(make.digest_of(attached[1]))
        self._loose.update(map(make.digest_of, loose))
        self._missing.update(map(make.digest_of, missing))
        self._missing.difference_update(map(make.digest_of, stored))
        if closed:
            self._loose.clear()
        self.steps.append(Step(do, known(self._images, self._loose, self._missing)))


def known(
    images: dict[str, tuple[str, frozenset[str]]], loose: Iterable[str] = (), missing: Iterable[str] = ()
) -> Known:
    """Return the state with these images and all their blobs, except for the missing ones."""
    closures = {digest for _, closure in images.values() for digest in closure}
    return Known(dict(images), frozenset(closures.union(loose).difference(missing)))


def saved(images: dict[str, make.ImageContent]) -> Known:
    """Return the state after these images were saved."""
    return known({name: (made.digest, frozenset(made.blobs)) for name, made in images.items()})


# Scenarios


class Opened:
    """A cache that one step opens and later steps use, and archives outside of the recorded directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.holds = ExitStack()

    def archive(self, name: str) -> Path:
        return self._directory.with_name(f"{self._directory.name}-{name}.tar")

    def open(self) -> None:
        self.cache = Cache.open(self._directory / "cache")

    def close(self) -> None:
        self.cache.close()

    def saving(self, data: bytes) -> Callable[[], object]:
        return lambda: self.cache.save_blob(make.digest_of(data), data)

    def adding(self, data: bytes) -> Callable[[], object]:
        return lambda: self.cache.add_blob(data)

    def saving_manifest(self, name: str, made: make.ImageContent) -> Callable[[], object]:
        return lambda: self.cache.save_manifest(name, made.manifest)

    def importing(self, name: str) -> Callable[[], object]:
        return lambda: self.cache.cache_from_tar(self.archive(name))

    def writing_layout(self, name: str, made: make.ImageContent) -> Callable[[], object]:
        """Return a step that writes a layout like another program, without a sync."""
        return lambda: make.write(self._directory / "layout", make.oci_files({name: made}))

    def linking(self) -> Callable[[], object]:
        return lambda: self.cache.cache_from_tar(self._directory / "layout", link=True)

    def removing(self, name: str) -> Callable[[], object]:
        return lambda: self.cache.remove_manifest(name)

    def collect(self) -> None:
        self.cache.collect_garbage()


HISTORY = {"kept:1": A, "gone:1": B}
NOTHING, BEFORE, AFTER_KILL = saved({}), saved(HISTORY), saved({"kept:1": A})


def write_archives(directory: Path) -> None:
    at = Opened(directory)
    make.write(at.archive("b"), make.oci_files({"b:1": B}))
    make.write(at.archive("c"), make.oci_files({"c:1": C}))
    # Compressed, so the import spools it in the cache's own folder first.
    at.archive("d").write_bytes(make.gzipped(make.tar_of(make.oci_files({"d:1": D}))))


def prepare_history(directory: Path) -> None:
    write_archives(directory)
    with Cache.open(directory / "cache") as cache:
        for name, made in HISTORY.items():
            for digest, data in made.blobs.items():
                cache.save_blob(digest, data)
            cache.save_manifest(name, made.manifest)
        cache.add_blob(OTHER)


def prepare_killed(directory: Path) -> None:
    """Kill this process, and leave what an open cleans up: trash, leases, ingest, half a publication."""
    prepare_history(directory)
    cache = Cache.open(directory / "cache")
    collecting.empty_trash = lambda database: []
    cache.remove_manifest("gone:1")
    cache.save_blob(make.digest_of(OTHER), OTHER)
    links, link = 0, os.link

    def kill_at_third_link(source: Path, target: str, **options: Any) -> None:
        nonlocal links
        links += 1
        if links == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        link(source, target, **options)

    os.link = kill_at_third_link  # type: ignore[assignment]
    cache.cache_from_tar(Opened(directory).archive("d"))


def new_cache(at: Opened) -> list[Lane]:
    """Return one thread that does every operation, from the first open on."""
    lane = Lane(NOTHING)
    lane.add(at.open)
    for data in (A.config, *A.layers):
        lane.add(at.saving(data), loose=[data])
    lane.add(at.saving_manifest("a:1", A), images={"a:1": A})
    lane.add(at.importing("b"), images={"b:1": B})
    lane.add(lambda: at.cache.tag("a:1", "a:stable"), images={"a:stable": A})
    for data in (C.config, *C.layers):
        lane.add(at.adding(data), loose=[data])
    lane.add(at.saving_manifest("a:1", C), images={"a:1": C})
    lane.add(at.adding(LOOSE), loose=[LOOSE])
    lane.add(lambda: at.cache.associate_blob_with_image("b:1", make.digest_of(LOOSE)), attached=("b:1", LOOSE))
    lane.add(lambda: at.holds.enter_context(at.cache.hold("b:1")))
    lane.add(at.removing("a:stable"), images={"a:stable": None})
    lane.add(at.removing("b:1"), images={"b:1": None})
    lane.add(at.holds.close)
    lane.add(at.collect)
    lane.add(at.adding(B.layers[1]), loose=[B.layers[1]])
    lane.add(at.importing("b"), images={"b:1": B})
    lane.add(at.removing("b:1"), images={"b:1": None})
    lane.add(at.adding(B.layers[2]), loose=[B.layers[2]])
    lane.add(at.saving_manifest("e:1", E), images={"e:1": E}, missing=[E.config, *E.layers])
    lane.add(at.saving(E.config), stored=[E.config])
    lane.add(at.saving(E.layers[0]), stored=E.layers)
    lane.add(at.close, closed=True)
    lane.add(at.open)
    lane.add(at.collect)
    lane.add(at.importing("d"), images={"d:1": D})
    lane.add(at.writing_layout("b:1", B))
    lane.add(at.linking(), images={"b:1": B})
    lane.add(at.close)
    return [lane]


def threads(at: Opened) -> list[Lane]:
    """Return threads that use one cache at once, which has images already."""
    importer, saver, remover = Lane(NOTHING), Lane(NOTHING), Lane(BEFORE)
    importer.add(at.importing("d"), images={"d:1": D})
    importer.add(at.removing("d:1"), images={"d:1": None})
    importer.add(at.importing("d"), images={"d:1": D})
    for data in (C.config, *C.layers):
        saver.add(at.saving(data), loose=[data])
    saver.add(at.saving_manifest("c:1", C), images={"c:1": C})
    saver.add(at.importing("c"), images={"c:1": C})
    saver.add(lambda: at.cache.tag("c:1", "c:2"), images={"c:2": C})
    saver.add(at.removing("c:1"), images={"c:1": None})
    remover.add(at.removing("gone:1"), images={"gone:1": None})
    remover.add(at.collect)
    remover.add(at.importing("b"), images={"b:1": B})
    remover.add(at.removing("b:1"), images={"b:1": None})
    return [importer, saver, remover]


def recovery(at: Opened) -> list[Lane]:
    """Return one thread that opens a cache after a process was killed, and repeats its work."""
    lane = Lane(AFTER_KILL)
    lane.add(at.open)
    lane.add(at.importing("d"), images={"d:1": D})
    lane.add(at.importing("b"), images={"b:1": B})
    lane.add(at.collect)
    lane.add(at.close)
    return [lane]


class Scenario(NamedTuple):
    """A preparation of the directory, and the lanes that then run, each in a thread."""

    prepare: Callable[[Path], None]
    lanes: Callable[[Opened], list[Lane]]


SCENARIOS = {
    "new": Scenario(write_archives, new_cache),
    "threads": Scenario(prepare_history, threads),
    "recovery": Scenario(prepare_killed, recovery),
}


# Recording


def run(scenario: str, directory: Path) -> None:
    """Do a scenario's steps, and acknowledge each on stdout."""
    failed: list[BaseException] = []

    def follow(number: int, lane: Lane) -> None:
        try:
            for place, step in enumerate(lane.steps):
                step.do()
                os.write(1, b"ack %d\n" % (number * STEPS_PER_LANE + place))
        except BaseException as error:
            failed.append(error)

    at = Opened(directory)
    lanes = SCENARIOS[scenario].lanes(at)
    if len(lanes) > 1:
        at.open()
    workers = [threading.Thread(target=follow, args=lane) for lane in enumerate(lanes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        raise failed[0]
    at.close()


def record(scenario: str, folder: Path, strace: str = "strace") -> powercut.Recording:
    """Prepare a scenario and record it, each in a new process."""
    directory = folder / scenario
    directory.mkdir()
    command = [sys.executable, "-m", "tests.attacks.powercuts"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    prepared = subprocess.run([*command, "--prepare", scenario, str(directory)], env=env, check=False)
    assert prepared.returncode == (-signal.SIGKILL if scenario == "recovery" else 0)
    steps = [*command, "--run", scenario, str(directory)]
    return powercut.record(steps, directory, strace=strace, leave_out=("-shm", ".test"), env=env)


# Checking


@functools.cache
def possible_states(scenario: str) -> list[list[Known]]:
    """Return, for each lane, the states that must hold before its first step and after each step."""
    lanes = SCENARIOS[scenario].lanes(Opened(Path("nowhere")))
    return [[lane.before, *(step.known for step in lane.steps)] for lane in lanes]


def mark_as_original(directory: Path) -> None:
    """Change the marker so that the cache takes this directory for the original one, and not for a copy."""
    path = directory / "cachedb.json"
    with suppress(FileNotFoundError, ValueError):
        marker = json.loads(path.read_text())
        if marker.get("inode") is not None:
            here = {"inode": path.stat().st_ino, "directory": directory.stat().st_ino}
            path.write_text(json.dumps({**marker, **here, "file_system": None, "boot": None, "generation": None}))


def check_cut(scenario: str, directory: Path, acks: Iterable[int]) -> None:
    """Open the cache that a power cut has left, and assert the acknowledged state and the promises."""
    acks = list(acks)
    mark_as_original(directory / "cache")
    with Cache.open(directory / "cache") as cache:
        rows, files = stored_rows(directory / "cache"), files_of(directory / "cache")
        assert rows.items() <= files.items(), "P1: every stored row has its file, of the right size"
        images, complete = {}, {}
        for image in cache.list_manifests():
            closure = frozenset(str(blob.digest) for blob in cache.get_image_blobs(image.name))
            images[str(image.name)], complete[str(image.name)] = (str(image.digest), closure), image.complete
        for number, steps in enumerate(possible_states(scenario)):
            done = sum(ack // STEPS_PER_LANE == number for ack in acks)
            last, next_one = steps[done], steps[min(done + 1, len(steps) - 1)]
            names = {name for step in steps for name in step.images}
            found = {name: images.pop(name) for name in names if name in images}
            assert found in (last.images, next_one.images), f"P7: {sorted(found)} after {done} steps of lane {number}"
            required = last.blobs & next_one.blobs if found == last.images else next_one.blobs
            for digest in required:
                assert digest in rows, f"P7: {digest} after {done} steps of lane {number}"
                assert cache.get_blob(digest) == CONTENT[digest], f"P7: {digest} has its content"
            for name, (digest, closure) in found.items():
                assert cache.get_manifest(name) == CONTENT[digest]
                assert complete[name] or not closure <= required, f"P7: {name} is complete"
        assert not images, f"P7: {sorted(images)} were never saved"
        cache.add_blob(NEW)  # the cache can still be written to
    check(directory / "cache")


class Violation(NamedTuple):
    """A state from which the cache did not recover."""

    scenario: str
    cut: powercut.Cut
    error: str


def attack(
    scenario: str,
    recording: powercut.Recording,
    scratch: Path,
    *,
    seed: int,
    count: int,
    job: int = 0,
    jobs: int = 1,
    most: int = 10,
) -> tuple[int, list[Violation]]:
    """Check one job's share of a recording's states; return how many, and the violations.

    Args:
        scenario: its name.
        recording: of the scenario.
        scratch: the folder where states are made.
        seed: of the choice of states.
        count: states of all jobs together.
        job: the number of this job, from 0.
        jobs: the number of jobs.
        most: the number of violations after which it stops.
    """
    checked, violations = 0, list[Violation]()
    directory = scratch / f"{scenario}-{job}"
    for cut in powercut.generate_states(recording, seed, count):
        if cut.number % jobs != job:
            continue
        powercut.write_state(cut.tree, directory)
        try:
            check_cut(scenario, directory, cut.acks)
        except Exception:
            violations.append(Violation(scenario, cut, traceback.format_exc()))
        powercut.remove_state(directory)
        checked += 1
        if len(violations) == most:
            break
    return checked, violations


# The command line


def save_violation(violation: Violation, folder: Path, seed: int) -> Path:
    """Save the state of a violation in a new folder, so that it can be checked again; return the folder."""
    directory = folder / f"{violation.scenario}-{violation.cut.number}"
    powercut.remove_state(directory)
    directory.mkdir(parents=True)
    powercut.write_state(violation.cut.tree, directory / "state")
    facts = {
        "scenario": violation.scenario,
        "seed": seed,
        "number": violation.cut.number,
        "acks": violation.cut.acks,
        "description": violation.cut.description.splitlines(),
        "error": violation.error.splitlines(),
    }
    (directory / "cut.json").write_text(json.dumps(facts, indent=2))
    return directory


def check_again(kept: Path) -> None:
    """Check a copy of a saved state."""
    facts = json.loads((kept / "cut.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "state"
        powercut.write_state(powercut.read_tree(kept / "state"), directory)
        check_cut(facts["scenario"], directory, facts["acks"])


def report(scenario: str, recording: powercut.Recording, scratch: Path, options: argparse.Namespace) -> int:
    """Attack with all jobs, print the violations, and return their number."""
    begun = time.monotonic()
    count = options.states // len(options.scenario)
    jobs = options.jobs
    with ProcessPoolExecutor(jobs) as pool:
        work = [
            pool.submit(attack, scenario, recording, scratch, seed=options.seed, count=count, job=job, jobs=jobs)
            for job in range(jobs)
        ]
        results = [future.result() for future in work]
    checked, seconds = sum(number for number, _ in results), time.monotonic() - begun
    print(
        f"{scenario}: {checked} states of {len(recording.events)} events, {checked / seconds:.0f} a second", flush=True
    )
    violations = [violation for _, found in results for violation in found]
    for violation in violations:
        kept = save_violation(violation, options.keep, options.seed)
        print(f"\nVIOLATION in {scenario}, state {violation.cut.number} of seed {options.seed}")
        print(violation.cut.description, violation.error, sep="\n")
        print(f"check it again: python -m tests.attacks.powercuts --again {kept}", flush=True)
    return len(violations)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attacks.powercuts", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--states", type=int, default=3000, help="states to check, over all scenarios (3000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the choice of states (1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that check (1)")
    parser.add_argument(
        "--scenario", action="append", choices=SCENARIOS, help="a scenario, instead of all; may be repeated"
    )
    parser.add_argument("--scratch", type=Path, help="folder where states are made (a folder in memory)")
    parser.add_argument("--keep", type=Path, default=Path("powercuts"), help="folder for violations (powercuts)")
    parser.add_argument("--again", type=Path, help="saved state to check again")
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        SCENARIOS[options.prepare[0]].prepare(Path(options.prepare[1]))
        return 0
    if options.run:
        run(options.run[0], Path(options.run[1]))
        return 0
    if options.again:
        check_again(options.again)
        return 0
    options.scenario = options.scenario or list(SCENARIOS)
    with tempfile.TemporaryDirectory(dir=options.scratch or powercut.memory_folder()) as folder:
        found = [report(name, record(name, Path(folder)), Path(folder), options) for name in options.scenario]
    return 1 if sum(found) else 0


if __name__ == "__main__":
    sys.exit(main())
