"""Lock files: who holds one, who lets go of it, and what a fork does to it."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cachedb.disk import byte_locks, locks
from tests.conftest import run_python, running

HOLDER = """
    import sys, time
    from pathlib import Path
    from cachedb.disk import locks
    lock = locks.acquire(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


def is_free(path: Path) -> bool:
    """Whether nobody, here or in another process, holds the lock."""
    lock = locks.acquire(path, wait=False)
    if lock is not None:
        locks.release(lock)
    return lock is not None


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether it comes true, on whatever machine."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def waiting_for(path: Path) -> int:
    """How many wait for the lock."""
    return len(re.findall(rf"-> .*:{path.stat().st_ino} ", Path("/proc/locks").read_text()))


def open_files() -> int:
    """How many this process has open, those of other tests that are garbage not counted."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.held(path):
        assert not is_free(path)
    assert is_free(path)


def test_a_lock_goes_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with running(HOLDER, path) as holder:
        assert not is_free(path)
        holder.kill()
        holder.wait()
        assert is_free(path)


def test_a_lock_is_let_go_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(KeyError), locks.held(path):
        raise KeyError
    assert is_free(path)


def test_locks_that_are_held_refused_and_let_go_leave_no_file_open(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    before = open_files()
    for _ in range(3):
        with locks.held(path):
            assert not is_free(path)
    with pytest.raises(FileNotFoundError):
        locks.acquire(tmp_path / "nowhere" / "lock")
    assert open_files() == before


def test_a_lock_file_that_is_unlinked_meanwhile_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = locks.acquire(path)
    assert first is not None
    taken = []
    waiter = threading.Thread(target=lambda: taken.append(locks.acquire(path)))
    waiter.start()
    assert eventually(lambda: waiting_for(path) == 1)
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
        from cachedb.disk import locks
        lock = locks.acquire(Path(sys.argv[1]))
        if os.fork() == 0:
            print("child", flush=True)
            sys.stdin.read()  # until the test goes away
            os._exit(0)
        time.sleep(60)
    """
    with running(script, path) as parent:
        assert not is_free(path)
        parent.kill()
        parent.wait()
        assert eventually(lambda: is_free(path))


def test_a_child_lets_go_of_its_own_locks_only(tmp_path: Path) -> None:
    output = run_python(
        """
        import os, sys
        from pathlib import Path
        from cachedb.disk import locks

        mine, other = Path(sys.argv[1]) / "mine", Path(sys.argv[1]) / "other"
        with locks.held(mine):
            child = os.fork()
            if child == 0:
                # Takes over the number of the file that the fork closed.
                lock = locks.acquire(other)
        if child == 0:
            assert lock is not None and not lock.closed
            assert locks.acquire(other, wait=False) is None, "the parent's block let go of the child's lock"
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with locks.held(mine):
            if (child := os.fork()) == 0:
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert locks.acquire(mine, wait=False) is None, "the child let go of the parent's lock"
        print("done")
        """,
        tmp_path,
    )
    assert output == "done\n"


def test_a_fork_waits_for_what_may_not_be_cut_in_two_and_holds_off_what_comes_after(tmp_path: Path) -> None:
    output = run_python(
        """
        import os, sys, threading, time
        from pathlib import Path
        from cachedb.disk import locks

        class Closed:
            def close(self):
                order.append("closed")

        order, inside, leave = [], threading.Event(), threading.Event()
        closed = Closed()
        locks.before_fork(closed)

        def first():
            with locks.unforked():
                inside.set()
                leave.wait()
                with locks.unforked():  # one that is in such a block may begin another
                    lock = locks.acquire(Path(sys.argv[1]) / "lock")
                    locks.release(lock)
                order.append("first")

        def second():
            with locks.unforked():
                order.append("second")

        def fork():
            child = os.fork()
            if child == 0:
                with locks.unforked():
                    pass
                os._exit(0 if order == ["first", "closed"] else 1)
            order.append("forked")
            statuses.append(os.waitpid(child, 0)[1])

        statuses = []
        threads = [threading.Thread(target=target, daemon=True) for target in (first, fork, second)]
        for thread in threads:
            thread.start()
            inside.wait()
            while thread is threads[1] and not locks._forking and not order:
                time.sleep(0.001)
        time.sleep(0.2)  # in which the last one could begin
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


def test_who_a_fork_waits_for_may_log_and_hand_work_to_threads() -> None:
    """Whatever is imported first: `logging` and `concurrent.futures` have locks that are taken for a fork as well."""
    script = """
        import os, threading, time
        from cachedb.disk import locks
        import logging
        from concurrent.futures import ThreadPoolExecutor

        def fork():
            if (child := os.fork()) == 0:
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])

        statuses = []
        with locks.unforked():
            forker = threading.Thread(target=fork, daemon=True)
            forker.start()
            while not locks._forking:
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


