"""Fixtures for the tests against other tools and registries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachedb import Cache
from tests.peers.test_archives import Tools
from tests.support.promises import check
from tests.support.registries import REGISTRIES, docker_registry


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark these tests as slow: other tools take their time."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def cache(check_promises: None, cache: Cache) -> Cache:
    """Return a cache whose promises are checked at the end, after it is closed."""
    return cache


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Cache]:
    """Open a second, empty cache."""
    with Cache.open(tmp_path / "fresh") as opened:
        yield opened
    check(tmp_path / "fresh")


@pytest.fixture
def tools(tmp_path: Path, peer: Callable[[str], str]) -> Tools:
    """Return a runner of peers with an empty storage."""
    return Tools(tmp_path / "home", peer)


@pytest.fixture
def host(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Run an empty registry; the parameter is its name, and the default is Debian's docker-registry."""
    with REGISTRIES[getattr(request, "param", "docker-registry")](tmp_path) as running:
        yield running


@pytest.fixture
def other_host(tmp_path: Path) -> Iterator[str]:
    """Run a second registry, which is Debian's docker-registry."""
    (tmp_path / "other").mkdir()
    with docker_registry(tmp_path / "other") as running:
        yield running


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to the test's folder: some tools accept no path with spaces."""
    monkeypatch.chdir(tmp_path)
