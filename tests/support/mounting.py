"""File systems for tests, in a mount namespace of our own: they go with the process, however it ends."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

__all__ = ["fill_space", "image", "mounted"]

_CLONE_NEWNS = 0x20000


@cache
def _unshare() -> bool:
    """Give this thread, and what it starts, mounts that nobody else sees; return whether it could be done."""
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        return False
    return not subprocess.run(["mount", "--make-rprivate", "/"], check=False, capture_output=True).returncode


@contextmanager
def mounted(path: Path, *arguments: object) -> Iterator[Path]:
    """Mount at a path, with the arguments of mount(8), in a block; skip the test where that cannot be done."""
    if not _unshare():
        pytest.skip("nothing can be mounted: run as root, with CAP_SYS_ADMIN")
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *map(str, arguments), path], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(map(str, arguments))} cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def image(path: Path, size: int, program: str, *arguments: str, install: str = "") -> Path:
    """Make a file with a file system in it; skip the test where the program is not installed."""
    if not shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        pytest.skip(f"{program} is not installed: apt-get install {install}")
    with path.open("wb") as file:
        file.truncate(size)
    command = [program, *arguments, str(path)]
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        pytest.skip(f"{program} cannot make a file system here: {done.stderr.strip()}")
    return path


def fill_space(path: Path) -> None:
    """Take all the space of a file system with one file, to the last block."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        end, step = 0, 64 * 1024 * 1024
        while step >= 4096:
            try:
                os.posix_fallocate(file, end, step)
                end += step
            except OSError:
                step //= 2
    finally:
        os.close(file)
