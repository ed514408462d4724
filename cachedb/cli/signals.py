"""End a command on a signal."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["ENDING_SIGNALS", "delaying_signals", "exit_terminated", "finished", "raise_interrupt", "received_signals"]


ENDING_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
"""The signals that end a command after it has cleaned up; a closed terminal sends SIGHUP."""

_PATIENCE_SIGNALS = 2  # signals that let a command clean up

received_signals: list[int] = []
finished: list[bool] = []  # not empty once the command has finished


def exit_terminated(number: int, _frame: object) -> NoReturn:
    """Exit with the code that a shell reports for the signal: 143 for SIGTERM, 129 for SIGHUP."""
    received_signals.append(number)
    _exit_if_finished(128 + number)
    sys.exit(128 + number)


def raise_interrupt(number: int, _frame: object) -> NoReturn:
    """Raise `KeyboardInterrupt`; if the command has finished, exit with 130, a shell's code for SIGINT."""
    received_signals.append(number)
    _exit_if_finished(130)
    raise KeyboardInterrupt


@contextmanager
def delaying_signals() -> Iterator[None]:
    """Delay `ENDING_SIGNALS` until the end of the block, so that the block ends whole."""
    delayed: list[int] = []
    # A signal that is ignored stays so, also for a command that the block starts.
    handled = [number for number in ENDING_SIGNALS if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda number, _frame: delayed.append(number)) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for received in delayed:
        signal.raise_signal(received)


def _exit_if_finished(code: int) -> None:
    """Exit at once if the command has finished, because an exception would only print a traceback.

    The third signal has the same effect: the command may wait for a thread that is stuck.
    """
    if finished or len(received_signals) > _PATIENCE_SIGNALS:
        os._exit(code)
