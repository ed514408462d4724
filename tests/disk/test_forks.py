"""A fork never waits for a caller's code or another process, whatever another thread does with a cache."""

from __future__ import annotations

import fcntl
import io
import os
import sqlite3
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cachedb import Cache, CacheError, DigestMismatch
from cachedb.disk import downloads, forks, locks, turns, writer
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.query import _Rows
from tests.conftest import run_python
from tests.operations.test_upgrade import unpack_frozen_cache
from tests.support import make
from tests.support.make import save

# One thread stops inside an operation; the main thread forks, then lets it continue. If the fork waited for that
# thread, the script would hang: faulthandler then prints the stacks of all threads and exits.
SCRIPT = """
    import faulthandler, fcntl, os, sqlite3, subprocess, sys, threading
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    from cachedb import Cache
    from cachedb.index.sqlite import backups
    from cachedb.index.sqlite import database
    from cachedb.disk import forks, locks, turns
    from cachedb.index.sqlite import functions
    from cachedb.operations import upgrade
    from tests.support import make
    from tests.support.make import save

    faulthandler.dump_traceback_later(100, exit=True)
    directory, other = map(Path, sys.argv[1:])
    cache = Cache.open(directory)
    stopped, resume, errors = threading.Event(), threading.Event(), []

    def stop_here(*_):
        stopped.set()
        assert resume.wait(90)
        return True

    def signal_and_call(function):
        def call(*arguments, **options):
            stopped.set()
            return function(*arguments, **options)
        return call

    PREPARE

    def work():
        try:
            WORK
        except BaseException as error:
            errors.append(repr(error))
        finally:
            stopped.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert stopped.wait(90)
    assert not errors, errors
    FORK
    resume.set()
    RELEASE
    thread.join()
    assert not errors, errors
    cache.close()
    print("done")
"""
FORK = """
    if (child := os.fork()) == 0:
        CHILD
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
USE_CACHE = 'assert cache.list_names(); assert cache.has_blob(cache.add_blob(b"of the child")); cache.close()'


def run(directory: Path, other: Path, work: str, prepare: str = "", release: str = "", fork: str = "") -> None:
    fork = fork or FORK.replace("CHILD", USE_CACHE)
    script = textwrap.dedent(SCRIPT)
    for name, text in (("PREPARE", prepare), ("WORK", work), ("FORK", fork), ("RELEASE", release)):
        place = next(line for line in script.splitlines() if line.strip() == name)
        text = textwrap.dedent(text).strip("\n") or "pass"
        script = script.replace(place, textwrap.indent(text, place.removesuffix(name)))
    assert run_python(script, directory, other) == "done\n"


ROWS = "SELECT value FROM json_each('[1, 2, 3]')"
CALLERS = {
    "rows of an answer": f'with cache.sql("{ROWS}") as answer: assert [stop_here() and row for row in answer.rows]',
    "many rows of an answer": 'with cache.sql("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT '
    '9999) SELECT hex(zeroblob(x % 999)) FROM c") as answer: assert sum(stop_here() for _ in answer.rows) == 9999',
    "a hold": 'with cache.hold("app:1"): stop_here()',
    "producing": 'with cache.producing("app:2"): stop_here()',
    "producing a blob": 'with cache.producing_blob("sha256:" + 64 * "0"): stop_here()',
    "an open blob": 'with cache.open_blob(cache.add_blob(b"x")): stop_here()',
    "the source of a blob": "cache.add_blob(Source())",
    "the progress of an import": 'cache.cache_from_tar(other / "a.tar", progress=stop_here)',
    "the progress of an export": 'cache.export("app:1", other / "out.tar", progress=stop_here)',
    "the progress of a verification": "cache.verify(repair=True, progress=stop_here)",
    "the progress of an adoption": 'cache.adopt(other / "old", progress=stop_here)',
    "the progress of an adoption of stored blobs": 'cache.adopt(other / "same", progress=stop_here)',
    "the progress of a backup": "backups._OPCODES = 10; upgrade.back_up(directory, progress=stop_here)",
    "the progress of an upgrade": 'upgrade.upgrade(other / "0001", progress=stop_here)',
    "the progress of a backup before an upgrade": "backups._OPCODES = 10\n"
    'upgrade.upgrade(other / "0001", progress=lambda what, *_: what == "backing up" and stop_here())',
}
SOURCE = """
    class Source:
        def read(self, _size=-1):
            stop_here()
            return b""
