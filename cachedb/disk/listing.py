"""List an open folder as it is now."""

from __future__ import annotations

import os

__all__ = ["list_names"]


def list_names(folder: int) -> list[str]:
    """Return the names in a folder, also those that were added after it was opened.

    On btrfs, `os.listdir` of a descriptor misses what was added since then. And threads that list one descriptor at
    the same time share its position, so each gets a part. So the folder is opened again.

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
