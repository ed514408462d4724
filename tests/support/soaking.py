"""A soak for any store of images that processes share: it works it hard, kills its workers, and checks all it says.

Nothing here knows a particular store. Who has one writes a `Target` for it and calls `run`.

Every worker owns a few images under names of its own, its canaries, made of blobs that all workers share. What
the store has acknowledged about them is noted in shared memory, so whoever takes a killed worker's place knows
what must be there; the one operation that was under way may have happened or not. Under the hot names, which
everybody adds, moves and removes, an image may be there or not, but never wrong or incomplete.

The seed decides which operations a worker chooses, and whom the killer picks; how they fall in time it cannot.
"""

from __future__ import annotations

import gc
import hashlib
import io
import itertools
import json
import mmap
import os
import random
import re
import select
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

WEIGHTS = {
    "has": 400,
    "complete": 60,
    "manifest": 160,
    "blobs": 60,
    "read": 200,
    "add": 20,
    "import": 6,
    "tag": 20,
    "remove": 25,
    "hold": 8,
    "hold and remove": 4,
    "export": 6,
    "collect": 2,
    "verify": 1,
    "reopen": 1,
}
"""How often an operation is chosen: many cheap reads, and enough of the rest to make each of them doubtful."""

KINDS = list(WEIGHTS)
CANARIES = 4  # names that a worker owns
HOT_NAMES = 16
STUCK = 120.0  # seconds after which an operation does not come to its end any more


class Absent(Exception):
    """The store does not have the image or the blob. Any other error is a violation."""


class Image(NamedTuple):
    """An image as it must come out of the store."""

    manifest: bytes
    blobs: dict[str, bytes]  # by digest; the manifest first, then the config, then the layers


class Store(Protocol):
    """A store that one worker has open. Every method may raise `Absent`, unless an image or blob is brought to it."""

    def add(self, name: str, image: Image) -> None:
        """Store an image blob by blob, and give it a name, which may exist."""

    def load(self, name: str, archive: Path) -> None:
        """Import an OCI archive with one image under a name, which may exist."""

    def has(self, digest: str) -> bool:
        """Say whether a blob is stored."""

    def read(self, digest: str) -> bytes:
        """Return a blob's content."""

    def manifest(self, name: str) -> bytes:
        """Return an image's manifest."""

    def blobs(self, name: str) -> list[str]:
        """Return the digests of an image's blobs that are stored, in the order of `Image.blobs`."""

    def complete(self, name: str) -> bool:
        """Say whether all blobs of an image are stored."""

    def tag(self, source: str, target: str) -> None:
        """Give an image a second name, which may exist."""

    def remove(self, name: str) -> None:
        """Remove an image's name, and what only it used."""

    def hold(self, name: str) -> AbstractContextManager[dict[str, Path]]:
        """Keep an image's files in a block, and give their paths by digest, in the order of `Image.blobs`."""

    def export(self, name: str, path: Path) -> None:
        """Write an image to an OCI archive."""

    def collect(self) -> None:
        """Free what no image uses."""

    def verify(self, *, quick: bool) -> list[str]:
        """Return what is wrong with the store."""

    def close(self) -> None:
        """Stop using the store."""


class Target(Protocol):
    """What is attacked."""

    def open(self, waited: Callable[[float], None]) -> Store:
        """Open the store; ``waited`` is to be told the seconds of each wait for the right to write."""

    def check(self) -> None:
        """Raise an error that says which promise is broken, if one is; nobody uses the store meanwhile."""


class Plan(NamedTuple):
    """How to attack, and for how long: whichever limit comes first."""

    processes: int
    scratch: Path  # a folder, for archives
    seconds: float = float("inf")
    operations: float = float("inf")
    seed: int = 1
    kills_per_second: float = 2.0
    check_every: float = 30.0  # seconds
    pause: float = 0.0  # seconds, between a worker's operations, on average
    enough: int = 200  # violations, after which there is no more to learn


