"""Waiting for other processes: it has an end, and whoever waits is told for whom.

Everything is said through the logger ``cachedb``. A wait is a warning after its first second, and a debug message in
each further second; the records have the attribute ``wait``, by which the command line shows them on one line.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cachedb.disk.processes import UNKNOWN
from cachedb.errors import Busy, CacheError

__all__ = ["LOG", "Wait", "chosen_seconds"]


LOG = logging.getLogger("cachedb")

_DEFAULT_SECONDS = 60.0
_SILENT_SECONDS = 1.0  # shorter waits are not worth a word
_said: set[str] = set()  # for whom threads of this process wait, and have said so
os.register_at_fork(after_in_child=_said.clear)


def chosen_seconds(seconds: float | None = None) -> float:
    """Return how long to wait: what was chosen, else ``CACHEDB_WAIT``, else a minute.

    Raises:
        CacheError: if that is no number of seconds.
    """
    text = os.environ.get("CACHEDB_WAIT") if seconds is None else None
    try:
        chosen = float(text) if text else _DEFAULT_SECONDS if seconds is None else float(seconds)
    except (ValueError, TypeError):
        chosen = math.nan
    if not chosen >= 0:
        name = "CACHEDB_WAIT" if text else "wait"
        raise CacheError(f"{name} is {text or seconds!r}: give a number of seconds, 0 or more, or inf")
    return chosen


class Wait:
    """A wait for another process; a context manager that begins with the first `nap`."""

    def __init__(self, what: str, seconds: float, progress: Callable[[], object] | None = None) -> None:
        """Nothing is waited for yet.

        Args:
            what: is waited for, as an error says it: "the write lock".
            seconds: after which to give up.
            progress: returns something that changes while what we wait for makes progress. Then the seconds begin anew.
        """
        self.on_begin: Callable[[], None] | None = None
        """Is called once, before the first nap."""
        self._what, self._seconds, self._progress = what, seconds, progress
        self.seen: object = None
        """What ``progress`` has returned last."""
        self._began = self._moved = -math.inf
        self._next_word = _SILENT_SECONDS
        self._saying = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Say that the wait is over, if it was worth a word."""
        if self._saying:
            _said.discard(self._saying)
            LOG.debug("waited for %s, %d s", self._saying, self.waited, extra={"wait": "end"})
            self._saying = ""

    @property
    def waited(self) -> float:
        """The seconds since the first nap."""
        return max(0.0, time.monotonic() - self._began) if self._began > -math.inf else 0.0

    @property
    def stalled(self) -> float:
        """The seconds in which what we wait for has made no progress."""
        return max(0.0, time.monotonic() - self._moved) if self._began > -math.inf else 0.0

    def nap(self, seconds: float, holder: Callable[[], object], sleep: Callable[[float], object] = time.sleep) -> None:
        """Sleep, unless the time is over.

        Args:
            seconds: to sleep.
            holder: returns for whom we wait, as text or as what has one; None if that is not known.
            sleep: sleeps.

        Raises:
            Busy: if it is over.
        """
        now = time.monotonic()
        if self._began == -math.inf:
            self._began = now
            self._moved = now
        if self.on_begin is not None:
            begin, self.on_begin = self.on_begin, None
            begin()
        if self._progress is not None and (seen := self._progress()) != self.seen:
            self.seen, self._moved = seen, now
        left = self._moved + self._seconds - now
        if left <= 0:
            raise self._error(holder() or UNKNOWN)
        if now - self._began >= self._next_word:
            self._say(str(holder() or UNKNOWN), now - self._began)
        sleep(min(seconds, left))

    def _error(self, holder: object) -> Busy:
        waited = f"waited {self._seconds:g} s" if self._seconds else "did not wait"
        return Busy(
            f"{waited} for {self._what}, which {holder} has: "
            "try again later, or wait longer with --wait SECONDS or CACHEDB_WAIT",
            str(holder),
        )

    def _say(self, holder: str, waited: float) -> None:
        """Say for whom we wait; as a warning once, unless another thread has said the same."""
        self._next_word = math.floor(waited) + 1
        level = logging.DEBUG if self._saying or holder in _said else logging.WARNING
        if holder != self._saying:
            _said.discard(self._saying)
            self._saying = holder
            _said.add(holder)
        LOG.log(level, "waiting for %s, %d s", holder, waited, extra={"wait": "on"})
