"""Crashes and failing disks: whatever interrupts an operation, the next process recovers the cache.

There are three kinds of interruptions. The directory is copied before each call that the operation makes. The process
is killed at a system call, also at those of SQLite. A system call fails, once or from then on. By default the tests
interrupt at a sample of the calls; with ``CACHEDB_CRASH_EVERYWHERE`` set, at all of them.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from cachedb import Cache
from cachedb.disk.layout import UNFINISHED_INDEX
from cachedb.index.tables import REVISION
from tests.support import make, strace, victims
from tests.support.powercut import hash_tree, read_tree
from tests.support.promises import check, check_opened

pytestmark = pytest.mark.attack

EVERYWHERE = bool(os.environ.get("CACHEDB_CRASH_EVERYWHERE"))
COPY_STEP, KILL_STEP, FAULT_STEP = (1, 1, 1) if EVERYWHERE else (3, 17, 29)
# A full disk or quota stays full, so all later calls fail; a failing disk fails once.
FAULTS = {
    "a full disk": "error=ENOSPC:when={}+",
    "a failing disk": "error=EIO:when={}",
    "a quota": "error=EDQUOT:when={}",
}


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.support.victims", str(tmp_path_factory.mktemp("zygote"))]
    with strace.start_zygote(command, Path(__file__).parents[2]) as process:
        yield process


@pytest.fixture(scope="module")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], None]], Path]:
    """Return a function that makes a directory for operations; tests copy it, and never change it."""

    @functools.cache
    def make_directory(preparation: Callable[[Path], None]) -> Path:
        directory = tmp_path_factory.mktemp("prepared")
        preparation(directory)
        return directory

    return make_directory


@pytest.fixture
def prepared(operation: str, prepare: Callable[[Callable[[Path], None]], Path]) -> Path:
    return prepare(victims.OPERATIONS[operation].prepare)


def recover_from(operation: str, directory: Path) -> None:
    """Check the cache after a crash, repeat the operation, and check the result."""
    cache = directory / "cache"
    if operation == "upgrade":
        check_either_schema(cache)
    elif not operation.startswith(("repair", "rebuild")):  # these begin with a damaged cache
        check(cache)
    victims.OPERATIONS[operation].do(directory)
    with Cache.open(cache) as opened:
        check_opened(opened)
        if operation != "open anew":
            check_kept(opened)
        if operation.startswith("adopt"):
            for name, image in (("team/new:1", victims.NEW), ("app:2", make.image(1, 6))):
                assert opened.is_image_complete(name)
                assert {blob.digest for blob in opened.get_image_blobs(name)} == set(image.blobs)
            assert not opened.is_image_complete("app:3")
        if operation == "import by linking":
            assert opened.is_image_complete("new:1")
            for data in victims.NEW.blobs.values():
                assert (directory / "layout" / "blobs" / "sha256" / make.hex_of(data)).read_bytes() == data
    if operation == "export":
        with tarfile.open(directory / "kept.tar") as tar:
            assert len(tar.getnames()) > len(victims.KEPT.blobs)
    if operation == "copy":
        with Cache.open(directory / "copy") as opened:
            check_opened(opened)
            check_kept(opened)
        assert not (directory / "copy" / UNFINISHED_INDEX).exists()
    if operation == "export a folder":
        files = {path.name for path in (directory / "layout").rglob("*") if path.is_file()}
        assert files == {"oci-layout", "index.json", *(make.hex_of(data) for data in victims.KEPT.blobs.values())}


def check_either_schema(cache: Path) -> None:
    """Check P8: the index has the old schema or the new one, and every row."""
    shell = sqlite3.connect(cache / "index.db")
    try:
        (revision,) = shell.execute("SELECT version_num FROM alembic_version").fetchone()
        tables = {name for (name,) in shell.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        images = shell.execute("SELECT repository FROM images ORDER BY repository").fetchall()
        associations = shell.execute("SELECT count(*) FROM image_blobs").fetchone()
    finally:
        shell.close()
    assert (revision, "lasting_holds" in tables) in (("0001", False), (REVISION, True))
    assert (images, associations) == ([("gone",), ("kept",)], (8,))


def check_kept(cache: Cache) -> None:
    assert cache.is_image_complete("kept:1"), "P7: an acknowledged image survives"
    for digest, data in victims.KEPT.blobs.items():
        assert cache.get_blob(digest) == data


@contextmanager
def copied_before_each_call(directory: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Copy the directory before each change and each commit; a copy is what a crash would leave."""
    guard = threading.RLock()
    copying = False

    def copy(*_: object) -> None:
        nonlocal copying
        with guard:
            if not copying:
                copying = True
                ignored = shutil.ignore_patterns("*-shm")  # shared memory has no meaning after a crash
                shutil.copytree(directory, copies / str(len(os.listdir(copies))), ignore=ignored)
                copying = False

    def copy_before(call: Callable[..., object]) -> Callable[..., object]:
        def replacement(*arguments: object, **options: object) -> object:
            with guard:  # no other thread may change the directory during the copy
                copy()
                return call(*arguments, **options)

        return replacement

    with monkeypatch.context() as patch:
        for name in ("link", "rename", "unlink", "rmdir", "mkdir", "fsync", "close"):
            patch.setattr(os, name, copy_before(getattr(os, name)))
        event.listen(Engine, "commit", copy)
        try:
            yield
        finally:
            event.remove(Engine, "commit", copy)