"""


@pytest.fixture
def other(tmp_path: Path, directory: Path) -> Path:
    """Make a folder with an archive, two caches to adopt and one to upgrade."""
    folder = tmp_path / "other"
    folder.mkdir()
    with Cache.open(directory) as cache:
        save(cache, "app:1", make.image(1))
    make.write(folder / "a.tar", make.oci_files({"new:1": make.image(2)}))
    make.json_cache(folder / "old", {"new/2": make.image(3)})
    make.json_cache(folder / "same", {"app/1": make.image(1)})
    unpack_frozen_cache("0001", folder / "0001")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("place", CALLERS)
def test_a_fork_does_not_wait_for_a_callers_code(directory: Path, other: Path, place: str) -> None:
    run(directory, other, CALLERS[place], SOURCE)


@pytest.mark.slow
def test_a_subprocess_with_a_preexec_function_does_not_wait_for_a_reader(directory: Path, other: Path) -> None:
    fork = 'assert subprocess.run(["true"], preexec_fn=int).returncode == 0'
    run(directory, other, CALLERS["rows of an answer"], fork=fork)


@pytest.mark.slow
def test_a_reader_of_an_answer_may_fork_and_use_the_cache_in_a_pool(directory: Path, other: Path) -> None:
    pool = """
    pool = ThreadPoolExecutor(2)
    def fork():
        if (child := os.fork()) == 0:
            assert cache.list_names()
            os._exit(0)
        return os.waitpid(child, 0)[1]
    """
    work = f"""
    with cache.sql("{ROWS}") as answer:
        for row in answer.rows:
            assert pool.submit(fork).result() == 0
            assert pool.submit(cache.list_names).result()
    """
    run(directory, other, work, pool, fork="pass")


@pytest.mark.slow
def test_a_fork_does_not_wait_for_an_answer_that_stays_open(directory: Path, other: Path) -> None:
    work = f"""
    kept.append(cache.sql("{ROWS}"))
    kept.append(kept[0].__enter__())
    next(kept[1].rows)
    """
    run(directory, other, work, "kept = []", fork=f"thread.join()\n{textwrap.dedent(FORK).replace('CHILD', USE_CACHE)}")


# Each value: code that makes the operation wait, the operation, and code that ends the wait.
WAITING = {
    "the write lock": (
        'lock = open(directory / "locks" / "write.lock")\nfcntl.flock(lock, fcntl.LOCK_EX)\n'
        "turns._await_turn = signal_and_call(turns._await_turn)",
        'cache.tag("app:1", "app:2")',
        "fcntl.flock(lock, fcntl.LOCK_UN)",
    ),
    "a transaction of another program": (
        'shell = sqlite3.connect(directory / "index.db", isolation_level=None)\nshell.execute("BEGIN IMMEDIATE")\n'
        "from cachedb.disk.waiting import Wait; Wait.nap = signal_and_call(Wait.nap)",
        'cache.tag("app:1", "app:2")',
        'shell.execute("COMMIT")',
    ),
    "the folder, to read": (
        'folder = os.open(directory / "locks", os.O_RDONLY)\nfcntl.flock(folder, fcntl.LOCK_EX)\n'
        "cache._database.close()\n"
        "from cachedb.disk.waiting import Wait; Wait.nap = signal_and_call(Wait.nap)",
        "assert cache.list_manifests()",
        "fcntl.flock(folder, fcntl.LOCK_UN)",
    ),
    "the folder, to query": (
        'folder = os.open(directory / "locks", os.O_RDONLY)\nfcntl.flock(folder, fcntl.LOCK_EX)\n'
        "cache._database.close()\n"
        "from cachedb.disk.waiting import Wait; Wait.nap = signal_and_call(Wait.nap)",
        'with cache.sql("SELECT 1") as answer: assert list(answer.rows) == [(1,)]',
        "fcntl.flock(folder, fcntl.LOCK_UN)",
    ),
    "the folder, to look up": (
        'folder = os.open(directory / "locks", os.O_RDONLY)\nfcntl.flock(folder, fcntl.LOCK_EX)\n'
        "cache._database.close()\n"
        "from cachedb.disk.waiting import Wait; Wait.nap = signal_and_call(Wait.nap)",
        'assert not cache.has_blob("sha256:" + 64 * "0")',
        "fcntl.flock(folder, fcntl.LOCK_UN)",
    ),
    "another backup": (
        'lock = (directory / "backups" / ".lock").open("w")\nfcntl.flock(lock, fcntl.LOCK_EX)\n'
        "locks.hold_lock = signal_and_call(locks.hold_lock)",
        "upgrade.back_up(directory)",
        "fcntl.flock(lock, fcntl.LOCK_UN)",
    ),
    "another producer": (
        'import hashlib; key = hashlib.sha256(b"app:2").hexdigest()\n'
        'lock = (directory / "locks" / f"{key}.producing").open("w")\nfcntl.flock(lock, fcntl.LOCK_EX)\n'
        "locks.acquire = signal_and_call(locks.acquire)",
        'with cache.producing("app:2"): pass',
        "fcntl.flock(lock, fcntl.LOCK_UN)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WAITING)
def test_a_fork_does_not_wait_for_another_process(directory: Path, other: Path, what: str) -> None:
    prepare, work, release = WAITING[what]
    fork = FORK.replace("CHILD", "pass")  # the child has copies of the locks of this script
    run(directory, other, work, prepare, release, fork)


@pytest.mark.slow
def test_a_child_forked_during_an_export_keeps_no_lock_of_the_folder(directory: Path, other: Path) -> None:
    fork = """
    readable, writable = os.pipe()
    if (child := os.fork()) == 0:
        os.close(writable)
        os.read(readable, 1)
        os._exit(0)
    """
    release = """
    thread.join()
    with Cache.open(directory, wait=0) as again:
        again.export("app:1", other / "layout", format="oci-dir")
    opened = {os.readlink(f"/proc/{child}/fd/{fd}") for fd in os.listdir(f"/proc/{child}/fd")}
    assert os.path.realpath(other / "layout") not in opened
    os.close(writable)
    os.waitpid(child, 0)
    """
    run(
        directory,
        other,
        'cache.export("app:1", other / "layout", format="oci-dir", progress=stop_here)',
        "",
        release,
        fork,
    )


@pytest.mark.slow
def test_a_fork_interrupts_a_long_query_which_then_runs_again(directory: Path, other: Path) -> None:
    prepare = """
    functions._human = lambda _: stopped.set() or (None if resume.is_set() else "")
    """
    work = """
    with cache.sql("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
                   "SELECT 'found' FROM c WHERE human(x) IS NULL LIMIT 1") as answer:
        assert list(answer.rows) == [("found",)]
    """
    run(directory, other, work, prepare)


def test_a_fork_ends_a_streamed_answer_and_the_child_can_use_the_cache(directory: Path) -> None:
    with Cache.open(directory) as cache:
        mine = cache.add_blob(b"mine")
        with cache.sql(ROWS, stream=True) as answer:
            assert next(answer.rows) == (1,)
            if (child := os.fork()) == 0:
                cache.add_blob(b"of the child")
                cache.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            with pytest.raises(CacheError, match="a fork ended the query: run it again"):
                next(answer.rows)
        assert cache.has_blob(mine)


@pytest.mark.slow
def test_a_large_answer_is_not_kept_in_memory(directory: Path) -> None:
    output = run_python(
        """
        import resource, sys
        from cachedb import Cache
        count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {})"
        many = f"{count} SELECT x, hex(zeroblob(2000)) FROM c"
        with Cache.open(sys.argv[1]) as cache:
            for number in (10, 25_000):
                with cache.sql(many.format(number)) as answer:
                    assert [x for x, _ in answer.rows] == list(range(1, number + 1))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                print(peak)
        """,
        directory,
        new_interpreter=True,
    )
    small_peak, large_peak = map(int, output.split())
    assert large_peak - small_peak < 60 * 1024, "KiB; the rows are 100 MB"


@pytest.mark.parametrize("child", ["leaves the block", "reads all rows"])
def test_a_child_does_not_move_the_position_of_a_large_answer(directory: Path, child: str) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb import Cache
        query = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 20000) SELECT x, "
        with Cache.open(sys.argv[1]) as cache:
            try:
                with cache.sql(query + "hex(zeroblob(200)) FROM c") as answer:
                    first, pid, rest = next(answer.rows), os.fork(), []
                    if pid:
                        os.waitpid(pid, 0)
                    elif sys.argv[2] == "leaves the block":
                        sys.exit()
                    print([first[0], *(x for x, _ in answer.rows)] == list(range(1, 20_001)), flush=True)
            finally:
                if not pid:
                    os._exit(0)
        """,
        directory,
        child,
    )
    assert output.splitlines() == ["True"] * (1 if child == "leaves the block" else 2)