class Result(NamedTuple):
    """What has been done so far, and what was wrong with it."""

    seconds: float
    operations: dict[str, int]  # by kind
    longest: dict[str, float]  # seconds, by kind
    by_worker: list[int]  # operations
    steady: list[int]  # the workers that were never replaced
    longest_wait: list[float]  # seconds, by worker
    waits: list[int]  # waits that took from 2**(n-1) to 2**n microseconds, at place n
    kills: int
    checks: int
    violations: Counter[str]

    def ratio(self) -> float:
        """How far the busiest steady worker is ahead of the slowest."""
        done = [self.by_worker[worker] for worker in self.steady]
        return max(done) / max(1, min(done)) if done else 1.0


# Images


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def make_images(seed: int, count: int = 32, layers: int = 24) -> list[Image]:
    """Make images of a few shared layers: most of some kB, a few of 100 kB."""
    chosen = random.Random(f"images {seed}")
    stored = [chosen.randbytes(100_000 if number < 3 else chosen.randrange(500, 8000)) for number in range(layers)]
    return [make_image(number, chosen.sample(stored, chosen.randrange(1, 5))) for number in range(count)]


def make_image(number: int, layers: list[bytes]) -> Image:
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": {"number": str(number)}},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in layers]},
        }
    ).encode()

    def descriptor(data: bytes, media_type: str) -> dict[str, object]:
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [descriptor(layer, "application/vnd.oci.image.layer.v1.tar") for layer in layers],
        }
    ).encode()
    return Image(manifest, {digest_of(data): data for data in (manifest, config, *layers)})


