"""Fixtures for the tests of operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cachedb import Cache


@pytest.fixture(scope="module")
def rows_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """Yield a cache for indexes whose blobs have no files."""
    with Cache.open(tmp_path_factory.mktemp("rows") / "cache") as cache:
        yield cache
