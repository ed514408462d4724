"""Check a caller's arguments before they are used."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from typing import Final, TypeGuard

from cachedb.errors import CacheError
from cachedb.text import shorten

__all__ = [
    "LONGEST_SECONDS",
    "check_characters",
    "check_functions",
    "check_lifetime",
    "check_mapping",
    "check_numbers",
    "check_pair",
    "check_paths",
    "check_positive",
    "check_readable",
    "check_text",
    "check_writable",
]


LONGEST_SECONDS: Final = 36_525 * 86_400
"""The longest lifetime and the longest hold: a hundred years."""


def _type_error(name: str, value: object, wanted: str) -> TypeError:
    return TypeError(f"{name} is of type {type(value).__name__!r}: give {wanted}")


def check_functions(**values: object) -> None:
    """Raise `TypeError` if one of the values is neither a function nor None."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise _type_error(name, value, "a function, or None")


def check_text(*, optional: bool = False, **values: object) -> None:
    """Raise `TypeError` if one of the values is not a string; ``optional`` allows None too."""
    for name, value in values.items():
        if not isinstance(value, str) and not (optional and value is None):
            raise _type_error(name, value, "a string, or None" if optional else "a string")


def check_characters(**values: str | None) -> None:
    """Raise `CacheError` if a value has a NUL or a surrogate, which SQLite and the system refuse."""
    for name, value in values.items():
        if value is not None:
            _check_encoding(name, value, str.encode)


def _check_encoding(name: str, text: str, encode: Callable[[str], bytes]) -> None:
    try:
        is_valid = b"\0" not in encode(text)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise CacheError(f"{name} has a NUL character or a lone surrogate: leave it out of {shorten(text)}")


def check_numbers(**values: object) -> None:
    """Raise `TypeError` if one of the values is neither a number nor None."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise _type_error(name, value, "a number, or None")
        if isinstance(value, int) and abs(value) >= 2**1000:  # no float is that large
            raise CacheError(f"{name} has over 300 digits: give a smaller number")


def check_positive(**values: object) -> None:
    """Raise `TypeError` if one of the values is no number, and `CacheError` if one is not above 0."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _type_error(name, value, "a number")
        if not value > 0:
            raise CacheError(f"{name} is {value!r}: give a number above 0")


def check_lifetime(**values: object) -> None:
    """Raise `TypeError` if a value is neither seconds nor None, `CacheError` if it is out of range."""
    check_numbers(**values)
    for name, value in values.items():
        if isinstance(value, (int, float)) and not 0 < value <= LONGEST_SECONDS:
            raise CacheError(f"{name} is {value!r}: give seconds, at most 100 years, or None for no end")


def check_pair(**values: object) -> None:
    """Raise `TypeError` if one of the values is neither a pair of strings nor None."""
    for name, value in values.items():
        is_pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
        if value is not None and not is_pair:
            raise _type_error(name, value, "a pair of strings, or None")


def check_mapping(**values: object) -> None:
    """Raise `TypeError` if one of the values is neither a mapping from strings nor None."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
            raise _type_error(name, value, "a mapping whose keys are strings, or None")


def _is_path(value: object) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(value, (str, os.PathLike)) and isinstance(os.fspath(value), str)


def check_paths(*, optional: bool = False, **values: object) -> None:
    """Raise `TypeError` if one of the values is not a path, and `CacheError` if no file can have it.

    ``optional`` allows None too.
    """
    for name, value in values.items():
        if _is_path(value):
            _check_encoding(name, os.fspath(value), os.fsencode)
        elif not (optional and value is None):
            raise _type_error(name, value, "a path, or None" if optional else "a path")


def check_readable(**values: object) -> None:
    """Raise `TypeError` if one of the values is neither a path nor a file open for reading in binary mode."""
    _check_files("read", **values)


def check_writable(**values: object) -> None:
    """Raise `TypeError` if one of the values is neither a path nor a file open for writing in binary mode."""
    _check_files("write", "flush", **values)


def _check_files(*methods: str, **values: object) -> None:
    for name, value in values.items():
        has_methods = all(callable(getattr(value, method, None)) for method in methods)
        if _is_path(value):
            _check_encoding(name, os.fspath(value), os.fsencode)
        elif not has_methods or isinstance(value, io.TextIOBase):
            raise _type_error(name, value, "a path, or a file open in binary mode")
