"""Whether a cache directory may be changed: each cause to only read it counts by itself."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cachedb import CacheError, NotOurs, StorageError, space
from cachedb.disk import access
from cachedb.disk.access import Access


@pytest.mark.parametrize("cause", ["links", "mode"])
def test_a_shortage_that_ends_leaves_another_cause_to_only_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    directory.mkdir()
    (directory / "index.db").touch()
    if cause == "links":
        monkeypatch.setattr(access, "find_links", lambda _: NotOurs("it shares its index"))
    else:
        monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)
    found = Access(directory, directory / "index.db", trust=False)
    found.make_read_only(StorageError("the disk is full", errno=errno.ENOSPC))
    monkeypatch.setattr(space, "find_shortage", lambda *_: None)
    assert found.end_shortage()
    assert found.read_only
    with pytest.raises(CacheError, match="it shares its index" if cause == "links" else "can only be read"):
        _ = found.folders


def test_a_shortage_that_goes_on_is_the_error_of_a_change(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.mkdir()
    found = Access(directory, directory / "index.db", trust=False)
    assert not found.end_shortage()
    found.make_read_only(StorageError("the disk is full", errno=errno.ENOSPC))
    monkeypatch.setattr(space, "find_shortage", lambda *_: OSError(errno.ENOSPC, "full"))
    with pytest.raises(StorageError, match="the disk is full") as raised:
        found.end_shortage()
    assert raised.value.errno == errno.ENOSPC
    assert found.read_only