def write_archive(path: Path, image: Image) -> None:
    entry = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest_of(image.manifest),
        "size": len(image.manifest),
    }
    files = {f"blobs/{digest.replace(':', '/')}": data for digest, data in image.blobs.items()}
    files["oci-layout"] = b'{"imageLayoutVersion":"1.0.0"}'
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def read_archive(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return the digest of the manifest in an OCI archive, and all blobs by the digests that they are named by."""
    with tarfile.open(path) as tar:
        files = {}
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                files[member.name] = content.read()
    (entry,) = json.loads(files["index.json"])["manifests"]
    blobs = {
        name.removeprefix("blobs/").replace("/", ":"): data for name, data in files.items() if name.startswith("blobs/")
    }
    return entry["digest"], blobs


# What outlives a worker

REMOVED, UNKNOWN = 0, -1
"""A canary's state is the number of its image, from 1 on, or one of these."""

_BUCKETS = 40
_CELLS = 2 * len(KINDS) + _BUCKETS + CANARIES + 4
_WAIT, _GENERATION = 0, 1


class Slot:
    """A worker's place in the shared memory. Whole numbers of eight bytes, which no kill can tear; times in us."""

    def __init__(self, cells: memoryview) -> None:
        parts = itertools.accumulate((len(KINDS), len(KINDS), _BUCKETS, CANARIES, 2, 2), initial=0)
        self.done, self.longest, self.waits, self.canaries, self.intended, self.other = (
            cells[start:end] for start, end in itertools.pairwise(parts)
        )

    def waited(self, seconds: float) -> None:
        microseconds = int(seconds * 1e6)
        self.waits[microseconds.bit_length()] += 1
        self.other[_WAIT] = max(self.other[_WAIT], microseconds)


class Shared(NamedTuple):
    """What the workers and their parent have in common."""

    state: memoryview  # one cell: whether to work
    slots: list[Slot]
    reports: int  # the end of the pipe that violations are written to


WAIT, WORK, STOP = 0, 1, 2


def share(processes: int, reports: int) -> Shared:
    cells = memoryview(mmap.mmap(-1, 8 * (1 + processes * _CELLS))).cast("q")
    starts = range(1, len(cells) - _CELLS + 1, _CELLS)
    return Shared(cells[:1], [Slot(cells[start : start + _CELLS]) for start in starts][:processes], reports)


def report(shared: Shared, text: str) -> None:
    """Tell the parent of a violation: one write, which is not torn, and survives its writer."""
    os.write(shared.reports, text.replace("\n", " ").encode()[:4000] + b"\n")


# Workers


class Violation(Exception):
    """The store said or did something that it must not."""


class Worker:
    """One process that uses the store, and what it knows must be true."""

    def __init__(self, target: Target, plan: Plan, shared: Shared, number: int, images: list[Image]) -> None:
        self.target, self.shared, self.number, self.images = target, shared, number, images
        self.slot = shared.slots[number]
        self.random = random.Random(f"{plan.seed} {number} {self.slot.other[_GENERATION]}")
        self.scratch, self.pause = plan.scratch, plan.pause
        self.by_digest = {digest_of(image.manifest): number for number, image in enumerate(images, 1)}
        self.content = {digest: data for image in images for digest, data in image.blobs.items()}
        self.digests = list(self.content)
        self.canary: int | None = None  # the one that the operation is about
        self.store = target.open(self.slot.waited)
        self.operations: dict[str, Callable[[], None]] = {
            "has": self.has,
            "complete": self.complete,
            "manifest": self.manifest,
            "blobs": self.blobs,
            "read": self.read,
            "add": self.add,
            "import": self.load,
            "tag": self.tag,
            "remove": self.remove,
            "hold": self.hold,
            "hold and remove": self.hold_and_remove,
            "export": self.export,
            "collect": self.collect,
            "verify": self.verify,
            "reopen": self.reopen,
        }

    def work(self) -> None:
        """Do one operation after the other until told to stop."""
        parent = os.getppid()
        weights = list(itertools.accumulate(WEIGHTS.values()))
        numbers = range(len(KINDS))
        operations = [self.operations[kind] for kind in KINDS]
        slot, state = self.slot, self.shared.state
        while state[0] == WAIT:
            time.sleep(0.001)
        self.attempt("settle", self.settle)
        while state[0] == WORK and os.getppid() == parent:
            kind = self.random.choices(numbers, cum_weights=weights)[0]
            began = time.perf_counter()
            self.attempt(KINDS[kind], operations[kind])
            took = int((time.perf_counter() - began) * 1e6)
            slot.done[kind] += 1
            if took > slot.longest[kind]:
                slot.longest[kind] = took
            if self.pause:
                time.sleep(self.random.expovariate(1 / self.pause))
        self.store.close()

    def attempt(self, kind: str, operation: Callable[[], None]) -> None:
        """Do an operation; what is wrong with it is reported, and with it ends what is known of the canary."""
        self.canary = None
        try:
            operation()
        except Absent as error:
            # Of a hot name, or of a canary that was removed.
            if self.canary is None or self.slot.canaries[self.canary] in (REMOVED, UNKNOWN):
                return
            report(self.shared, f"{kind}: an acknowledged image is gone: {error}")
        except Exception as error:
            report(self.shared, f"{kind}: {type(error).__name__}: {error}")
        else:
            return
        if self.canary is not None:
            self.slot.canaries[self.canary] = UNKNOWN
        self.slot.intended[0] = 0

    def name(self) -> str:
        """Choose a name to work with: a canary's, or a hot one."""
        if self.random.random() < 0.5:
            self.canary = self.random.randrange(CANARIES)
            return self.name_of(self.canary)
        return f"hot:{self.random.randrange(HOT_NAMES)}"

    def name_of(self, canary: int) -> str:
        return f"worker-{self.number}/canary:{canary}"

    def image(self) -> int:
        return self.random.randrange(1, len(self.images) + 1)

    def change(self, state: int, call: Callable[[], object]) -> None:
        """Do something that gives the canary another state; it is noted before, as intended, and after, as a fact."""
        slot, canary = self.slot, self.canary
        if canary is None:
            call()
            return
        slot.intended[1] = state
        slot.intended[0] = canary + 1
        try:
            call()
        except Absent:
            slot.intended[0] = 0
            raise
        slot.canaries[canary] = state
        slot.intended[0] = 0

    def settle(self) -> None:
        """Find out whether what the killed predecessor was about to do has happened; both may be."""
        if not self.slot.intended[0]:
            return
        self.canary = canary = self.slot.intended[0] - 1
        possible = (self.slot.canaries[canary], self.slot.intended[1])
        try:
            found = self.by_digest.get(digest_of(self.store.manifest(self.name_of(canary))), UNKNOWN)
        except Absent:
            found = REMOVED
        if found not in possible and UNKNOWN not in possible:
            raise Violation(f"a canary is {self.told(found)} and must be one of {[*map(self.told, possible)]}")
        self.slot.canaries[canary] = found
        self.slot.intended[0] = 0

    def told(self, state: int) -> str:
        return {REMOVED: "removed", UNKNOWN: "unknown"}.get(state, f"image {state}")

    def known(self, manifest_digest: str) -> Image:
        """Return the image that has this manifest, which must be the canary's."""
        found = self.by_digest.get(manifest_digest)
        if found is None:
            raise Violation(f"manifest {manifest_digest} was never stored")
        if self.canary is not None:
            state = self.slot.canaries[self.canary]
            if state not in (found, UNKNOWN):
                raise Violation(f"{self.name_of(self.canary)} is image {found}, and was {self.told(state)}")
        return self.images[found - 1]

    # Operations

    def has(self) -> None:
        canary = self.random.randrange(CANARIES)
        mine = self.slot.canaries[canary]
        if mine > 0:
            self.canary = canary
            digest = self.random.choice(list(self.images[mine - 1].blobs))
            if not self.store.has(digest):
                raise Violation(f"a blob of an acknowledged image is not stored: {digest}")
        else:
            self.store.has(self.random.choice(self.digests))

    def complete(self) -> None:
        name = self.name()
        if not self.store.complete(name):
            raise Violation(f"{name} is incomplete")
        if self.canary is not None and self.slot.canaries[self.canary] == REMOVED:
            raise Violation(f"{name} is complete, and was removed")

    def manifest(self) -> None:
        manifest = self.store.manifest(self.name())
        if self.known(digest_of(manifest)).manifest != manifest:
            raise Violation("a manifest has another content than it was stored with")

    def blobs(self) -> None:
        name = self.name()
        found = self.store.blobs(name)
        image = self.known(found[0]) if found else None
        if image is None or list(image.blobs) != found:
            raise Violation(f"{name} is incomplete: only {len(found)} of its blobs are stored")

    def read(self) -> None:
        canary = self.random.randrange(CANARIES)
        mine = self.slot.canaries[canary]
        if mine > 0 and self.random.random() < 0.7:
            self.canary = canary
            digest = self.random.choice(list(self.images[mine - 1].blobs))
        else:
            digest = self.random.choice(self.digests)
        if self.store.read(digest) != self.content[digest]:
            raise Violation(f"a blob has another content than it was stored with: {digest}")

    def add(self) -> None:
        name, image = self.name(), self.image()
        self.change(image, lambda: self.store.add(name, self.images[image - 1]))

    def load(self) -> None:
        name, image = self.name(), self.image()
        self.change(image, lambda: self.store.load(name, archive_path(self.scratch, image)))

    def tag(self) -> None:
        name = self.name()
        if self.canary is None:
            self.store.tag(name, f"hot:{self.random.randrange(HOT_NAMES)}")
            return
        source = self.random.randrange(CANARIES)
        state = self.slot.canaries[source]
        if state <= 0:
            self.canary = source
            self.store.tag(self.name_of(source), f"hot:{self.random.randrange(HOT_NAMES)}")
            if state == REMOVED:
                raise Violation(f"{self.name_of(source)} was tagged, and was removed")
            return
        try:
            self.change(state, lambda: self.store.tag(self.name_of(source), name))
        except Absent:
            self.canary = source
            raise

    def remove(self) -> None:
        name = self.name()
        there = self.canary is None or self.slot.canaries[self.canary] != REMOVED
        self.change(REMOVED, lambda: self.store.remove(name))
        if not there:
            raise Violation(f"{name} was removed twice")
        if self.canary is not None:
            self.must_be_gone(name)

    def must_be_gone(self, name: str) -> None:
        try:
            self.store.manifest(name)
        except Absent:
            return
        raise Violation(f"{name} is there, and was removed")

    def hold(self) -> None:
        with self.store.hold(self.name()) as paths:
            image = self.known(next(iter(paths), ""))
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 0.02)
            check_content("a held blob", image, {digest: path.read_bytes() for digest, path in paths.items()})

    def hold_and_remove(self) -> None:
        """What is held stays, though its image goes and everything unused is collected."""
        name = self.name()
        with self.store.hold(name) as paths:
            image = self.known(next(iter(paths), ""))
            self.change(REMOVED, lambda: self.store.remove(name))
            self.store.collect()
            check_content("a held blob", image, {digest: path.read_bytes() for digest, path in paths.items()})

    def export(self) -> None:
        path = self.scratch / f"export-{self.number}.tar"
        path.unlink(missing_ok=True)
        self.store.export(self.name(), path)
        manifest, found = read_archive(path)
        check_content("an exported blob", self.known(manifest), found)

    def collect(self) -> None:
        self.store.collect()

    def verify(self) -> None:
        if problems := self.store.verify(quick=self.random.random() < 0.5):
            raise Violation(f"{len(problems)} problems: {problems[0]}")

    def reopen(self) -> None:
        self.store.close()
        self.store = self.target.open(self.slot.waited)

    def check_canaries(self) -> None:
        """Hold the store to every canary, each byte of it."""
        self.attempt("settle", self.settle)
        for canary in range(CANARIES):
            self.attempt("canary", lambda canary=canary: self.check_canary(canary))  # type: ignore[misc]

    def check_canary(self, canary: int) -> None:
        self.canary, name, state = canary, self.name_of(canary), self.slot.canaries[canary]
        if state == REMOVED:
            self.must_be_gone(name)
        elif state != UNKNOWN:
            image = self.known(digest_of(self.store.manifest(name)))
            check_content("a blob", image, {digest: self.store.read(digest) for digest in self.store.blobs(name)})