@pytest.mark.parametrize("count", [1, 100_000], ids=["in memory", "in a file"])
def test_rows_cannot_be_read_after_their_block(cache: Cache, count: int) -> None:
    query = (
        f"WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT {count}) SELECT hex(zeroblob(50)) FROM c"
    )
    with cache.sql(query) as answer:
        pass
    with pytest.raises(CacheError, match=r"^the block of the query has ended: read its rows inside the block$"):
        next(answer.rows)


def test_rows_of_any_size_are_returned_as_added(tmp_path: Path) -> None:
    added = [(number, None, 1.5, "\udcff\0é" * (number % 50), bytes(number * 30)) for number in range(1000)]
    rows = _Rows()
    for row in added:
        rows.add(row)
    assert list(rows) == added
    rows.close()


# The blocks that a fork waits for


def test_an_interrupt_at_the_end_of_a_block_blocks_no_later_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = forks._changed

    class Interrupted:
        entered = 0

        def __enter__(self) -> None:
            self.entered += 1
            if self.entered == 2:
                raise KeyboardInterrupt
            changed.acquire()

        def __exit__(self, *_: object) -> None:
            changed.release()

        def notify_all(self) -> None:
            changed.notify_all()

    def work() -> None:
        with pytest.raises(KeyboardInterrupt), forks.no_fork():
            pass

    with monkeypatch.context() as patch:
        patch.setattr(forks, "_changed", Interrupted())
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert not any(forks._unforked.values())


