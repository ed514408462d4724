"""Callbacks of SQLite: SQLite drops an error that is raised in one, so it is kept here, to be raised again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

__all__ = ["Callbacks"]

T = TypeVar("T")
R = TypeVar("R")


class Callbacks:
    """The callbacks of one connection, and the first error that was raised in one of them.

    Each is a generator. A signal's handler runs at the first instruction of ours: a function's is before its ``try``, a
    generator's that goes on is in it.
    """

    def __init__(self) -> None:
        self._raised: list[BaseException] = []

    def progress_handler(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a progress handler, which has SQLite stop when ``should_stop`` says so or raises."""

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
        """Return a function for SQL, of one argument, which ends the statement if ``call`` raises."""

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
        """Raise what was raised in a callback, if anything was."""
        if self._raised:
            raise self._raised[0]
