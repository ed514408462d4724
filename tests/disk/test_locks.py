"""Lock files: one holder at a time, in the order of asking; what death, errors and forks do to a lock."""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cachedb.disk import byte_locks, folders, forks, lock_holders, locks, turns
from cachedb.disk.regular import open_regular
from tests.conftest import run_python, running
from tests.support.processes import read_state
from tests.support.waiting import wait_until

HOLDER = """
    import sys, time
    from pathlib import Path
    from cachedb.disk import forks, locks, turns
    lock = locks.acquire(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


def is_free(path: Path) -> bool:
    """Return whether no process holds the lock."""
    lock = locks.acquire(path, wait=False)
    if lock is not None:
        locks.release(lock)
    return lock is not None


def count_waiters(path: Path) -> int:
    """Return how many processes and threads wait for the lock."""
    return len(re.findall(rf"-> .*:{path.stat().st_ino} ", Path("/proc/locks").read_text()))


def count_open_files() -> int:
    """Return how many files this process has open, after collecting garbage of other tests."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.hold_lock(path):
        assert not is_free(path)
    assert is_free(path)


def test_a_lock_is_released_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with running(HOLDER, path) as holder:
        assert not is_free(path)
        holder.kill()
        holder.wait()
        assert is_free(path)


def test_a_lock_is_released_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), locks.hold_lock(path):
        raise KeyError
    assert is_free(path)


def test_locking_and_failing_to_lock_leave_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    before = count_open_files()
    for _ in range(3):
        with locks.hold_lock(path):
            assert not is_free(path)
    with pytest.raises(FileNotFoundError):
        locks.acquire(tmp_path / "nowhere" / "lock")
    assert count_open_files() == before


def test_an_interrupt_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "lock"
    monkeypatch.setattr(locks, "leads_to", interrupt)
    with pytest.raises(KeyboardInterrupt) as raised:
        locks.acquire(path)
    monkeypatch.undo()
    assert is_free(path), "after an interrupt of the check behind the lock"
    monkeypatch.setattr(lock_holders, "clear_record", interrupt)
    with pytest.raises(KeyboardInterrupt) as raised_again, locks.hold_lock(path):
        pass
    monkeypatch.undo()
    assert is_free(path), "after an interrupt at the end of the block"
    del raised, raised_again  # until here they kept the frames, and with them the files


