"""Keep the errors of SQLite callbacks, and raise them again.

SQLite drops an error that a callback raises.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

__all__ = ["Callbacks"]

T = TypeVar("T")
R = TypeVar("R")


class Callbacks:
    """The callbacks of one connection, and the errors raised in them.

    Each callback is a generator, because a signal handler may run at its first instruction. In a function that
    instruction comes before the ``try``; in a resumed generator it is inside.
    """

    def __init__(self) -> None:
        self._raised: list[BaseException] = []

    def progress_handler(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a progress handler that interrupts SQLite when ``should_stop`` returns True or raises."""

        def answers() -> Iterator[bool]:
            stop = False
            try:
                while True:
                    yield stop
                    stop = should_stop()
            except GeneratorExit:
                raise
            except BaseException as error:
                self._raised.append(error)
            while True:
                yield True

        handler = answers()
        next(handler)
        return handler.__next__

    def function(self, call: Callable[[T], R]) -> Callable[[T], R | None]:
        """Return an SQL function of one argument that aborts the statement if ``call`` raises."""

        def results() -> Generator[R | None, T, None]:
            result: R | None = None
            try:
                while True:
                    result = call((yield result))
            except GeneratorExit:
                raise
            except BaseException as error:
                self._raised.append(error)
                raise

        function = results()
        next(function)
        return function.send

    def raise_again(self) -> None:
        """Raise the first error that was raised in a callback, if any."""
        if self._raised:
            raise self._raised[0]
