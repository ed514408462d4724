"""Check a caller's arguments before they are used."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping

from cachedb.errors import CacheError

__all__ = [
    "check_characters",
    "check_functions",
    "check_mapping",
    "check_numbers",
    "check_paths",
    "check_readable",
    "check_text",
    "check_writable",
]


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
    """Raise `CacheError` if one of the values has a NUL or a surrogate, which neither SQLite nor the system takes."""
    for name, value in values.items():
        if value is not None:
            _check_characters(name, value)


def _check_characters(name: str, text: str, surrogates: str = "strict") -> None:
    """Raise `CacheError` for a NUL, and for a surrogate unless the error handler ``surrogates`` can encode it."""
    try:
        text.encode("utf-8", surrogates)
        is_valid = "\0" not in text
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise CacheError(f"{name} has a NUL character or a lone surrogate: {text[:100]!r}")


def check_numbers(**values: object) -> None:
    """Raise `TypeError` if one of the values is neither a number nor None."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise _type_error(name, value, "a number, or None")


def check_mapping(**values: object) -> None:
    """Raise `TypeError` if one of the values is neither a mapping from strings nor None."""
    for name, value in values.items():
        if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
            raise _type_error(name, value, "a mapping whose keys are strings, or None")


def _is_path(name: str, value: object) -> bool:
    if not isinstance(value, (str, os.PathLike)) or not isinstance(path := os.fspath(value), str):
        return False
    _check_characters(name, path, "surrogateescape")  # as `os.fsdecode` gives the names of files
    return True


def check_paths(*, optional: bool = False, **values: object) -> None:
    """Raise `TypeError` if one of the values is not a path, and `CacheError` if no file can have it.

    ``optional`` allows None too.
    """
    for name, value in values.items():
        if not _is_path(name, value) and not (optional and value is None):
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
        if not _is_path(name, value) and (not has_methods or isinstance(value, io.TextIOBase)):
            raise _type_error(name, value, "a path, or a file open in binary mode")
