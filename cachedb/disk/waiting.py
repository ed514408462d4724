"""Wait for other processes: for a limited time, with log messages that name the process.

The logger is ``cachedb``. A wait logs a warning after its first second, then a debug message each second. The records
have the attribute ``wait``, so that the command line shows them on one line.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cachedb.disk.lock_holders import UNKNOWN
from cachedb.errors import Busy, CacheError

__all__ = ["LOG", "Wait", "choose_wait_seconds"]


LOG = logging.getLogger("cachedb")

_DEFAULT_SECONDS = 60.0
_SILENT_SECONDS = 1.0  # a shorter wait is not logged
_logged_holders: set[str] = set()  # the holders that threads of this process wait for and have logged
os.register_at_fork(after_in_child=_logged_holders.clear)


def choose_wait_seconds(seconds: float | None = None) -> float:
    """Return how many seconds to wait: the argument, else ``CACHEDB_WAIT``, else 60.

    Raises:
        CacheError: if the value is not a number, 0 or more.
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
        """Prepare a wait.

        Args:
            what: the name, in errors, of the thing to wait for, such as "the write lock".
            seconds: after which to give up.
            progress: returns a value that changes when the other process makes progress. Then the seconds start again.
        """
        self.on_begin: Callable[[], None] | None = None
        """A function to call once, in the first nap."""
        self._what, self._seconds, self._progress = what, seconds, progress
        self.seen: object = None
        """The last value that ``progress`` returned."""
        self._began = self._last_progress = -math.inf
        self._next_log = _SILENT_SECONDS
        self._logged_holder = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Log that the wait is over, if the wait was logged."""
        if self._logged_holder:
            _logged_holders.discard(self._logged_holder)
            LOG.debug("waited for %s, %d s", self._logged_holder, self.waited_seconds, extra={"wait": "end"})
            self._logged_holder = ""

    @property
    def waited_seconds(self) -> float:
        """The seconds since the first nap."""
        return max(0.0, time.monotonic() - self._began) if self._began > -math.inf else 0.0

    @property
    def stalled_seconds(self) -> float:
        """The seconds since the last progress of the other process, or since the first nap."""
        return max(0.0, time.monotonic() - self._last_progress) if self._began > -math.inf else 0.0

    def nap(self, seconds: float, holder: Callable[[], object], sleep: Callable[[float], object] = time.sleep) -> None:
        """Sleep for a while, and log the wait if it is long.

        Args:
            seconds: to sleep.
            holder: returns the process that has the thing, as text or an object for `str`; None if it is unknown.
            sleep: called with the seconds.

        Raises:
            Busy: if the time to wait is over.
        """
        now = time.monotonic()
        if self._began == -math.inf:
            self._began = now
            self._last_progress = now
        if self.on_begin is not None:
            begin, self.on_begin = self.on_begin, None
            begin()
        if self._progress is not None and (seen := self._progress()) != self.seen:
            self.seen, self._last_progress = seen, now
        left = self._last_progress + self._seconds - now
        if left <= 0:
            raise self._error(holder() or UNKNOWN)
        if now - self._began >= self._next_log:
            self._log(str(holder() or UNKNOWN), now - self._began)
        sleep(min(seconds, left))

    def _error(self, holder: object) -> Busy:
        waited = f"waited {self._seconds:g} s" if self._seconds else "did not wait"
        return Busy(
            f"{waited} for {self._what}, which is held by {holder}: "
            "try again later, or wait longer with --wait SECONDS or CACHEDB_WAIT",
            str(holder),
        )

    def _log(self, holder: str, waited: float) -> None:
        """Log the process to wait for: as a warning the first time, later as a debug message."""
        self._next_log = math.floor(waited) + 1
        level = logging.DEBUG if self._logged_holder or holder in _logged_holders else logging.WARNING
        if holder != self._logged_holder:
            _logged_holders.discard(self._logged_holder)
            self._logged_holder = holder
            _logged_holders.add(holder)
        LOG.log(level, "waiting for %s, %d s", holder, waited, extra={"wait": "on"})
