"""Mount file systems for tests in a private mount namespace: they go when the process ends."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import find_peer
from tests.support import leftovers

__all__ = ["fill_space", "image", "mounted"]


@contextmanager
def mounted(path: Path, *arguments: object) -> Iterator[Path]:
    """Mount at a path, with arguments of mount(8), until the block ends; skip the test if mounting fails."""
    if not leftovers.isolate_mounts():
        pytest.skip("cannot mount file systems: run as root, with CAP_SYS_ADMIN")
    path.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *map(str, arguments), path], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def image(path: Path, size: int, program: str, *arguments: str, install: str = "") -> Path:
    """Make a file that holds a file system; skip the test if the program fails, or as `find_peer` does."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = shutil.which(program, path=search) or find_peer(program, f"apt-get install {install}")
    with path.open("wb") as file:
        file.truncate(size)
    command = [found, *arguments, str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PATH": search})
    if done.returncode:
        pytest.skip(f"{program} cannot make a file system: {done.stderr.strip()}")
    return path


def fill_space(path: Path) -> None:
    """Fill a file system to the last block with one file."""
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
