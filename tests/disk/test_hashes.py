"""Several threads hash the files of blobs."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from cachedb import Cache
from cachedb.disk import hashes
from cachedb.oci.digests import Digest
from tests.conftest import files_of


def test_several_files_are_read_at_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_FILES_PER_TASK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=60)
    read_file = hashes._hash_file

    def meet_and_read(*arguments: Any) -> object:
        both.wait()
        return read_file(*arguments)

    monkeypatch.setattr(hashes, "_hash_file", meet_and_read)
    for number in range(4):
        cache.add_blob(b"%d" % number)
    files = {Digest(digest): size for digest, size in files_of(cache.directory).items()}
    readings = hashes.hash_files(cache.directory, files, None)
    assert {digest: (reading.digest, reading.size) for digest, reading in readings.items()} == {
        digest: (digest, size) for digest, size in files.items()
    }
