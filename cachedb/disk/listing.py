"""List the present names in an open folder."""

from __future__ import annotations

import os

__all__ = ["list_names"]


def list_names(folder: int) -> list[str]:
    """Return the names in a folder, including those that were added after it was opened.

    The folder is opened again for this. On btrfs, `os.listdir` of an old descriptor misses names that were added
    later. And if two threads list one descriptor at the same time, each gets only a part.

    Args:
        folder: its descriptor.

    Raises:
        OSError: if it cannot be read.
    """
    again = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        return os.listdir(again)
    finally:
        os.close(again)
