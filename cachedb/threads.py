"""Long work done by several threads at once: it says how far it is, and stops as a whole.

All threads of cachedb begin in `start`. Where none can begin, as in a handler of `atexit`, the caller does the work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any, TypeVar

from cachedb.errors import CacheError, ReentrantCall
from cachedb.progress import Advance
from cachedb.reentry import on_behalf_of

__all__ = ["Once", "end", "in_threads", "start", "told_beside"]


T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 1.0  # seconds for what was begun to end: who waits for a disk cannot be stopped
_CALLS = 16  # of a function, that wait for it to return


def start(thread: threading.Thread) -> bool:
    """Start a thread; return False where none can be started: while the interpreter exits, or at a limit.

    The caller creates the thread, so that it has it to join if an interrupt comes meanwhile.
    """
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


@contextmanager
def told_beside(progress: Callable[..., object] | None) -> Iterator[Callable[..., None] | None]:
    """Give the block a function that calls ``progress`` in another thread, and returns at once.

    For a block that a caller's function must not hold up: a transaction. What ``progress`` raises, the next call of the
    function raises, or else the end of the block. Of many calls while ``progress`` runs, some are left out.
    """
    if progress is None:
        yield None
        return
    calls: SimpleQueue[tuple[object, ...] | None] = SimpleQueue()
    raised: list[BaseException] = []

    caller = threading.get_ident()

    def work() -> None:
        with on_behalf_of(caller):
            while (arguments := calls.get()) is not None:
                try:
                    if not raised:
                        progress(*arguments)
                except BaseException as error:
                    raised.append(error)

    def tell(*arguments: object) -> None:
        if raised:
            raise raised[0]
        if calls.qsize() < _CALLS:
            calls.put(arguments)

    thread = threading.Thread(target=work, daemon=True)
    is_started = start(thread)
    try:
        yield tell
    finally:
        calls.put(None)
        if is_started:
            thread.join()
        else:
            work()
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
    """Do work on each item, several at once, and return what it gave, in order.

    The calling thread does all of it if no other can be started. When one fails, or an interrupt comes, the others stop
    where they next say how far they are, and those that have not begun do not.

    Args:
        work: is called with an item, and with what it is to tell of the bytes it has done.
        items: begun in this order, and asked for when a thread is free, by one of them at a time.
        advance: is told of the bytes that all of them have done.
        threads: that work at once; as many as there are cores unless given.
        stop: is called when one has failed: it ends what the others wait for, if that can be long.
    """
    count = threads or os.cpu_count() or 1
    if isinstance(items, Sized):
        count = min(count, len(items))
    rest, guard, stopped = enumerate(items), threading.Lock(), threading.Event()
    done: dict[int, R] = {}

    def tell(count: int) -> None:
        if stopped.is_set():
            raise CacheError("it was stopped, for other work beside it failed")
        advance(count)

    def run() -> None:
        # Each takes what is next by itself: to be handed it would cost more than a small blob does.
        while not stopped.is_set():
            with guard:
                try:
                    number, item = next(rest)
                except StopIteration:
                    return
            done[number] = work(item, tell)

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
            ended.get()
            if failures:
                raise failures[0]
    except BaseException:
        stopped.set()
        if stop is not None:
            stop()
        raise
    finally:
        for thread in threads_begun:
            with suppress(RuntimeError):  # an interrupt came before it was begun
                thread.join()
    return [done[number] for number in sorted(done)]


class Once:
    """What several threads may ask for: the first does it, and all get what comes of it."""

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self._guard, self._asked = threading.RLock(), dict[object, Future[Any]]()
        self._working: dict[object, int] = {}  # the thread that does the work, or did

    def ask(
        self, what: object, work: Callable[[], T], *, again: Callable[[BaseException], bool] = lambda _: False
    ) -> Future[T]:
        """Do work, unless another thread does, or has.

        Args:
            what: it is known by.
            work: returns what comes of it.
            again: says of an error whether who asks later is to try again.

        Returns:
            What comes of it; there already if it was done here.
        """
        with self._guard:
            known = self._asked.get(what)
            future = known or self._asked.setdefault(what, Future())
            if known is None:
                self._working[what] = threading.get_ident()
            elif not known.done() and self._working[what] == threading.get_ident():
                raise ReentrantCall("this thread is already at this work: ask again after that, or from another thread")
        if known is None:
            try:
                future.set_result(work())
            except BaseException as error:
                if again(error):
                    with self._guard:
                        del self._asked[what]
                future.set_exception(error)
        return future


def end(begun: threading.Thread | None, stop: Callable[[], None]) -> None:
    """End what a thread has begun, and wait for it for a moment.

    Args:
        begun: the thread, if there is one.
        stop: ends what it waits for.
    """
    if begun:
        stop()  # if all went well there is nothing to stop
        with suppress(RuntimeError):  # an interrupt came before it was begun
            begun.join(_PATIENCE)