def test_threads_that_lock_and_threads_that_fork_do_not_deadlock(tmp_path: Path) -> None:
    script = """
        import os, sys, threading
        from pathlib import Path
        from cachedb.disk import locks

        def lock(number):
            for _ in range(200):
                with locks.unforked(), locks.held(Path(sys.argv[1]) / f"lock-{number % 2}"):
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
    """Processes that ask for a lock one after the other, and note their names when they have it.

    Their clock goes on when a test says so: nobody loses a turn because a busy machine lets it sleep.
    """

    SCRIPT = """
        import os, sys, time
        from pathlib import Path
        from types import SimpleNamespace
        from cachedb.disk import locks
        folder = Path(sys.argv[1])
        clock = folder / "clock"
        clock.touch()
        locks.time = SimpleNamespace(sleep=time.sleep, monotonic=lambda: clock.stat().st_size)
        locks._PATIENCE_SECONDS = 1  # tick: so there is one look at each
        print("ready", flush=True)
        for name in sys.stdin:
            if (child := os.fork()):
                print(child, flush=True)
                continue
            with locks.unforked(), locks.in_turn(folder / "lock"):
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
        """The last number that was taken."""
        return int.from_bytes(self.file.read_bytes()[:8], "little")

    @property
    def order(self) -> str:
        """Who has had the lock, in order."""
        return self._order.read_text().replace("\n", "") if self._order.exists() else ""

    def ask(self, name: str, *, wait: bool = True) -> int:
        """Have a process ask; return its id once it has a number."""
        assert self._process.stdout is not None
        before = self.last
        print(name, file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        assert not wait or eventually(lambda: self.last == before + 1)
        self._numbers[name] = before + 1
        return child

    def tick(self, ticks: int = 1) -> None:
        """Have time go on, by the half of anybody's patience and more."""
        with self._clock.open("ab") as file:
            file.write(b"." * ticks)

    def comes_to(self, order: str, *, gone: str = "", file: Path | None = None) -> bool:
        """Whether it comes to an order. Time goes on only while it is the turn of one of those who are gone."""
        numbers = {self._numbers[name] for name in gone}
        with (file or self.file).open("rb", buffering=0) as queue:

            def come() -> bool:
                if 1 + int.from_bytes(os.pread(queue.fileno(), 8, 8), "little") in numbers:
                    self.tick()
                return self.order == order

            return eventually(come)


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with running(Queue.SCRIPT, tmp_path) as process:
        yield Queue(tmp_path, process)


@contextmanager
def turn(folder: Path) -> Iterator[locks.Turn]:
    with locks.unforked(), locks.in_turn(folder / "lock") as held:
        yield held


def test_a_lock_is_had_in_the_order_of_asking(queue: Queue, tmp_path: Path) -> None:
    with turn(tmp_path):
        first, *_ = [queue.ask(name) for name in "abcdefgh"]
        for _ in range(10):  # longer than anybody's patience
            queue.tick()
            time.sleep(0.02)
        assert queue.order == ""
        os.kill(first, signal.SIGSTOP)
    time.sleep(0.2)
    assert queue.order == "", "as long as the patience of the others lasts"
    os.kill(first, signal.SIGCONT)
    assert queue.comes_to("abcdefgh"), queue.order


def is_stopped(process: int) -> bool:
    """Whether a signal to stop has come to a process: it is sent before that."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_who_dies_waiting_or_is_stopped_does_not_hold_up_the_rest(queue: Queue, tmp_path: Path) -> None:
    with turn(tmp_path):
        waiting = {name: queue.ask(name) for name in "abcdefghijkl"}
        for name in "adefk":
            os.kill(waiting[name], signal.SIGKILL)
        for name in "bh":
            os.kill(waiting[name], signal.SIGSTOP)
            assert eventually(partial(is_stopped, waiting[name])), "else it may get the lock first"
    assert queue.comes_to("cgijl", gone="abdefhk"), queue.order
    os.kill(waiting["h"], signal.SIGCONT)
    assert queue.comes_to("cgijlh"), "one that is continued has its turn"
    queue.ask("m")
    assert queue.comes_to("cgijlhm")
    os.kill(waiting["b"], signal.SIGCONT)
    assert queue.comes_to("cgijlhmb")
    with turn(tmp_path):
        for name in "no":
            queue.ask(name)
        time.sleep(0.05)
        assert queue.order == "cgijlhmb", "who was late has not put the numbers back"
    assert queue.comes_to("cgijlhmbno"), queue.order


def test_who_is_next_and_not_awake_yet_keeps_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [True, False, True, True]  # whether the lock is found free
    acquire = locks.acquire

    def look(path: Path, *, wait: bool = True) -> Any:
        assert locks._read_number(numbers, locks._SERVED_OFFSET) == 0
        return acquire(tmp_path / "free") if looks.pop(0) else None

    first = acquire(tmp_path / "lock.queue")
    assert first is not None
    assert byte_locks.lock_byte(first.fileno(), 1)
    with (tmp_path / "lock.queue").open("r+b", buffering=0) as file:
        numbers: Any = file
        locks._write_number(numbers, locks._LAST_OFFSET, 2)
        locks._write_number(numbers, locks._SERVED_OFFSET, 0)
        monkeypatch.setattr(locks, "acquire", look)
        locks._await_turn(numbers, tmp_path / "lock", 2, wait=True)
        assert locks._read_number(numbers, locks._SERVED_OFFSET) == 1
    locks.release(first)
    assert looks == []


def test_who_is_served_late_does_not_put_the_numbers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pass_over(queue: Any, path: Path, number: int, wait: object) -> None:
        locks._write_number(queue, locks._LAST_OFFSET, number + 3)
        locks._write_number(queue, locks._SERVED_OFFSET, number + 2)

    with turn(tmp_path), monkeypatch.context() as patch:
        patch.setattr(locks, "held", lambda path, wait: (tmp_path / "other").open("w"))
        patch.setattr(locks, "_await_turn", pass_over)
        with turn(tmp_path):
            assert int.from_bytes((tmp_path / "lock.queue").read_bytes()[8:16], "little") == 4


def test_numbers_go_on_when_all_have_died(queue: Queue, tmp_path: Path) -> None:
    with turn(tmp_path):
        for child in [queue.ask(name) for name in "abcde"]:
            os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    with turn(tmp_path):
        assert time.monotonic() - began < 20
        assert queue.last == 7
        queue.ask("f")
        queue.ask("g")
    assert queue.comes_to("fg"), queue.order


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
def test_a_queue_that_holds_garbage_holds_nobody_up(
    queue: Queue, tmp_path: Path, content: bytes, while_waiting: bool
) -> None:
    """A power cut may leave anything: the file is never synced."""
    with turn(tmp_path):
        if while_waiting:
            for name in "ab":
                queue.ask(name)
        queue.file.write_bytes(content)
    for _ in range(1000):  # longer than anybody's patience with some who are not there
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
    assert queue.comes_to(f"{before}cdefg"), f"and there is an order again: {queue.order}"


def test_a_queue_that_is_lost_while_some_wait_holds_nobody_up(queue: Queue, tmp_path: Path) -> None:
    with turn(tmp_path):
        first = [queue.ask(name) for name in "abc"]
        os.link(queue.file, tmp_path / "old")
        queue.file.unlink()
        queue.file.touch()
        for name in "de":
            queue.ask(name)
        os.kill(first[0], signal.SIGKILL)
    assert eventually(lambda: len(queue.order) == 4), queue.order
    assert [name for name in queue.order if name in "de"] == ["d", "e"]
    assert [name for name in queue.order if name in "bc"] == ["b", "c"]


def test_a_mark_outlives_the_holder_that_is_killed_with_it(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from cachedb.disk import locks
        with locks.unforked(), locks.in_turn(Path(sys.argv[1]) / "lock") as turn:
            assert not turn.marked
            turn.mark()
            print("marked", flush=True)
            time.sleep(60)
    """
    with running(script, tmp_path) as holder:
        holder.kill()
        holder.wait()
    with turn(tmp_path) as mine:
        assert mine.marked
        mine.unmark()
    with turn(tmp_path) as mine:
        assert not mine.marked
