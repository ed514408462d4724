"""Lock files: who holds one, who lets go of it, and what a fork does to it."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachedb import locks
from tests.conftest import run_python, running

HOLDER = """
    import sys, time
    from pathlib import Path
    from cachedb import locks
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


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    """Whether it comes true soon."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


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
    inode = path.stat().st_ino
    waits = re.compile(rf"-> .*:{inode} ")
    assert eventually(lambda: waits.search(Path("/proc/locks").read_text()) is not None)
    path.unlink()
    locks.release(first)
    waiter.join(10)
    assert taken[0] is not None
    assert os.fstat(taken[0].fileno()).st_ino == path.stat().st_ino
    assert not is_free(path)
    locks.release(taken[0])


def test_a_child_does_not_keep_the_lock_of_a_parent_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = """
        import os, sys, time
        from pathlib import Path
        from cachedb import locks
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
        assert eventually(lambda: is_free(path), 1)


def test_a_child_lets_go_of_its_own_locks_only(tmp_path: Path) -> None:
    output = run_python(
        """
        import os, sys
        from pathlib import Path
        from cachedb import locks

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
        from cachedb import locks

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
            time.sleep(0.2)
        assert order == [], order
        leave.set()
        for thread in threads:
            thread.join(10)
        assert statuses == [0], statuses
        assert order[:2] == ["first", "closed"] and set(order[2:]) == {"forked", "second"}, order
        print("done")
        """,
        tmp_path,
    )
    assert output == "done\n"


def test_threads_that_lock_and_threads_that_fork_do_not_deadlock(tmp_path: Path) -> None:
    script = """
        import os, sys, threading
        from pathlib import Path
        from cachedb import locks

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
