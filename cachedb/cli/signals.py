"""End a command on a signal, or when it is stuck."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["exit_if_stuck", "exit_terminated", "finished", "raise_interrupt", "received_signals"]


_GRACE_SECONDS = 1.0  # for a block that must end, to do so by itself
received_signals: list[int] = []


def exit_terminated(number: int, _frame: object) -> NoReturn:
    """Exit with 143, the code a shell reports for SIGTERM."""
    received_signals.append(number)
    sys.exit(143)


def raise_interrupt(number: int, _frame: object) -> NoReturn:
    """Raise `KeyboardInterrupt`, or exit at once if the command has finished."""
    received_signals.append(number)
    if finished:
        os._exit(130)  # everything is printed, and an exception would only add a traceback
    raise KeyboardInterrupt


finished: list[bool] = []  # not empty once the command has finished


@contextmanager
def exit_if_stuck(seconds: float | None, message: str) -> Iterator[None]:
    """Exit if this block goes on for more than a second after its time, or after SIGINT or SIGTERM.

    Python runs signal handlers only between its own instructions, and SQLite can work for minutes on one of them. The
    process ends at once and cleans up nothing, so the block must change nothing.

    Args:
        seconds: the time after which the block should end by itself; None for no limit.
        message: the error if it does not.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)

    def watch() -> None:
        wait, code, text = None if seconds is None else seconds + _GRACE_SECONDS, 1, message
        while select.select([readable], [], [], wait)[0]:
            received = os.read(readable, 1)
            if not received:
                return  # the block has ended
            if received[0] in (signal.SIGINT, signal.SIGTERM):
                wait, code, text = _GRACE_SECONDS, 128 + received[0], "interrupted"
        os.write(2, f"cachedb: {text}\n".encode())
        os._exit(code)

    watcher = threading.Thread(target=watch, daemon=True, name="cachedb watcher")
    before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)  # Python writes the number of a signal to it
    try:
        watcher.start()
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writable)
        watcher.join()
        os.close(readable)
