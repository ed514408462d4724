"""Crashes: whatever an operation leaves when it is cut off, the next one finds the cache in order.

Once with a copy of the directory from before each call that the operation makes; once with a process that is
killed at its system calls, those of SQLite among them: by default at a sample of these, and at all of them
where ``CACHEDB_CRASH_EVERYWHERE`` is set.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from cachedb import Cache
from tests import victims
from tests.conftest import files_of, snapshot, stored_rows
from tests.make import digest_of

CALLS = (
    "link,linkat,rename,renameat,renameat2,unlink,unlinkat,fsync,fdatasync,write,pwrite64,ftruncate,"
    "mkdir,mkdirat,rmdir,flock,fchmod"
)
STEP = 1 if os.environ.get("CACHEDB_CRASH_EVERYWHERE") else 7


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.victims"]
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prepared")
    victims.prepare(directory)
    return directory


def killed_at(strace: str, zygote: subprocess.Popen[str], operation: str, directory: Path, call: int) -> bool:
    """Do an operation in a process that is killed at its so-manieth system call; whether it came to that."""
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    zygote.stdin.write(f"{operation} {directory}\n")
    victim = zygote.stdout.readline().strip()
    inject = f"inject={CALLS}:signal=SIGKILL:when={call}"
    with subprocess.Popen(
        [strace, "-f", "-o", "/dev/null", "-e", f"trace={CALLS}", "-e", inject, "-p", victim],
        stderr=subprocess.PIPE,
        text=True,
    ) as tracer:
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        if "attached" not in attached:
            os.kill(int(victim), signal.SIGKILL)
            zygote.stdout.readline()
            pytest.skip(f"strace cannot trace here: {attached.strip()}")
        zygote.stdin.write("\n")
        status = int(zygote.stdout.readline())
        tracer.stderr.read()
    assert status in (0, -signal.SIGKILL)
    return status != 0


def check(directory: Path) -> None:
    """Open the cache, as the next process does, and hold it to its promises."""
    with Cache.open(directory) as cache:
        files, rows = files_of(directory), stored_rows(directory)
        assert rows.items() <= files.items(), "P1: a stored row has its file, of the right size"
        for digest in files:
            data = (directory / "blobs" / digest.replace(":", "/")).read_bytes()
            assert digest_of(data) == digest, "P2: a file has the content its name says"
        for image in cache.list_manifests():
            if image.complete:
                blobs = cache.get_image_blobs(image.name)
                assert all(files.get(blob.digest) == blob.size for blob in blobs), "P3: a complete image is whole"
        cache.collect_garbage()
        assert files_of(directory) == stored_rows(directory), "P5: files are stored rows"
        left = snapshot(directory)
        used = {row[2] for row in left["image_blobs"]}  # type: ignore[attr-defined]
        assert {row[0] for row in left["blobs"]} == used, "P6: nothing unreferenced is left"  # type: ignore[attr-defined]
        assert left["leases"] == left["trash"] == left["ingest"] == []
        assert left["locks"] == ["write.lock"]


def check_kept(directory: Path) -> None:
    with Cache.open(directory) as cache:
        assert cache.is_image_complete("kept:1"), "P7: what was acknowledged survives"
        for digest, data in victims.KEPT.blobs.items():
            assert cache.get_blob(digest) == data


def recover_from(operation: str, directory: Path) -> None:
    """What comes after a crash: the next open, and the same operation again."""
    cache = directory / ("new-cache" if operation == "open_anew" else "cache")
    check(cache)
    victims.OPERATIONS[operation](directory)
    check(cache)
    if operation != "open_anew":
        check_kept(cache)


@contextmanager
def copied_before_each_call(directory: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Copy what is on disk before each call that changes it, and before each commit, as a crash would leave it."""
    guard = threading.RLock()
    copying = False

    def copy(*_: object) -> None:
        nonlocal copying
        with guard:
            if not copying:
                copying = True
                ignored = shutil.ignore_patterns("*-shm")  # of running processes alone
                shutil.copytree(directory, copies / str(len(os.listdir(copies))), ignore=ignored)
                copying = False

    def watched(call: Callable[..., object]) -> Callable[..., object]:
        def replacement(*arguments: object, **options: object) -> object:
            copy()
            return call(*arguments, **options)

        return replacement

    with monkeypatch.context() as patch:
        for name in ("link", "rename", "unlink", "rmdir", "mkdir", "fsync", "close"):
            patch.setattr(os, name, watched(getattr(os, name)))
        event.listen(Engine, "commit", copy)
        try:
            yield
        finally:
            event.remove(Engine, "commit", copy)


@pytest.mark.parametrize("operation", victims.OPERATIONS)
def test_a_crash_between_any_two_calls_is_recovered_from(
    operation: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, copies = tmp_path / "work", tmp_path / "copies"
    shutil.copytree(prepared, directory)
    copies.mkdir()
    with copied_before_each_call(directory, copies, monkeypatch):
        victims.OPERATIONS[operation](directory)
    found = sorted(copies.iterdir(), key=lambda path: int(path.name))
    assert len(found) > 5
    # `os.fsync` costs much of the time, and keeps nothing here: no power is cut.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for copy in found:
        recover_from(operation, copy)


@pytest.mark.parametrize("operation", victims.OPERATIONS)
def test_a_kill_at_a_system_call_is_recovered_from(
    operation: str, peer: Callable[[str], str], zygote: subprocess.Popen[str], prepared: Path, tmp_path: Path
) -> None:
    strace = peer("strace")
    call = kills = 0
    killed = True
    while killed:
        call += 1 if call < 3 else STEP
        directory = tmp_path / str(call)
        shutil.copytree(prepared, directory)
        killed = killed_at(strace, zygote, operation, directory, call)
        kills += killed
        recover_from(operation, directory)
        shutil.rmtree(directory)
    assert kills >= 3
