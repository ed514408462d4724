"""Run the soak for some seconds, and against broken stores in which it must find the fault."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import run_python
from tests.support import soaking as soak

pytestmark = pytest.mark.attack


def run_soak(directory: Path, *arguments: object) -> str:
    """Run the soak, assert that it succeeds, and return its output."""
    command = [sys.executable, "-m", "tests.attacks.soak", "--directory", directory, *arguments]
    done = subprocess.run([*map(str, command)], check=False, text=True, capture_output=True, timeout=300)
    print(done.stdout, done.stderr)
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("waiting for process ")]
    assert (done.returncode, complaints) == (0, [])
    return done.stdout


def test_a_cache_keeps_its_promises_while_its_users_are_killed(tmp_path: Path) -> None:
    output = run_soak(
        tmp_path, "--processes", 4, "--seconds", 4, "--kills-per-second", 5, "--check-every", 0.8, "--seed", 7
    )
    assert "\nviolations 0\n" in output
    kills, checks = map(int, re.findall(r"kills (\d+), checks of all promises (\d+)", output)[0])
    assert kills >= 4
    assert checks >= 2


def test_many_waiting_processes_get_their_turn_and_no_locked_database(tmp_path: Path) -> None:
    # Test machines are noisy, so the limits on waiting are generous; no operation may fail.
    output = run_soak(tmp_path, "--waiting", "--processes", 16, "--seconds", 3, "--longest", 30, "--ratio", 30)
    assert "\nviolations 0\n" in output
    assert "of 16 workers that ran all the time" in output


def test_a_soak_ends_after_a_number_of_operations(tmp_path: Path) -> None:
    output = run_soak(tmp_path, "--processes", 2, "--operations", 200, "--kills-per-second", 0, "--pause", 0.005)
    (done,) = re.findall(r"^all +(\d+) ", output, re.MULTILINE)
    assert 200 <= int(done) < 1000


# A correct store, and stores that are broken on purpose


class Folder:
    """A correct store with its index in one JSON file, which a lock protects; subclasses break it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.holding: list[Path] = []
        for name in ("blobs", "holds", "tmp"):
            (directory / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        import fcntl

        with (self.directory / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def index(self) -> dict[str, list[str]]:
        try:
            found: dict[str, list[str]] = json.loads((self.directory / "index.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def put(self, path: Path, data: bytes) -> None:
        new = self.directory / "tmp" / str(os.getpid())
        new.write_bytes(data)
        new.rename(path)

    @contextmanager
    def changing(self) -> Iterator[dict[str, list[str]]]:
        """Yield the index for a change, and write it at the end of the block."""
        with self.lock():
            index = self.index()
            yield index
            self.put(self.directory / "index.json", json.dumps(index).encode())

    def path(self, digest: str) -> Path:
        return self.directory / "blobs" / digest

    def held(self) -> set[str]:
        return {digest for path in (self.directory / "holds").iterdir() for digest in json.loads(path.read_text())}

    def closure(self, name: str) -> list[str]:
        try:
            return self.index()[name]
        except KeyError:
            raise soak.Absent(name) from None

    def add(self, name: str, image: soak.Image) -> None:
        with self.changing() as index:
            for digest, data in image.blobs.items():
                if not self.path(digest).exists():
                    self.put(self.path(digest), data)
            index[name] = list(image.blobs)

    def load(self, name: str, archive: Path) -> None:
        manifest, blobs = soak.read_archive(archive)
        described = json.loads(blobs[manifest])
        digests = [manifest, described["config"]["digest"], *(layer["digest"] for layer in described["layers"])]
        self.add(name, soak.Image(blobs[manifest], {digest: blobs[digest] for digest in digests}))

    def has(self, digest: str) -> bool:
        return self.path(digest).exists()

    def read(self, digest: str) -> bytes:
        try:
            return self.path(digest).read_bytes()
        except FileNotFoundError:
            raise soak.Absent(digest) from None

    def manifest(self, name: str) -> bytes:
        with self.lock():
            return self.read(self.closure(name)[0])

    def blobs(self, name: str) -> list[str]:
        with self.lock():
            return [digest for digest in self.closure(name) if self.has(digest)]

    def complete(self, name: str) -> bool:
        with self.lock():
            return all(map(self.has, self.closure(name)))

    def tag(self, source: str, target: str) -> None:
        with self.changing() as index:
            index[target] = self.closure(source)

    def remove(self, name: str) -> None:
        with self.changing() as index:
            if index.pop(name, None) is None:
                raise soak.Absent(name)
        self.collect()

    @contextmanager
    def hold(self, name: str) -> Iterator[dict[str, Path]]:
        with self.lock():
            digests = self.closure(name)
            hold = self.directory / "holds" / f"{os.getpid()}-{len(self.holding)}"
            self.put(hold, json.dumps(digests).encode())
        self.holding.append(hold)
        try:
            yield {digest: self.path(digest) for digest in digests}
        finally:
            with self.lock():
                self.holding.pop().unlink()

    def export(self, name: str, path: Path) -> None:
        with self.lock():
            blobs = {digest: self.path(digest).read_bytes() for digest in self.closure(name)}
        soak.write_archive(path, soak.Image(next(iter(blobs.values())), blobs))

    def collect(self) -> None:
        with self.lock():
            used = {digest for closure in self.index().values() for digest in closure} | self.held()
            for path in (self.directory / "blobs").iterdir():
                if path.name not in used:
                    path.unlink()

    def verify(self, *, quick: bool) -> list[str]:
        with self.lock():
            stored = list((self.directory / "blobs").iterdir())
            return [path.name for path in stored if not quick and soak.digest_of(path.read_bytes()) != path.name]

    def close(self) -> None:
        """Nothing is open."""


class LostUpdates(Folder):
    """Changes the index without the lock, so that two writers overwrite each other's changes."""

    @contextmanager
    def changing(self) -> Iterator[dict[str, list[str]]]:
        index = self.index()
        yield index
        time.sleep(0.001)
        self.put(self.directory / "index.json", json.dumps(index).encode())


class DeletesHeldBlobs(Folder):
    def held(self) -> set[str]:
        return set()


class DeletesSharedBlobs(Folder):
    """Removes an image with all its blobs, also those that other images use."""

    def remove(self, name: str) -> None:
        with self.changing() as index:
            closure = index.pop(name, None)
            if closure is None:
                raise soak.Absent(name)
            for digest in closure:
                self.path(digest).unlink(missing_ok=True)


class AcknowledgesTooEarly(Folder):
    """Acknowledges an added image at once, but writes the index only now and then."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.unwritten: dict[str, list[str]] = {}
        self.ours = f"worker-{os.getpid()}"

    def index(self) -> dict[str, list[str]]:
        return {**super().index(), **self.unwritten}

    def add(self, name: str, image: soak.Image) -> None:
        if name.startswith("hot:") or len(self.unwritten) >= 2:
            super().add(name, image)
            self.unwritten.clear()
            return
        with self.lock():
            for digest, data in image.blobs.items():
                self.put(self.path(digest), data)
        self.unwritten[name] = list(image.blobs)

    def close(self) -> None:
        with self.changing():
            pass
        self.unwritten.clear()


class WritesInPlace(Folder):
    """Writes a blob under its final name, so that a kill leaves half of the blob, which counts as stored."""

    def put(self, path: Path, data: bytes) -> None:
        if path.parent.name != "blobs":
            super().put(path, data)
            return
        with path.open("wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            time.sleep(0.02)
            file.write(data[len(data) // 2 :])


class TagsAnotherImage(Folder):
    """Sometimes gives the new name to another image."""

    def tag(self, source: str, target: str) -> None:
        with self.changing() as index:
            self.closure(source)
            index[target] = self.closure(max(index))


class SaysLocked(Folder):
    def add(self, name: str, image: soak.Image) -> None:
        if time.time_ns() % 5 == 0:
            raise OSError("database is locked")
        super().add(name, image)


class ExitsDuringCollection(Folder):
    def collect(self) -> None:
        os._exit(3)


class IsUnfair(Folder):
    """Serves the first worker at once, and delays the others."""

    def has(self, digest: str) -> bool:
        try:
            (self.directory / "first").mkdir()
            self.first = True
        except FileExistsError:
            if not getattr(self, "first", False):
                time.sleep(0.05)
        return super().has(digest)


class FolderTarget:
    """A store in a folder as the target of an attack."""

    def __init__(self, store: Callable[[Path], Folder], directory: Path) -> None:
        self.store, self.directory = store, directory

    def open(self, waited: Callable[[float], None]) -> Folder:
        waited(0.001)
        return self.store(self.directory)

    def check(self) -> None:
        for hold in (self.directory / "holds").iterdir():
            hold.unlink()  # no worker runs now, so all holds belong to dead workers
        self.store(self.directory).collect()
        broken = self.store(self.directory).verify(quick=False)
        assert not broken, "a blob is broken"


def attack_store(store: type[Folder], tmp_path: Path, **options: object) -> tuple[int, dict[str, int], str]:
    """Attack a store in a new process; return operations, violations, and unfair waits."""
    (tmp_path / "scratch").mkdir()
    output = run_python(
        """
        import json, sys
        from pathlib import Path
        from tests.attacks import test_soak
        from tests.support import soaking as soak

        directory, store, options = Path(sys.argv[1]), getattr(test_soak, sys.argv[2]), json.loads(sys.argv[3])
        target = test_soak.FolderTarget(store, directory / "store")
        result = soak.run(target, soak.Plan(3, directory / "scratch", **options))
        print(json.dumps([sum(result.operations.values()), result.violations, soak.find_unfair_waits(result)]))
        """,
        tmp_path,
        store.__name__,
        json.dumps({"seconds": 100, "check_every": 0.4, "kills_per_second": 20, **options}),
    )
    operations, violations, unfair = json.loads(output)
    return operations, violations, " ".join(unfair)


def test_the_soak_finds_nothing_in_a_correct_store(tmp_path: Path) -> None:
    operations, violations, _ = attack_store(Folder, tmp_path, operations=10_000)
    assert violations == {}
    assert operations >= 10_000


@pytest.mark.parametrize(
    ("store", "found"),
    [
        (LostUpdates, "an acknowledged image|a canary is|was removed|was never stored"),
        (DeletesHeldBlobs, "FileNotFoundError"),
        (DeletesSharedBlobs, "incomplete|is not stored|is missing|is gone"),
        (AcknowledgesTooEarly, "an acknowledged image|a canary is|was removed|was never stored"),
        (WritesInPlace, "has changed|problems|was never stored|is broken"),
        (TagsAnotherImage, "is image [0-9]+, but was image"),
        (SaysLocked, "OSError: database is locked"),
        (ExitsDuringCollection, "a worker died: 3"),
    ],
)
def test_the_soak_finds_the_fault_of_a_broken_store(store: type[Folder], found: str, tmp_path: Path) -> None:
    _, violations, _ = attack_store(store, tmp_path, enough=5)
    assert any(re.search(found, text) for text in violations), violations


def test_the_soak_finds_a_store_that_favours_one_worker(tmp_path: Path) -> None:
    _, violations, unfair = attack_store(IsUnfair, tmp_path, seconds=1, kills_per_second=0, check_every=10)
    assert violations == {}
    assert "the busiest worker did" in unfair
