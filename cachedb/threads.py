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
from typing import TypeVar

from cachedb.errors import CacheError
from cachedb.progress import Advance
from cachedb.reentry import on_behalf_of

__all__ = ["at_low_priority", "in_threads", "report_in_thread", "start"]


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


def _get(queue: SimpleQueue[T]) -> T:
    """Return the next item of a queue.

    A signal does not end a wait if it comes to another thread, or just before the wait begins.
    """
    while True:
        with suppress(Empty):
            return queue.get(timeout=_SIGNAL_SECONDS)


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
    rest, guard, stopped = enumerate(items), threading.Lock(), threading.Event()
    done: dict[int, R] = {}

    def report(count: int) -> None:
        if stopped.is_set():
            raise CacheError("cancelled: work in another thread failed")
        advance(count)

    def run() -> None:
        # Each thread takes its next item itself: a queue between threads costs more time than copying a small blob.
        while not stopped.is_set():
            with guard:
                try:
                    number, item = next(rest)
                except StopIteration:
                    return
            done[number] = work(item, report)

    failures, ended, caller = list[BaseException](), SimpleQueue[None](), threading.get_ident()

    def run_in_thread() -> None:
        try:
            with on_behalf_of(caller):
                run()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.put(None)

    threads_begun: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=run_in_thread)
            threads_begun.append(thread)
            if not start(thread):
                threads_begun.pop()
                break
        if not threads_begun:
            run()
        for _ in threads_begun:
            _get(ended)
            if failures:
                raise failures[0]
    except BaseException:
        stopped.set()
        if stop is not None:
            stop()
        raise
    finally:
        for thread in threads_begun:
            with suppress(RuntimeError):  # not started: an interrupt came first
                thread.join()
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
