"""Run long work in several threads, with progress and cancellation.

`start` starts all threads of cachedb. If no thread can start, as in an `atexit` handler, the calling thread does the
work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self, TypeVar

from cachedb.errors import CacheError
from cachedb.progress import Advance
from cachedb.reentry import on_behalf_of

__all__ = ["ThreadGroup", "at_low_priority", "in_threads", "report_in_thread", "start"]


T = TypeVar("T")
R = TypeVar("R")

_MAX_QUEUED_CALLS = 16
_SIGNAL_SECONDS = 0.5  # the longest time until an interrupt that missed a wait is raised
_LOW_NICENESS, _LEAST_NICENESS = 10, 19  # added to that of the process, and the most that there is


def start(thread: threading.Thread) -> bool:
    """Start a thread; return False if it cannot start: at interpreter exit, or at a limit of the system.

    The caller creates the thread, so it can join it even if an interrupt comes during the start.
    """
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


class ThreadGroup:
    """Threads that have ended when the block ends, whatever signal handlers raise.

    The threads may use descriptors that the caller closes next. Other files get their numbers then, and a thread that
    still ran would write into them. `Thread.join` does not prevent this: if a signal handler raises in it, Python 3.11
    and 3.12 take the thread for ended.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        """Set when the threads should end early."""
        self._process, self._caller = os.getpid(), threading.get_ident()
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []
        self._begun, self._ended, self._wake = list[None](), list[None](), SimpleQueue[None]()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._process:
            return  # a signal handler has forked, and the child has no such threads
        raised: BaseException | None = None
        while True:
            try:
                self.stopped.set()
                # A thread that begins after this line sees that it is stopped, and does nothing.
                if len(self._ended) >= len(self._begun):
                    break
                self._await_end()
            except BaseException as again:
                raised = again
        for thread in self._threads:
            thread.join()
        if raised is not None:
            raise raised

    def start(self, run: Callable[[], None]) -> bool:
        """Start a thread that calls a function; return False if no thread can start."""

        def run_in_thread() -> None:
            self._begun.append(None)
            try:
                if not self.stopped.is_set():
                    with on_behalf_of(self._caller):
                        run()
            except BaseException as error:
                self._failures.append(error)
            finally:
                self._ended.append(None)
                self._wake.put(None)

        thread = threading.Thread(target=run_in_thread)
        if not start(thread):
            return False
        self._threads.append(thread)
        return True

    def wait(self) -> None:
        """Wait until all threads have ended; raise the first failure of a thread at once."""
        while len(self._ended) < len(self._threads) and not self._failures:
            self._await_end()
        if self._failures:
            raise self._failures[0]

    def _await_end(self) -> None:
        """Wait until a thread ends, or for a short time.

        A signal does not end a wait if it comes to another thread, or just before the wait begins.
        """
        with suppress(Empty):
            self._wake.get(timeout=_SIGNAL_SECONDS)


@contextmanager
def report_in_thread(progress: Callable[..., object] | None) -> Iterator[Callable[..., None] | None]:
    """Yield a function that calls ``progress`` in another thread and returns at once.

    Use it for a block that a caller's function must not delay, such as a transaction. An error of ``progress`` is
    raised by the next call of the yielded function, or at the end of the block. If ``progress`` is slow, some calls
    are dropped.
    """
    if progress is None:
        yield None
        return
    calls: SimpleQueue[tuple[object, ...] | None] = SimpleQueue()
    raised: list[BaseException] = []
    caller = threading.get_ident()

    def call_progress() -> None:
        with on_behalf_of(caller):
            while (arguments := calls.get()) is not None:
                try:
                    if not raised:
                        progress(*arguments)
                except BaseException as error:
                    raised.append(error)

    def report(*arguments: object) -> None:
        if raised:
            raise raised[0]
        if calls.qsize() < _MAX_QUEUED_CALLS:
            calls.put(arguments)

    thread = threading.Thread(target=call_progress, daemon=True)
    is_started = start(thread)
    try:
        yield report
    finally:
        calls.put(None)
        if is_started:
            thread.join()
        else:
            call_progress()
    if raised:
        raise raised[0]


def in_threads(
    work: Callable[[T, Advance], R],
    items: Iterable[T],
    advance: Advance,
    *,
    threads: int | None = None,
    stop: Callable[[], None] | None = None,
) -> list[R]:
    """Run ``work`` on each item in several threads and return the results in order.

    If no thread can start, the calling thread does all the work. After a failure or an interrupt, running items
    stop at their next progress report, and no further item starts.

    Args:
        work: called with an item and a function that reports the bytes done.
        items: the items, started in this order; an iterator is advanced by one thread at a time.
        advance: called with the number of bytes that a thread has done since its last call.
        threads: the number of threads; the default is the number of cores.
        stop: called after a failure, to cancel long waits of the other threads.
    """
    count = threads or os.cpu_count() or 1
    if isinstance(items, Sized):
        count = min(count, len(items))
    rest, guard = enumerate(items), threading.Lock()
    done: dict[int, R] = {}
    with ThreadGroup() as group:

        def report(count: int) -> None:
            if group.stopped.is_set():
                raise CacheError("cancelled: work in another thread failed")
            advance(count)

        def run() -> None:
            # Each thread takes its next item itself: a queue between threads costs more time than copying a small blob.
            while not group.stopped.is_set():
                with guard:
                    try:
                        number, item = next(rest)
                    except StopIteration:
                        return
                done[number] = work(item, report)

        try:
            started = 0
            while started < count and group.start(run):
                started += 1
            if not started:
                run()
            group.wait()
        except BaseException:
            if stop is not None:
                stop()
            raise
    return [done[number] for number in sorted(done)]


def at_low_priority(work: Callable[[], T]) -> T:
    """Run a function in a thread of lower priority, and return its result.

    A process without privileges cannot raise its priority again, so the calling thread keeps its own.
    """
    caller = threading.get_native_id()

    def run(_item: None, _advance: Advance) -> T:
        thread = threading.get_native_id()
        if thread != caller:  # else no thread can start
            with suppress(OSError):
                niceness = os.getpriority(os.PRIO_PROCESS, thread) + _LOW_NICENESS
                os.setpriority(os.PRIO_PROCESS, thread, min(niceness, _LEAST_NICENESS))
        return work()

    return in_threads(run, [None], lambda _: None, threads=1)[0]
