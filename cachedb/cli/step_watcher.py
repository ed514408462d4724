"""End a query that is stuck in one step of SQLite."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from cachedb.cli.signals import ENDING_SIGNALS
from cachedb.errors import query_timeout_error
from cachedb.threads import start

__all__ = ["StepWatcher"]


T = TypeVar("T")

_GRACE_SECONDS = 1.0  # for a step to end by itself


class StepWatcher:
    """Exits if a step of a query goes on after the query's time, or after a signal that ends it.

    Python runs signal handlers only between its own instructions, and SQLite can work for minutes on one of them. The
    process ends at once and cleans up nothing, so the query must change nothing. A slow reader of the output stops no
    query: only the steps count.
    """

    def __init__(self, seconds: float | None, *, grace_seconds: float = _GRACE_SECONDS) -> None:
        """Prepare to watch.

        Args:
            seconds: the time after which the query should end by itself; None for no limit.
            grace_seconds: the time that a step then has to end.
        """
        self._seconds, self._grace_seconds = seconds, grace_seconds
        self._step, self._is_in_step = 0, True  # the first step begins the query

    def watch_rows(self, rows: Iterator[T]) -> Iterator[T]:
        """Return the rows of the query, which has begun; finding one row is one step."""
        self._is_in_step = False
        return self._find_rows(rows)

    def _find_rows(self, rows: Iterator[T]) -> Iterator[T]:
        while True:
            self._step += 1
            self._is_in_step = True
            try:
                row = next(rows)
            except StopIteration:
                return
            finally:
                self._is_in_step = False
            yield row

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during this block, in a thread if one can be started."""
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        thread = threading.Thread(target=self._watch, args=(readable,), daemon=True, name="cachedb watcher")
        before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)  # Python writes the number of a signal to it
        is_started = start(thread)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(writable)  # ends the thread
            if is_started:
                thread.join()
            os.close(readable)

    def _watch(self, readable: int) -> None:
        wait, code = self._seconds, 1
        text = "" if wait is None else str(query_timeout_error(wait))
        stuck: int | None = None  # the step that must have ended when the time is over
        while True:
            if select.select([readable], [], [], wait)[0]:
                received = os.read(readable, 1)
                if not received:
                    return  # the block has ended
                if received[0] not in ENDING_SIGNALS:
                    continue
                code, text = 128 + received[0], "interrupted" if received[0] == signal.SIGINT else ""
            elif self._is_in_step and self._step == stuck:
                break
            stuck, wait = self._step, self._grace_seconds
        if text:
            with suppress(OSError):
                os.write(2, f"cachedb: {text}\n".encode())
        os._exit(code)
