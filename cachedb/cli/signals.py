"""End a command on a signal."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

__all__ = ["exit_terminated", "finished", "raise_interrupt", "received_signals"]


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
