"""Interrupt a thread again and again while it waits for a thread group."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.waiting import wait_until

_INTERRUPTS = 3


class Interrupts:
    """Interrupts of the main thread; another thread calls `send`."""

    def __init__(self) -> None:
        self._caller, self._handled = threading.get_ident(), list[int]()
        self._left = threading.Event()
        self.outlived = list[bool]()
        """For each call of `send`, whether the caller left its block while the call went on."""

    def send(self) -> None:
        """Interrupt the caller, each time when it waits, and note whether it left."""
        for count in range(1, _INTERRUPTS + 1):
            assert wait_until(lambda: self._is_waiting() or self._left.is_set())
            while len(self._handled) < count and not self._left.is_set():
                signal.pthread_kill(self._caller, signal.SIGUSR1)
                self._left.wait(0.01)
        assert wait_until(lambda: self._is_waiting() or self._left.is_set())
        self.outlived.append(self._left.is_set())

    def _is_waiting(self) -> bool:
        return sys._current_frames()[self._caller].f_code.co_name in ("_await_end", "join", "_wait_for_tstate_lock")

    def handle(self, number: int, _frame: object) -> None:
        """Raise `KeyboardInterrupt`, as a signal handler."""
        self._handled.append(number)
        raise KeyboardInterrupt

    def leave(self) -> None:
        """Note that the caller has left its block, and wait for `send`."""
        self._left.set()
        assert wait_until(lambda: bool(self.outlived))


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Yield interrupts of this thread; the end of the block waits for `Interrupts.send`."""
    made = Interrupts()
    before = signal.signal(signal.SIGUSR1, made.handle)
    try:
        yield made
    finally:
        made.leave()
        signal.signal(signal.SIGUSR1, before)