def check_content(what: str, image: Image, found: dict[str, bytes]) -> None:
    if missing := image.blobs.keys() - found.keys():
        raise Violation(f"{what} is missing: {min(missing)}")
    for digest, data in image.blobs.items():
        if found[digest] != data:
            raise Violation(f"{what} has another content than it was stored with: {digest}")


def archive_path(scratch: Path, image: int) -> Path:
    return scratch / f"image-{image}.tar"


# The parent


def run(target: Target, plan: Plan, progress: Callable[[Result], None] = lambda result: None) -> Result:
    """Attack a store in rounds: work and kills, then a check of all promises while nobody works.

    The rounds end in turn by a word to the workers, who finish what they are doing, and by killing all of them at
    once; without kills, always by a word. ``progress`` is called about once a second.
    """
    images = make_images(plan.seed)
    for number, image in enumerate(images, 1):
        write_archive(archive_path(plan.scratch, number), image)
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    attack = Attack(target, plan, images, share(plan.processes, writing), reading, progress)
    gc.collect()
    gc.freeze()  # the workers share these pages
    try:
        while not attack.over():
            attack.work()
            attack.end_round()
            attack.check()
    finally:
        attack.kill_all()
        gc.unfreeze()
        os.close(reading)
        os.close(writing)
    return attack.result()