def test_an_interrupt_while_a_fork_waits_leaves_the_locks_usable() -> None:
    output = run_python(
        """
        import os, signal, sys, threading, time
        from cachedb.disk import forks, locks, turns
        inside, seen = threading.Event(), threading.Event()
        signal.signal(signal.SIGINT, lambda *_: seen.set() or signal.default_int_handler(*_))
        sys.unraisablehook = lambda raised: print(raised.exc_type.__name__, flush=True)

        def work():
            with forks.no_fork():
                inside.set()
                while not forks.is_fork_waiting():
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGINT)
                seen.wait()

        thread = threading.Thread(target=work)
        thread.start()
        inside.wait()
        if os.fork() == 0:
            with forks.no_fork():
                os._exit(0)
        assert os.wait()[1] == 0
        thread.join()
        assert not forks.is_fork_waiting()
        with forks.no_fork():
            print("free")
        """
    )
    assert output == "KeyboardInterrupt\nfree\n"


def test_a_signals_handler_may_fork_while_a_lock_file_is_opened(tmp_path: Path) -> None:
    output = run_python(
        """
        import os, signal, sys
        from pathlib import Path
        from cachedb.disk import locks
        signal.alarm(60)  # ends a fork that waits for its own process
        create, children = locks._open_or_create, []

        def interrupted(path, flags):
            os.kill(os.getpid(), signal.SIGUSR1)
            return create(path, flags)

        def fork(*_):
            if (child := os.fork()) == 0:
                os._exit(0)
            children.append(child)

        locks._open_or_create = interrupted
        signal.signal(signal.SIGUSR1, fork)
        with locks.hold_lock(Path(sys.argv[1])):
            pass
        print([os.waitpid(child, 0)[1] for child in children])
        """,
        tmp_path / "lock",
    )
    assert output == "[0]\n"


