"""How a signal ends a command."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

__all__ = ["exit_terminated", "finished", "raise_interrupt", "received_signals"]


received_signals: list[int] = []  # that have come


def exit_terminated(number: int, _frame: object) -> NoReturn:
    """Exit with 143, as a shell reports SIGTERM."""
    received_signals.append(number)
    sys.exit(143)


def raise_interrupt(number: int, _frame: object) -> NoReturn:
    """Raise KeyboardInterrupt, or exit at once if the command is over."""
    received_signals.append(number)
    if finished:
        os._exit(130)  # all is done and printed: where the interpreter ends, an exception would only be printed
    raise KeyboardInterrupt


finished: list[bool] = []  # not empty once the command is over
