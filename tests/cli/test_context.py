"""Which commands create a cache, and what the others say without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cachedb import Cache, DamagedIndex, NotACache, NotInCache
from tests.conftest import Run
from tests.support import make
from tests.support.registries import Registry, isolate_client  # noqa: F401 - isolate_client is a fixture

IMAGE = make.image(1)
ABSENT = "sha256:" + "0" * 64


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make.write(tmp_path / "app.tar", make.oci_files({"app:1": IMAGE}))


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        yield made


@pytest.mark.parametrize(
    "command",
    [
        "ls", "ls -q --format json", "show app:1", "manifest app:1", "exists app:1", f"exists {ABSENT}",
        "tag app:1 app:2", "rm app:1", "export app:1 app.tar", "push localhost:1/app:1", "sql", "sql --schema",
        "sql SELECT(1)", "report largest-unique", "report --html cache.html", "stats", "df", "hold app:1", "holds",
        "release app:1", "gc", "gc --dry-run", "verify", "verify --repair", "copy new", "ps", f"blob cat {ABSENT}",
        f"blob path {ABSENT}", "db upgrade", "db downgrade 0002", "db check", "db backup",
        "db upgrade --dry-run", "db upgrade --sql", "db current --check",
    ],
)  # fmt: skip
@pytest.mark.parametrize("directory", ["absent", "absent/below", "empty"])
def test_a_reading_command_creates_nothing_and_says_where_it_looked(
    cachedb: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, directory: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    done = cachedb("--dir", directory, *command.split())
    path = str(tmp_path / directory)
    message = f"there is no cache in {path!r}: check --dir and CACHEDB_DIR; `cachedb init` creates one"
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"cachedb: {message}\n")
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["import ARCHIVE", "pull REGISTRY/app:1", "adopt OLD", "produce app:1 -- true", "blob add ARCHIVE"]
)
def test_a_command_that_stores_creates_a_missing_cache_and_says_so_once(
    cachedb: Run, tmp_path: Path, archive: Path, remote: Registry, command: str
) -> None:
    (tmp_path / "old").mkdir()
    words = [
        word.replace("ARCHIVE", str(archive)).replace("REGISTRY", remote.host).replace("OLD", str(tmp_path / "old"))
        for word in command.split()
    ]
    directory = tmp_path / "absent" / "below"
    created = f"cachedb: created the cache {str(directory)!r}\n"
    assert created in cachedb("--dir", directory, *words).stderr
    assert cachedb("--dir", directory, "ls").returncode == 0
    assert created not in cachedb("--dir", directory, *words).stderr


def test_init_creates_a_missing_cache_and_names_it_on_stdout(cachedb: Run, directory: Path) -> None:
    for _ in range(2):
        done = cachedb("init")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{directory} is a cache\n", "")


def test_a_cache_whose_creation_was_interrupted_is_there(cachedb: Run, directory: Path) -> None:
    Cache.open(directory).close()
    (directory / "index.db").unlink()
    assert cachedb("ls", "-q").returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("isolate_client")
def test_a_registry_is_asked_without_a_cache(
    cachedb: Run, directory: Path, remote: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    name = f"{remote.host}/app:1"
    for command in ("digest", "inspect", "pull --dry-run"):
        done = cachedb(*command.split(), name)
        assert (done.returncode, done.stderr) == (0, "")
        assert IMAGE.digest[:19] in done.stdout
    assert cachedb("tags", f"{remote.host}/app").stdout == "1\n"
    assert not directory.exists()
    assert list(temporary.iterdir()) == []


def test_a_directory_is_created_only_if_asked_to(directory: Path) -> None:
    with pytest.raises(NotInCache, match="there is no cache in"):
        Cache.open(directory, create=False)
    assert not directory.exists()
    Cache.open(directory).close()
    with Cache.open(directory, create=False) as cache:
        assert cache.list_names() == []


def test_a_directory_with_other_files_is_not_called_empty(directory: Path) -> None:
    directory.mkdir()
    (directory / "thesis.tex").touch()
    with pytest.raises(NotACache, match=r"thesis\.tex"):
        Cache.open(directory, create=False)


def test_a_cache_that_lost_its_index_is_there(directory: Path) -> None:
    with Cache.open(directory) as cache:
        cache.add_blob(b"x")
    (directory / "index.db").unlink()
    with pytest.raises(DamagedIndex):
        Cache.open(directory, create=False)
