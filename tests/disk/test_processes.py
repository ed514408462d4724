"""Many processes and threads use one cache, and no way to start, copy or end them breaks its promises (P11)."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from cachedb import Cache, NotInCache
from tests.conftest import run_python, snapshot, start_python, stored_rows
from tests.support import make
from tests.support.make import save
from tests.support.promises import check
from tests.support.waiting import wait_until

METHODS = ("fork", "spawn", "forkserver")


def store(cache: Cache, number: int) -> str:
    """Store an image, read it and close the cache: the work of one worker."""
    with cache:
        save(cache, f"app:{number}", make.image(number, 99))
        with cache.hold(f"app:{number}"):
            assert cache.get_image_blobs(f"app:{number}")
    return str(cache.directory)


def store_one(pair: tuple[Cache, int]) -> str:
    return store(*pair)


def store_and_wait(cache: Cache) -> None:
    cache.add_blob(b"of a killed child")
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_cache_can_be_passed_to_processes_and_pools(cache: Cache, method: str) -> None:
    context = multiprocessing.get_context(method)
    mine = cache.add_blob(b"mine")
    process = context.Process(target=store, args=(cache, 0))  # type: ignore[attr-defined]
    process.start()
    process.join(60)
    assert process.exitcode == 0
    with context.Pool(2) as pool:
        assert pool.map(store_one, [(cache, number) for number in (1, 2)], 1) == [str(cache.directory)] * 2
        pool.close()
        pool.join()
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        assert set(executor.map(store, [cache] * 2, (3, 4))) == {str(cache.directory)}
    assert [str(image.name) for image in cache.list_manifests()] == [f"app:{number}" for number in range(5)]
    cache.collect_garbage()
    assert cache.get_blob(mine) == b"mine", "the parent lost its lease"
    cache.close()
    check(cache.directory)


def test_a_copied_or_pickled_cache_has_its_own_session(cache: Cache) -> None:
    mine = cache.add_blob(b"mine")
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        with other:
            assert other.directory == cache.directory
            assert other.get_blob(mine) == b"mine"
            theirs = other.add_blob(b"theirs")
            cache.collect_garbage()
            assert other.has_blob(theirs)
        cache.collect_garbage()
        assert cache.has_blob(mine)
        assert not cache.has_blob(theirs), "it survived its session"


@pytest.mark.slow
def test_a_killed_child_breaks_no_promise(cache: Cache) -> None:
    process = multiprocessing.get_context("spawn").Process(target=store_and_wait, args=(cache,))
    process.start()
    assert wait_until(lambda: len(stored_rows(cache.directory)) == 1)
    process.kill()
    process.join()
    assert cache.collect_garbage().blobs == 1
    save(cache, "app:1", make.image(1))
    cache.close()
    check(cache.directory)


@pytest.mark.slow
def test_threads_do_mixed_work_on_one_cache(cache: Cache, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "new.tar", make.oci_files({"new:1": make.image(50)}))
    save(cache, "kept:1", make.image(51))

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(4):
            name = f"app:{rng.randrange(4)}"
            try:
                match rng.randrange(8):
                    case 0:
                        save(cache, name, make.image(rng.randrange(4), 9))
                    case 1:
                        cache.remove_manifest(name)
                    case 2:
                        cache.collect_garbage()
                    case 3:
                        cache.cache_from_tar(archive)
                    case 4:
                        cache.export("kept:1", tmp_path / f"{number}.tar")
                    case 5:
                        with cache.hold(name):
                            for blob in cache.get_image_blobs("kept:1"):
                                assert blob.path
                                assert blob.path.exists()
                    case 6:
                        cache.release_hold(cache.add_hold(name, seconds=60)[0].id)
                    case 7:
                        with cache.producing(name) as image:
                            if image is None:
                                save(cache, name, make.image(number))
            except NotInCache:
                pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))
    assert cache.is_image_complete("kept:1")
    cache.close()
    check(cache.directory)


@pytest.mark.slow
def test_threads_of_a_pool_fork(directory: Path) -> None:
    output = run_python(
        """
        import os, sys
        from concurrent.futures import ThreadPoolExecutor
        from cachedb import Cache
        from tests.support import make
        from tests.support.make import save

        cache = Cache.open(sys.argv[1])

        def work(number):
            save(cache, f"parent:{number}", make.image(number))
            if (child := os.fork()) == 0:
                with cache:
                    save(cache, f"child:{number}", make.image(number, 99))
                os._exit(0)
            cache.collect_garbage()
            return os.waitpid(child, 0)[1]

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(8))) == [0] * 8
        print(len(cache.list_manifests()))
        cache.close()
        """,
        directory,
    )
    assert output == "16\n"
    check(directory)


# Signals

CLI = """
    import os, signal, sys, threading
    import alembic.command, sqlalchemy
    import cachedb.cache, cachedb.cli.main, cachedb.operations.verify
    import cachedb.transports.archive.read, cachedb.transports.archive.write_layout
    from cachedb.cli.main import main
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends a child that has not begun yet
    print("ready", flush=True)
    for line in sys.stdin:
        arguments = line.split()
        if (child := os.fork()) == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(arguments.pop(0), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.argv = ["cachedb", *arguments]
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                main()
            except KeyboardInterrupt:
                if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                    raise  # main() has begun and must catch every interrupt
                os._exit(130)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def command_line() -> Iterator[subprocess.Popen[str]]:
    """Start a process that runs command lines in children, which need no imports of their own."""
    with start_python(CLI) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.fixture(scope="module")
def large_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make.image(1, 2, 3, size=2_000_000)
    return make.write(tmp_path_factory.mktemp("archives") / "large.tar", make.oci_files({"large:1": made}))


def run_and_signal(process: subprocess.Popen[str], number: int, wait: float, errors: Path, *arguments: object) -> int:
    """Run a command line, send it a signal after `wait` seconds and return its exit code."""
    assert process.stdout is not None
    print(errors, *arguments, file=process.stdin, flush=True)
    child = int(process.stdout.readline())
    time.sleep(wait)
    with suppress(ProcessLookupError):  # it has ended
        os.kill(child, number)
    return int(process.stdout.readline())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_an_interrupted_command_breaks_no_promise(
    command_line: subprocess.Popen[str], large_archive: Path, directory: Path, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    with Cache.open(directory) as cache:
        save(cache, "kept:1", make.image(7, size=500_000))
        for number in range(20):
            save(cache, f"app:{number}", make.image(100 + number))
    exported = tmp_path / "out" / "exported.tar"
    exported.parent.mkdir()
    errors = tmp_path / "errors"
    errors.touch()  # the command may end before it opens this file
    commands = [
        ("import", large_archive),
        ("gc",),
        ("verify",),
        ("export", "kept:1", exported),
        ("hold", "kept:1", "app:1", "--for", "1h"),
        ("rm", *(f"app:{number}" for number in range(2, 20))),
    ]
    for command in (commands[0], rng.choice(commands[1:])):
        number, code = rng.choice([(signal.SIGINT, 130), (signal.SIGTERM, 143)])
        # The signal comes at any time from before main() handles signals until after the command's end.
        ended = run_and_signal(command_line, number, rng.uniform(0.02, 0.12), errors, "--dir", directory, *command)
        stderr = errors.read_text()
        assert ended in (0, code, -number), stderr
        messages = [line for line in stderr.splitlines() if line and not line.startswith("cachedb: waiting for ")]
        assert messages in ([], ["cachedb: interrupted"]), stderr
        with Cache.open(directory) as cache:
            left = snapshot(directory)
            assert left["ingest"] == left["trash"] == []
            assert left["locks"] == ["write.lock", "write.queue"]
            holds = cache.list_holds()
            assert len(holds) == (2 if command[0] == "hold" and ended == 0 else len(holds))
            assert len(holds) in (0, 2), "one of two holds was made"
            assert {row[1] for row in left["leases"]} == {hold.id for hold in holds}  # type: ignore[attr-defined]
            assert cache.is_image_complete("kept:1")
            assert cache.is_image_complete("large:1") or command[0] != "import" or ended != 0
        assert os.listdir(exported.parent) in ([], [exported.name]), "the export left a part file"
        check(directory)