def test_an_object_closed_before_a_fork_may_use_a_no_fork_block() -> None:
    output = run_python(
        """
        import os, signal, threading, time
        from cachedb.disk import forks
        signal.alarm(60)  # ends a fork that waits for its own thread
        inside = threading.Event()

        class Closable:
            def close(self):
                with forks.no_fork():
                    print("closed", flush=True)

        def work():
            with forks.no_fork():
                inside.set()
                while not forks.is_fork_waiting():
                    time.sleep(0.001)

        closable, thread = Closable(), threading.Thread(target=work)
        forks.close_before_fork(closable)
        thread.start()
        inside.wait()
        if os.fork() == 0:
            os._exit(0)
        thread.join()
        print(os.wait()[1])
        """
    )
    assert output == "closed\n0\n"


def test_an_error_in_the_queue_releases_its_lock_though_a_child_has_the_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []

    def fail(queue: object, _place: int) -> int:
        copies.append(os.dup(queue.fileno()))  # type: ignore[attr-defined] # a new child has such a copy
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(turns, "_read_number", fail)
        with pytest.raises(KeyboardInterrupt), turns.hold_in_turn(tmp_path / "lock"):
            pass
    lock = locks.acquire(tmp_path / "lock.queue", wait=False)
    assert lock is not None
    locks.release(lock)
    os.close(copies[0])


def test_a_write_fails_if_another_program_locks_the_index_for_too_long(
    index: Database,
) -> None:
    index.wait_seconds = 0.1
    shell = sqlite3.connect(index.path, isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    with (
        pytest.raises(CacheError, match=r"waited 0\.1 s for the write lock, which is held by .*: try again later"),
        index.write(),
    ):
        pass
    assert time.monotonic() - begun < 30
    shell.execute("COMMIT")
    shell.close()
    with index.write():
        pass


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Copy each descriptor when it is locked, as a child that is forked then does; return the copies."""
    made: list[int] = []
    flock = fcntl.flock

    def lock(file: int, operation: int) -> None:
        flock(file, operation)
        if operation != fcntl.LOCK_UN:
            made.append(os.dup(file))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lock)
        yield made
    for copy in made:
        os.close(copy)


def test_a_child_forked_during_a_look_at_a_lock_keeps_no_lock(tmp_path: Path, copies: list[int]) -> None:
    path = tmp_path / "lock"
    path.touch()
    assert not locks.is_held(path)
    assert copies
    lock = locks.acquire(path, wait=False)
    assert lock is not None
    locks.release(lock)


def test_a_child_forked_during_a_download_keeps_no_lock(tmp_path: Path, copies: list[int]) -> None:
    (tmp_path / "part").write_bytes(b"a")
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(2):
        assert downloads.find_resumable_bytes(folder, "part", 3) == 1
        with pytest.raises(DigestMismatch):
            writer.receive(io.BytesIO(b""), "part", folder=folder, size=3, resume=True)
        os.chmod(tmp_path / "part", 0o600)
    os.close(folder)
    assert len(copies) == 4


def test_a_child_forked_during_a_download_does_not_release_its_lock(tmp_path: Path) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb.disk import downloads, writer

        class Source:
            def readinto(self, buffer):
                if (child := os.fork()) == 0:
                    raise KeyboardInterrupt
                os.waitpid(child, 0)
                file = os.open(sys.argv[1], os.O_RDONLY)
                print(downloads._has_writer(file), flush=True)
                return 0

        try:
            writer.receive(Source(), sys.argv[1], resume=True)
        except KeyboardInterrupt:
            os._exit(0)
        """,
        tmp_path / "part",
    )
    assert output == "True\n"


def test_a_signal_handler_may_use_a_no_fork_block_at_any_moment_of_another() -> None:
    moment = instructions = 0

    def handle(frame: FrameType, _event: str, _argument: object) -> Any:
        nonlocal instructions
        frame.f_trace_opcodes = True
        instructions += 1
        if instructions == moment:
            with forks.no_fork():
                pass
        return handle

    before = sys.gettrace()
    while instructions >= moment:
        moment, instructions = moment + 1, 0
        sys.settrace(handle)
        try:
            with forks.no_fork():
                pass
        finally:
            sys.settrace(before)
        assert threading.get_ident() not in forks._unforked
    assert moment > 50