def test_the_lock_of_a_file_that_an_interrupt_loses_is_released(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        locks.acquire(path)  # an interrupt came before the caller got the file
        assert is_free(path)
    folder = forks.open_own(lambda: locks._LockFolder(tmp_path))
    descriptor = folder.fileno()
    del folder
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_waiter_for_an_unlinked_lock_file_locks_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = locks.acquire(path)
    assert first is not None
    taken = []
    waiter = threading.Thread(target=lambda: taken.append(locks.acquire(path)))
    waiter.start()
    assert wait_until(lambda: count_waiters(path) == 1)
    path.unlink()
    locks.release(first)
    waiter.join(60)
    assert taken[0] is not None
    assert os.fstat(taken[0].fileno()).st_ino == path.stat().st_ino
    assert not is_free(path)
    locks.release(taken[0])


def test_a_child_does_not_keep_the_lock_of_a_parent_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = """
        import os, sys, time
        from pathlib import Path
        from cachedb.disk import forks, locks, turns
        lock = locks.acquire(Path(sys.argv[1]))
        if os.fork() == 0:
            print("child", flush=True)
            sys.stdin.read()  # until the test ends
            os._exit(0)
        time.sleep(60)
    """
    with running(script, path) as parent:
        assert not is_free(path)
        parent.kill()
        parent.wait()
        assert wait_until(lambda: is_free(path))


def test_a_child_releases_only_its_own_locks(tmp_path: Path) -> None:
    output = run_python(
        """
        import os, sys
        from pathlib import Path
        from cachedb.disk import forks, locks, turns

        mine, other = Path(sys.argv[1]) / "mine", Path(sys.argv[1]) / "other"
        with locks.hold_lock(mine):
            child = os.fork()
            if child == 0:
                # The new file gets the descriptor of the one that the fork closed.
                lock = locks.acquire(other)
        if child == 0:
            assert lock is not None and not lock.closed
            assert locks.acquire(other, wait=False) is None, "the parent's block released the child's lock"
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with locks.hold_lock(mine):
            if (child := os.fork()) == 0:
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert locks.acquire(mine, wait=False) is None, "the child released the parent's lock"
        print("done")
        """,
        tmp_path,
    )
    assert output == "done\n"


@pytest.mark.slow
def test_a_fork_waits_for_begun_blocks_and_new_blocks_wait_for_the_fork(tmp_path: Path) -> None:
    output = run_python(
        """
        import os, sys, threading, time
        from pathlib import Path
        from cachedb.disk import forks, locks, turns

        class Closed:
            def close(self):
                order.append("closed")

        order, inside, leave = [], threading.Event(), threading.Event()
        closed = Closed()
        forks.close_before_fork(closed)

        def first():
            with forks.no_fork():
                inside.set()
                leave.wait()
                with forks.no_fork():  # a thread inside a block may begin another
                    lock = locks.acquire(Path(sys.argv[1]) / "lock")
                    locks.release(lock)
                order.append("first")

        def second():
            with forks.no_fork():
                order.append("second")

        def fork():
            child = os.fork()
            if child == 0:
                with forks.no_fork():
                    pass
                os._exit(0 if order == ["first", "closed"] else 1)
            order.append("forked")
            statuses.append(os.waitpid(child, 0)[1])

        statuses = []
        threads = [threading.Thread(target=target, daemon=True) for target in (first, fork, second)]
        for thread in threads:
            thread.start()
            inside.wait()
            while thread is threads[1] and not forks._forking and not order:
                time.sleep(0.001)
        time.sleep(0.2)  # time for the last thread to begin
        assert order == [], order
        leave.set()
        for thread in threads:
            thread.join(50)
        assert statuses == [0], statuses
        assert order[:2] == ["first", "closed"] and set(order[2:]) == {"forked", "second"}, order
        print("done")
        """,
        tmp_path,
    )
    assert output == "done\n"


def test_a_thread_that_a_fork_waits_for_may_log_and_use_a_pool() -> None:
    """A fork takes the locks of `logging` and `concurrent.futures` too, in any order of imports."""
    script = """
        import os, threading, time
        from cachedb.disk import forks, locks, turns
        import logging
        from concurrent.futures import ThreadPoolExecutor

        def fork():
            if (child := os.fork()) == 0:
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])

        statuses = []
        with forks.no_fork():
            forker = threading.Thread(target=fork, daemon=True)
            forker.start()
            while not forks._forking:
                time.sleep(0.001)
            done = []
            def work():
                logging.getLogger("new").isEnabledFor(logging.INFO)
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(done.append, 1).result()
            worker = threading.Thread(target=work, daemon=True)
            worker.start()
            worker.join(20)
            in_time = list(done)
        forker.join(20)
        print(in_time, statuses)
    """
    assert run_python(script) == "[1] [0]\n"


@pytest.mark.slow
def test_threads_that_lock_and_threads_that_fork_do_not_deadlock(tmp_path: Path) -> None:
    script = """
        import os, sys, threading
        from pathlib import Path
        from cachedb.disk import forks, locks, turns

        def lock(number):
            for _ in range(200):
                with forks.no_fork(), locks.hold_lock(Path(sys.argv[1]) / f"lock-{number % 2}"):
                    pass

        def fork():
            for _ in range(20):
                if (child := os.fork()) == 0:
                    lock(0)
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0

        threads = [threading.Thread(target=lock, args=(number,)) for number in range(4)]
        threads += [threading.Thread(target=fork) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("done")
    """
    try:
        assert run_python(script, tmp_path) == "done\n"
    except subprocess.TimeoutExpired:
        pytest.fail("deadlock")


# In turn


class Queue:
    """Processes that ask for a lock one after the other, and note their names when they get it.

    Only a test advances their clock, so no process loses its turn because a busy machine delays it.
    """

    SCRIPT = """
        import os, sys, time
        from pathlib import Path
        from types import SimpleNamespace
        from cachedb.disk import forks, locks, turns
        folder = Path(sys.argv[1])
        clock = folder / "clock"
        clock.touch()
        locks.time = SimpleNamespace(sleep=time.sleep, monotonic=lambda: clock.stat().st_size)
        turns._PATIENCE_SECONDS = 1  # tick, so each waiter is checked once
        print("ready", flush=True)
        for name in sys.stdin:
            if (child := os.fork()):
                print(child, flush=True)
                continue
            with forks.no_fork(), turns.hold_in_turn(folder / "lock"):
                with (folder / "order").open("a") as file:
                    file.write(name)
                time.sleep(0.005)
            os._exit(0)
    """

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.file = folder / "lock.queue"
        self._order, self._clock, self._process = folder / "order", folder / "clock", process
        self._numbers: dict[str, int] = {}

    @property
    def last(self) -> int:
        """Return the last number that a process took."""
        return int.from_bytes(self.file.read_bytes()[:8], "little")

    @property
    def order(self) -> str:
        """Return the names of the processes that got the lock, in order."""
        return self._order.read_text().replace("\n", "") if self._order.exists() else ""

    def ask(self, name: str, *, wait: bool = True) -> int:
        """Let a new process ask for the lock; return its id once it has a number."""
        assert self._process.stdout is not None
        before = self.last
        print(name, file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        assert not wait or wait_until(lambda: self.last == before + 1)
        self._numbers[name] = before + 1
        return child

    def tick(self, ticks: int = 1) -> None:
        """Advance the clock; one tick is the patience of the waiters."""
        with self._clock.open("ab") as file:
            file.write(b"." * ticks)

    def reaches(self, order: str, *, gone: str = "", file: Path | None = None) -> bool:
        """Return whether the processes get the lock in this order; advance the clock only at the turn of `gone`."""
        numbers = {self._numbers[name] for name in gone}
        with (file or self.file).open("rb", buffering=0) as queue:

            def is_reached() -> bool:
                if 1 + int.from_bytes(os.pread(queue.fileno(), 8, 8), "little") in numbers:
                    self.tick()
                return self.order == order

            return wait_until(is_reached)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with running(Queue.SCRIPT, tmp_path) as process:
        yield Queue(tmp_path, process)


@contextmanager
def turn(folder: Path) -> Iterator[turns.Turn]:
    with forks.no_fork(), turns.hold_in_turn(folder / "lock") as held:
        yield held


@pytest.mark.slow
def test_processes_get_a_lock_in_the_order_of_asking(queue: Queue, tmp_path: Path) -> None:
    with turn(tmp_path):
        first, *_ = [queue.ask(name) for name in "abcdefgh"]
        for _ in range(10):  # longer than the patience of the waiters
            queue.tick()
            time.sleep(0.02)
        assert queue.order == ""
        os.kill(first, signal.SIGSTOP)
    time.sleep(0.2)
    assert queue.order == "", "a waiter lost its patience though no time passed"
    os.kill(first, signal.SIGCONT)
    assert queue.reaches("abcdefgh"), queue.order


def is_stopped(process: int) -> bool:
    """Return whether a process has stopped: a signal takes effect some time after it is sent."""
    return read_state(process) == "T"


def test_a_lock_file_that_nobody_closes_is_closed_without_a_warning(tmp_path: Path) -> None:
    assert locks.acquire(tmp_path / "lock") is not None
    gc.collect()  # a warning in a finalizer would fail the test
    again = locks.acquire(tmp_path / "lock", wait=False)
    assert again is not None
    locks.release(again)


@pytest.mark.slow
def test_dead_and_stopped_waiters_are_passed_over(queue: Queue, tmp_path: Path) -> None:
    with turn(tmp_path):
        waiting = {name: queue.ask(name) for name in "abcdefghijkl"}
        for name in "adefk":
            os.kill(waiting[name], signal.SIGKILL)
        for name in "bh":
            os.kill(waiting[name], signal.SIGSTOP)
            assert wait_until(partial(is_stopped, waiting[name])), "it could still get the lock first"
    assert queue.reaches("cgijl", gone="abdefhk"), queue.order
    os.kill(waiting["h"], signal.SIGCONT)
    assert queue.reaches("cgijlh"), "a continued process did not get its turn"
    queue.ask("m")
    assert queue.reaches("cgijlhm")
    os.kill(waiting["b"], signal.SIGCONT)
    assert queue.reaches("cgijlhmb")
    with turn(tmp_path):
        for name in "no":
            queue.ask(name)
        time.sleep(0.05)
        assert queue.order == "cgijlhmb", "a late process put the numbers back"
    assert queue.reaches("cgijlhmbno"), queue.order


def test_the_next_waiter_keeps_its_turn_until_it_is_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    are_free = [True, False, True, True]  # what each look at the lock finds
    acquire = locks.acquire

    def look(path: Path, *, wait: bool = True) -> Any:
        assert turns._read_number(numbers, turns._SERVED_OFFSET) == 0
        return acquire(tmp_path / "free") if are_free.pop(0) else None

    first = acquire(tmp_path / "lock.queue")
    assert first is not None
    assert byte_locks.lock_byte(first.fileno(), 1)
    with (tmp_path / "lock.queue").open("r+b", buffering=0) as file:
        numbers: Any = file
        turns._write_number(numbers, turns._LAST_OFFSET, 2)
        turns._write_number(numbers, turns._SERVED_OFFSET, 0)
        monkeypatch.setattr(locks, "acquire", look)
        turns._await_turn(numbers, tmp_path / "lock", 2, wait=True)
        assert turns._read_number(numbers, turns._SERVED_OFFSET) == 1
    locks.release(first)
    assert are_free == []


def test_a_waiter_that_is_served_late_does_not_put_the_numbers_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pass_over(queue: Any, path: Path, number: int, wait: object) -> None:
        turns._write_number(queue, turns._LAST_OFFSET, number + 3)
        turns._write_number(queue, turns._SERVED_OFFSET, number + 2)

    with turn(tmp_path), monkeypatch.context() as patch:
        patch.setattr(locks, "hold_lock", lambda path, wait: (tmp_path / "other").open("w"))
        patch.setattr(turns, "_await_turn", pass_over)
        with turn(tmp_path):
            assert int.from_bytes((tmp_path / "lock.queue").read_bytes()[8:16], "little") == 4


def test_the_queue_continues_after_all_waiters_died(queue: Queue, tmp_path: Path) -> None:
    with turn(tmp_path):
        for child in [queue.ask(name) for name in "abcde"]:
            os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    with turn(tmp_path):
        assert time.monotonic() - began < 20
        assert queue.last == 7
        queue.ask("f")
        queue.ask("g")
    assert queue.reaches("fg"), queue.order


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\2",
        b"\xff" * 16,
        b"\0" * 8 + b"\xff" * 8,
        b"\xff" * 8 + b"\0" * 8,
        b"\xff" * 7 + b"\x7f" + b"\xff" * 7 + b"\x7f",
        (10**6).to_bytes(8, "little"),
        b"garbage " * 1000,
    ],
)
@pytest.mark.parametrize("while_waiting", [False, True])
def test_a_queue_that_contains_garbage_blocks_nobody(
    queue: Queue, tmp_path: Path, content: bytes, while_waiting: bool
) -> None:
    """A power cut may leave any content: the file is never synced."""
    with turn(tmp_path):
        if while_waiting:
            for name in "ab":
                queue.ask(name)
        queue.file.write_bytes(content)
    for _ in range(1000):  # longer than the patience with many absent waiters
        if len(queue.order) == (2 if while_waiting else 0):
            break
        queue.tick()
        time.sleep(0.02)
    before = queue.order
    assert sorted(before) == (["a", "b"] if while_waiting else [])
    began = time.monotonic()
    with turn(tmp_path):
        assert time.monotonic() - began < 20
        for name in "cdefg":
            queue.ask(name)
    assert queue.reaches(f"{before}cdefg"), f"there is no order again: {queue.order}"