class Attack:
    """A run under way: its workers, its killer, and what was reported."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        images: list[Image],
        shared: Shared,
        reports: int,
        progress: Callable[[Result], None],
    ) -> None:
        self.target, self.plan, self.images, self.shared, self.progress = target, plan, images, shared, progress
        self.reports = reports
        self.unread = b""
        self.random = random.Random(f"killer {plan.seed}")
        self.workers: dict[int, int] = {}  # number by process
        self.began = time.monotonic()
        self.worked = 0.0  # seconds, without those of the checks
        self.kills = self.checks = self.rounds = 0
        self.violations: Counter[str] = Counter()

    def over(self) -> bool:
        done = sum(self.done(worker) for worker in range(self.plan.processes))
        return (
            self.worked >= self.plan.seconds
            or done >= self.plan.operations
            or self.violations.total() >= self.plan.enough
        )

    def done(self, worker: int) -> int:
        return sum(self.shared.slots[worker].done)

    def work(self) -> None:
        """Have all workers at it until the next check is due, and kill one now and then."""
        self.rounds += 1
        self.shared.state[0] = WAIT
        for number in range(self.plan.processes):
            self.start(number)
        self.shared.state[0] = WORK
        now = time.monotonic()
        until = now + min(self.plan.check_every, self.plan.seconds - self.worked)
        next_kill, next_progress = self.moment_of_next_kill(now), now + 1
        while now < until and not self.over():
            select.select([self.reports], [], [], max(0.0, min(next_kill, until, now + 0.05) - now))
            before, now = now, time.monotonic()
            self.worked += now - before
            self.read_reports()
            self.replace_lost()
            if now >= next_kill:
                self.kill_one()
                next_kill = self.moment_of_next_kill(now)
            if now >= next_progress:
                self.progress(self.result())
                next_progress = now + 1

    def moment_of_next_kill(self, now: float) -> float:
        rate = self.plan.kills_per_second
        return now + self.random.expovariate(rate) if rate else float("inf")

    def start(self, number: int) -> None:
        self.shared.slots[number].other[_GENERATION] += 1
        self.workers[self.fork(lambda: self.new_worker(number).work())] = number

    def new_worker(self, number: int) -> Worker:
        return Worker(self.target, self.plan, self.shared, number, self.images)

    def fork(self, call: Callable[[], None]) -> int:
        """Call something in a child of its own."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to us
                call()
                status = 0
            except Exception as error:
                report(self.shared, f"open or close: {type(error).__name__}: {error}")
                status = 0
            finally:
                os._exit(status)
        return child

    def read_reports(self) -> None:
        try:
            while data := os.read(self.reports, 1 << 16):
                self.unread += data
        except BlockingIOError:
            pass
        *lines, self.unread = self.unread.split(b"\n")
        # One text for all processes, images and blobs.
        self.violations.update(re.sub(r"(?<![0-9a-z])[0-9a-f]{6,}|\d+(?=-)", "…", line.decode()) for line in lines)

    def replace_lost(self) -> None:
        """See to workers that ended by themselves, which none should while it is to work."""
        for child, number in list(self.workers.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del self.workers[child]
                if status:
                    self.violations[f"a worker died: {os.waitstatus_to_exitcode(status)}"] += 1
                self.start(number)

    def kill_one(self) -> None:
        child = self.random.choice(list(self.workers))
        number = self.workers.pop(child)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.kills += 1
        self.start(number)

    def kill_all(self) -> None:
        for child in self.workers:
            os.kill(child, signal.SIGKILL)
        for child in self.workers:
            os.waitpid(child, 0)
        self.kills += len(self.workers)
        self.workers.clear()

    def end_round(self) -> None:
        if self.plan.kills_per_second and self.rounds % 2 == 0:
            self.kill_all()
            return
        self.shared.state[0] = STOP
        deadline = time.monotonic() + STUCK
        for child in list(self.workers):
            self.await_end(child, deadline, "a worker")
            del self.workers[child]

    def await_end(self, child: int, deadline: float, what: str) -> None:
        """Wait for a child; one that does not end is killed."""
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            self.read_reports()
            if ended:
                if status:
                    self.violations[f"{what} died: {os.waitstatus_to_exitcode(status)}"] += 1
                return
            if time.monotonic() > deadline:
                self.violations[f"{what} did not come to its end"] += 1
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return
            time.sleep(0.005)

    def check(self) -> None:
        """Check the promises, and then every canary, in a child: the parent never opens the store."""
        self.await_end(self.fork(self.check_all), time.monotonic() + STUCK, "the check")
        self.checks += 1
        for path in self.plan.scratch.iterdir():
            if not path.name.startswith("image-"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def check_all(self) -> None:
        try:
            self.target.check()
        except Exception as error:
            report(self.shared, f"the promises: {type(error).__name__}: {error}")
        for number in range(self.plan.processes):
            worker = self.new_worker(number)
            worker.check_canaries()
            worker.store.close()

    def result(self) -> Result:
        slots = self.shared.slots
        return Result(
            seconds=self.worked,
            operations={kind: sum(slot.done[place] for slot in slots) for place, kind in enumerate(KINDS)},
            longest={kind: max(slot.longest[place] for slot in slots) / 1e6 for place, kind in enumerate(KINDS)},
            by_worker=[self.done(number) for number in range(len(slots))],
            steady=[number for number, slot in enumerate(slots) if slot.other[_GENERATION] == 1],
            longest_wait=[slot.other[_WAIT] / 1e6 for slot in slots],
            waits=[sum(slot.waits[place] for slot in slots) for place in range(_BUCKETS)],
            kills=self.kills,
            checks=self.checks,
            violations=self.violations.copy(),
        )


# Judging


def unfair(result: Result, *, longest: float = 1.0, ratio: float = 3.0) -> list[str]:
    """Return what is wrong with the waiting in a run without kills."""
    faults = []
    if max(result.longest_wait) >= longest:
        faults.append(f"the longest wait was {max(result.longest_wait):.3f} s, and may be {longest:g} s")
    if result.ratio() > ratio:
        faults.append(f"the busiest worker did {result.ratio():.2f} times what the slowest did: {ratio:g} is allowed")
    return faults


def lines(result: Result) -> Iterable[str]:
    """Tell the result as a table."""
    total = sum(result.operations.values())
    yield f"{'operation':18} {'times':>10} {'longest, s':>11}"
    for kind, count in result.operations.items():
        yield f"{kind:18} {count:10} {result.longest[kind]:11.3f}"
    yield f"{'all':18} {total:10}   {total / max(result.seconds, 0.001):.0f} a second for {result.seconds:.0f} s"
    yield f"collections {result.operations['collect'] + result.operations['hold and remove']}"
    yield f"kills {result.kills}, checks of all promises {result.checks}"
    longest = max(range(len(result.longest_wait)), key=result.longest_wait.__getitem__)
    yield (
        f"waits for the write lock {sum(result.waits)}: half under {quantile(result.waits, 0.5):.6f} s, "
        f"99 % under {quantile(result.waits, 0.99):.6f} s, 99.99 % under {quantile(result.waits, 0.9999):.6f} s, "
        f"longest {result.longest_wait[longest]:.3f} s (worker {longest})"
    )
    if result.steady:
        done = [result.by_worker[worker] for worker in result.steady]
        yield (
            f"busiest to slowest of {len(done)} workers that ran all the time: "
            f"{max(done)} to {min(done)}, {result.ratio():.2f} times"
        )
    yield f"violations {result.violations.total()}"
    for text, count in result.violations.most_common(30):
        yield f"  {count} times: {text}"


def quantile(waits: list[int], part: float) -> float:
    """Return the seconds under which a part of the waits stayed, to a power of two."""
    wanted, seen = part * sum(waits), 0
    for place, count in enumerate(waits):
        seen += count
        if seen >= wanted:
            return float(2**place) / 1e6
    return 0.0
