"""Locks on single bytes of an open file, also on a kernel that has no such locks."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cachedb.disk.byte_locks import find_first_locked, lock_byte


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    """Open one file three times."""
    with ExitStack() as stack:
        found = []
        for _ in range(3):
            found.append(os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600))
            stack.callback(os.close, found[-1])
        yield found


def test_only_one_open_file_locks_a_byte(files: list[int]) -> None:
    assert lock_byte(files[0], 5)
    assert not lock_byte(files[1], 5)
    assert lock_byte(files[1], 6)
    assert lock_byte(files[0], 5), "its own lock conflicts"


def test_the_lowest_byte_that_another_file_locks_is_found(files: list[int]) -> None:
    assert find_first_locked(files[2], 1, 9) is None
    assert lock_byte(files[0], 7)
    assert lock_byte(files[1], 3)
    assert find_first_locked(files[2], 1, 9) == 3
    assert find_first_locked(files[2], 4, 9) == 7
    assert find_first_locked(files[2], 8, 9) is None
    assert find_first_locked(files[0], 4, 9) is None, "its own lock was found"


def test_bytes_are_locked_by_a_python_without_the_numbers_of_such_locks(
    files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("F_OFD_GETLK", "F_OFD_SETLK", "F_OFD_SETLKW"):
        monkeypatch.delattr(fcntl, name, raising=False)
    assert lock_byte(files[0], 5)
    assert not lock_byte(files[1], 5)
    assert find_first_locked(files[1], 1, 9) == 5


def test_on_a_kernel_without_byte_locks_every_lock_succeeds(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert lock_byte(files[0], 5)
    assert lock_byte(files[1], 5)
    assert find_first_locked(files[0], 1, 9) == 1, "the kernel cannot tell, so the first byte is returned"