def test_a_queue_that_is_replaced_while_processes_wait_blocks_nobody(queue: Queue, tmp_path: Path) -> None:
    with turn(tmp_path):
        first = [queue.ask(name) for name in "abc"]
        os.link(queue.file, tmp_path / "old")
        queue.file.unlink()
        queue.file.touch()
        for name in "de":
            queue.ask(name)
        os.kill(first[0], signal.SIGKILL)
    assert wait_until(lambda: len(queue.order) == 4), queue.order
    assert [name for name in queue.order if name in "de"] == ["d", "e"]
    assert [name for name in queue.order if name in "bc"] == ["b", "c"]


def test_a_mark_survives_the_death_of_its_holder(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from cachedb.disk import forks, locks, turns
        with forks.no_fork(), turns.hold_in_turn(Path(sys.argv[1]) / "lock") as turn:
            assert not turn.is_marked
            turn.mark()
            print("marked", flush=True)
            time.sleep(60)
    """
    with running(script, tmp_path) as holder:
        holder.kill()
        holder.wait()
    with turn(tmp_path) as mine:
        assert mine.is_marked
        mine.unmark()
    with turn(tmp_path) as mine:
        assert not mine.is_marked


def test_a_lock_file_that_is_a_second_name_of_another_file_is_refused(tmp_path: Path) -> None:
    thesis, lock = tmp_path / "thesis.txt", tmp_path / "write.lock"
    thesis.write_text("the only copy")
    os.link(thesis, lock)
    with pytest.raises(OSError, match="the lock file is a hard link to another file"), locks.hold_lock(lock):
        pytest.fail("the lock's record overwrites the file")
    assert thesis.read_text() == "the only copy"
    thesis.unlink()
    with locks.hold_lock(lock):
        assert locks.is_held(lock)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)  # the name of a socket has at most 107 bytes
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "socket"])
def test_a_lock_file_that_is_not_a_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    thesis, lock = tmp_path / "thesis.txt", tmp_path / "write.lock"
    thesis.write_text("the only copy")
    make: dict[str, Callable[[], object]] = {
        "link": lambda: lock.symlink_to(thesis),
        "dangling": lambda: lock.symlink_to(tmp_path / "nothing"),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
        "socket": lambda: make_socket(lock),
    }
    make[kind]()
    pipe = os.open(lock, os.O_RDWR) if kind == "pipe" else None  # so that the test cannot block
    with pytest.raises(OSError, match=f"regular file: '{lock}'"), locks.hold_lock(lock):
        pytest.fail("the record overwrites another file")
    assert not locks.is_held(lock)
    assert locks.read_holder_of(lock) is None
    assert locks.find_holder_at(lock) is None
    lock.rename(lock.with_suffix(".queue"))
    assert turns.find_waiters(lock) == []
    assert thesis.read_text() == "the only copy"
    assert not (tmp_path / "nothing").exists()
    if pipe is not None:
        os.close(pipe)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root to become another user")
def test_an_unreadable_pipe_is_not_a_regular_file() -> None:
    with tempfile.TemporaryDirectory() as folder:  # only their owner can read pytest's own folders
        os.chmod(folder, 0o755)
        os.mkfifo(f"{folder}/lock", 0o600)
        before = os.geteuid()
        os.seteuid(65534)
        try:
            with pytest.raises(OSError, match="it is not a regular file"):
                open_regular(f"{folder}/lock", os.O_RDONLY)
        finally:
            os.seteuid(before)


def test_a_lock_file_of_a_shared_folder_has_its_mode_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise another member who opens it in between would be refused."""
    tmp_path.chmod(0o2770)
    path, named = tmp_path / "lock", []

    def apply_folder_mode(file: int, folder: os.stat_result) -> None:
        named.append(path.exists())
        folders.apply_folder_mode(file, folder)

    monkeypatch.setattr(locks, "apply_folder_mode", apply_folder_mode)
    for _ in range(2):  # the second time, the file exists
        lock = locks.acquire(path)
        assert lock is not None
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert locks.is_held(path)
        locks.release(lock)
    assert named == [False]


def test_a_lock_file_is_made_where_the_file_system_has_no_unnamed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o2770)

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    lock = locks.acquire(tmp_path / "lock")
    assert lock is not None
    assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o660
    locks.release(lock)