@pytest.mark.parametrize("operation", victims.OPERATIONS)
def test_a_cache_recovers_from_a_crash_between_any_two_calls(
    operation: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, copies = tmp_path / "work", tmp_path / "copies"
    shutil.copytree(prepared, directory)
    copies.mkdir()
    with copied_before_each_call(directory, copies, monkeypatch):
        victims.OPERATIONS[operation].do(directory)
    found = sorted(copies.iterdir(), key=lambda path: int(path.name))
    assert len(found) > 3
    # Many calls change nothing, such as a sync. Of identical copies, check one.
    distinct = {hash_tree(read_tree(copy)): copy for copy in found[::COPY_STEP]}
    # `os.fsync` takes most of the time, and has no effect here: there are no power cuts.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for copy in distinct.values():
        recover_from(operation, copy)


def inject(program: str, zygote: subprocess.Popen[str], operation: str, directory: Path, injection: str) -> int:
    calls = strace.CHANGES if "signal" in injection else strace.FALLIBLE
    try:
        return strace.inject(program, zygote, f"{operation}\t{directory}", injection, calls)
    except strace.CannotTrace as error:
        pytest.skip(f"strace cannot trace here: {error}")


@pytest.mark.parametrize("operation", victims.OPERATIONS)
def test_a_cache_recovers_from_a_kill_at_a_system_call(
    operation: str, peer: Callable[[str], str], zygote: subprocess.Popen[str], prepared: Path, tmp_path: Path
) -> None:
    program = peer("strace")
    call = kills = 0
    status = -signal.SIGKILL
    while status:
        call += 1 if call < 3 else KILL_STEP
        directory = tmp_path / str(call)
        shutil.copytree(prepared, directory)
        status = inject(program, zygote, operation, directory, f"signal=SIGKILL:when={call}")
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        recover_from(operation, directory)
        shutil.rmtree(directory)
    assert kills >= 3


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        (operation, fault)
        for number, operation in enumerate(victims.OPERATIONS)
        for place, fault in enumerate(FAULTS)
        if EVERYWHERE or number % len(FAULTS) == place
    ],
)
def test_a_failed_system_call_raises_an_error_and_does_no_damage(
    operation: str,
    fault: str,
    peer: Callable[[str], str],
    zygote: subprocess.Popen[str],
    prepared: Path,
    tmp_path: Path,
) -> None:
    program = peer("strace")
    call = noticed = 0
    last = 1 << 30
    while call < last:
        # The last calls of an operation may fail unnoticed, because they clean up.
        call += 1 if call < 2 else FAULT_STEP
        directory = tmp_path / str(call)
        shutil.copytree(prepared, directory)
        status = inject(program, zygote, operation, directory, FAULTS[fault].format(call))
        assert status != victims.FAILED, (directory / "traceback").read_text()
        assert status in (victims.DONE, victims.GAVE_UP, victims.RECOVERED)
        noticed += status != victims.DONE
        recover_from(operation, directory)
        shutil.rmtree(directory)
        if status == victims.DONE and call > 10:
            last = min(last, call + 2 * FAULT_STEP)
    assert noticed
