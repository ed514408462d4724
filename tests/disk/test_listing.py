"""A listing of an open folder is complete and current on every file system."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.disk.listing import list_names
from tests.support.mounting import image, mounted


def test_a_listing_does_not_depend_on_another_one_of_the_same_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with os.scandir(folder) as entries:
            assert next(entries).name == "file"
            assert os.listdir(folder) == []  # what the kernel has returned is not returned again
            assert list_names(folder) == ["file"]
    finally:
        os.close(folder)


@pytest.mark.slow
def test_all_files_of_a_new_cache_on_btrfs_are_shared(tmp_path: Path) -> None:
    """There, a descriptor lists only what the folder had when it was opened."""
    file = image(tmp_path / "image", 256 << 20, "mkfs.btrfs", "-q", install="btrfs-progs")
    with mounted(tmp_path / "mounted", "-o", "loop", file) as path:
        directory = path / "cache"
        with Cache.open(directory) as cache:
            cache.share()
            modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in os.scandir(directory)}
            assert set(modes.values()) == {0o660, 0o2770}, modes
