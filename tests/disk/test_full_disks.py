"""Full disks: no space, no inodes, a used-up quota; and errors that only look like a full disk."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, Keep, Policy, Remove, StorageError, space
from cachedb.disk import file_system
from cachedb.disk.layout import partial_path
from cachedb.disk.reserve import Reserve, is_full
from cachedb.errors import os_errors
from cachedb.index import schema
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.errors import sqlite_errors, translate
from cachedb.oci.digests import Digest
from tests.conftest import Run, run_python
from tests.support import make
from tests.support.make import save
from tests.support.mounting import fill_space, image, mounted
from tests.support.promises import check

MADE, OTHER = make.image(1, 2), make.image(3)
NO_INODES = "the file system has no free inodes"
RESERVED = {str(number) for number in range(1, 9)}


def fill_inodes(folder: Path) -> None:
    """Use up all inodes of a file system with empty files."""
    with suppress(OSError):
        for number in count():
            (folder / str(number)).touch(exist_ok=False)


@pytest.fixture(params=["tmpfs", "ext4", "xfs"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Make a cache on a file system without free inodes; the file `full` beside it takes the space of XFS."""
    arguments: tuple[object, ...] = ("-t", "tmpfs", "-o", "size=64m,nr_inodes=200", "tmpfs")
    if request.param == "ext4":
        # 64 MiB and 256 inodes.
        file = image(tmp_path / "image", 64 << 20, "mkfs.ext4", "-q", "-N", "256", install="e2fsprogs")
        arguments = ("-o", "loop", file)
    if request.param == "xfs":
        file = image(tmp_path / "image", 320 << 20, "mkfs.xfs", "-q", install="xfsprogs")
        arguments = ("-o", "loop", file)
    with mounted(tmp_path / "disk", *arguments) as disk:
        with Cache.open(disk / "cache") as cache:
            save(cache, "app:1", MADE)
            save(cache, "other:1", OTHER)
            cache.add_blob(b"garbage")
        for folder in (disk / "small", disk / "more", disk / "cache" / "ingest" / "partial"):
            folder.mkdir()
        if request.param == "xfs":
            fill_space(disk / "full")  # XFS turns free space into inodes
        fill_inodes(disk / "small")
        yield disk / "cache"


@pytest.fixture
def without_reserve(full: Path) -> Path:
    """Make a cache on a full disk without a reserve, as an older release would."""
    for path in (full / "reserve.inodes").iterdir():
        path.unlink()
    (full / "reserve").rename(full.parent / "reserve")
    fill_inodes(full.parent / "more")
    return full


@pytest.mark.slow
def test_a_cache_without_free_inodes_can_be_read_and_emptied(cachedb: Run, full: Path, tmp_path: Path) -> None:
    for command, output in (
        (["ls", "-q"], "app:1\nother:1\n"),
        (["exists", "app:1"], ""),
        (["sql", "--format", "json", "select count(*) as n from images"], '[{"n": 2}]'),
        (["df", "--format", "json"], '"images": 2'),
        (["export", "app:1", tmp_path / "out.tar"], ""),  # an export begins a session
        (["tag", "app:1", "app:2"], ""),
        (["rm", "other:1"], "freed 3 blobs"),
        (["gc"], "freed 1 blob"),
        (["ls", "-q"], "app:1\napp:2\n"),
    ):
        result = cachedb("--dir", full, *command)
        assert (result.returncode, result.stderr) == (0, ""), command
        assert output.replace(" ", "") in result.stdout.replace(" ", "").replace("\n", "") or output in result.stdout
    for path in (full.parent / "small").iterdir():
        path.unlink()
    (full.parent / "full").unlink(missing_ok=True)
    check(full)
    assert set(os.listdir(full / "reserve.inodes")) == RESERVED
    assert (full / "reserve").stat().st_size == 1024 * 1024


@pytest.mark.slow
def test_a_cache_without_free_inodes_can_be_pruned(full: Path) -> None:
    with Cache.open(full) as cache:
        pruned = cache.prune(Policy(keep=(Keep(used_within=0.001),), remove=(Remove(names=("other:*",)),)))
        assert list(map(str, pruned.images)) == ["other:1"]
        assert list(map(str, cache.list_names())) == ["app:1"]


@pytest.mark.parametrize("full", ["tmpfs", "ext4"], indirect=True)
def test_a_reader_that_used_the_reserve_sets_it_aside_again(full: Path) -> None:
    assert schema.current(full).usable
    assert set(os.listdir(full / "reserve.inodes")) == RESERVED


@pytest.mark.slow
@pytest.mark.parametrize("full", ["tmpfs", "ext4"], indirect=True)
def test_downloads_are_kept_where_the_reserved_inodes_suffice(cachedb: Run, full: Path) -> None:
    left = partial_path(full, Digest(MADE.digest))
    (full / "reserve").rename(left)
    fill_inodes(full.parent / "more")
    for command in (["ls", "-q"], ["rm", "other:1"], ["gc"]):
        assert cachedb("--dir", full, *command).returncode == 0
    assert left.exists()


@pytest.mark.slow
def test_a_full_cache_without_a_reserve_can_be_read_and_a_write_names_the_cause(
    cachedb: Run, without_reserve: Path
) -> None:
    for command in (["ls", "-q"], ["exists", "app:1"], ["sql", "select count(*) from images"], ["df"], ["verify"]):
        result = cachedb("--dir", without_reserve, *command)
        assert (result.returncode, result.stderr) == (0, ""), command
    for command in (["rm", "app:1"], ["gc"], ["tag", "app:1", "app:2"]):
        result = cachedb("--dir", without_reserve, *command)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert NO_INODES in result.stderr or "No space left on device" in result.stderr
    assert cachedb("--dir", without_reserve, "ls", "-q").stdout == "app:1\nother:1\n"


def test_a_cache_opened_in_a_shortage_can_be_written_to_after_it(without_reserve: Path) -> None:
    with Cache.open(without_reserve) as cache:
        assert [str(image.name) for image in cache.list_manifests()] == ["app:1", "other:1"]
        with pytest.raises(StorageError) as caught:
            cache.remove_manifest("other:1")
        assert is_full(caught.value)
        for path in without_reserve.parent.joinpath("small").iterdir():
            path.unlink()
        without_reserve.parent.joinpath("full").unlink(missing_ok=True)
        assert cache.remove_manifest("other:1").blobs == 3
        save(cache, "new:1", make.image(4))
    check(without_reserve)


@pytest.mark.parametrize("full", ["tmpfs", "ext4"], indirect=True)
def test_missing_inodes_are_named_in_the_error(full: Path) -> None:
    for path in (full / "reserve.inodes").iterdir():
        path.rename(full.parent / f"taken-{path.name}")
    with pytest.raises(StorageError, match=f"^cannot work: {NO_INODES}: '.*new': delete some files"), os_errors("work"):
        (full / "new").touch()


def test_no_inodes_are_given_up_behind_a_link(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1").touch()
    Cache.open(directory).close()
    shutil.rmtree(directory / "reserve.inodes")
    (directory / "reserve.inodes").symlink_to(tmp_path / "elsewhere")
    with Cache.open(directory) as cache:
        cache._database.reserve.give_up_inodes()
    assert os.listdir(tmp_path / "elsewhere") == ["1"]


@pytest.mark.parametrize("name", ["reserve", "reserve.inodes/3", "reserve.inodes/8"])
def test_a_file_with_a_second_name_is_not_used_as_a_reserve(directory: Path, tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    precious.chmod(0o640)
    Cache.open(directory).close()
    shutil.rmtree(directory / "reserve.inodes")
    (directory / "reserve").unlink()
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).hardlink_to(precious)
    with Cache.open(directory) as cache:
        cache.add_blob(b"data")
    assert precious.read_bytes() == b"mine"
    assert stat.S_IMODE(precious.stat().st_mode) == 0o640


def test_only_our_own_names_are_given_up(cache: Cache, directory: Path) -> None:
    folder = directory / "reserve.inodes"
    assert set(os.listdir(folder)) == RESERVED
    (folder / "mine").touch()
    assert cache._database.reserve.give_up_inodes()
    assert os.listdir(folder) == ["mine"]
    cache._database.reserve.keep()
    assert set(os.listdir(folder)) == {*RESERVED, "mine"}


@pytest.mark.parametrize("full", ["tmpfs", "ext4"], indirect=True)
def test_a_session_begins_with_the_reserved_inodes_or_leaves_nothing(full: Path) -> None:
    with Cache.open(full) as cache, cache.hold("app:1"):
        # SQLite has its files already, and the session took two of the reserved inodes.
        for path in (full / "reserve.inodes").iterdir():
            path.rename(full.parent / "small" / f"taken-{path.name}")
        fill_inodes(full.parent / "more")
        before = sorted(os.listdir(full / "locks"))
        with Cache(Database(full)) as other:
            (full.parent / "small" / "0").unlink()  # one inode is too few
            with pytest.raises(StorageError, match=f"^cannot begin a session in the cache: {NO_INODES}"):
                other.add_blob(b"new")
            assert sorted(os.listdir(full / "locks")) == before
        (full.parent / "small" / "1").rename(full / "reserve.inodes" / "1")
        with Cache(Database(full)) as other, other.hold("app:1"):
            assert len(os.listdir(full / "locks")) == len(before) + 1


# Errors that are no full disk


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root to give a file to another user")
@pytest.mark.parametrize(("number", "theirs_stay"), [(errno.EDQUOT, True), (errno.ENOSPC, False)])
def test_a_users_full_quota_costs_no_file_of_another_user(cache: Cache, number: int, theirs_stay: bool) -> None:
    save(cache, "app:1", MADE)
    ours, theirs = (partial_path(cache.directory, Digest(digest)) for digest in (OTHER.digest, MADE.digest))
    ours.parent.mkdir()
    ours.write_bytes(b"begun")
    theirs.write_bytes(b"begun")
    other_files = [theirs, cache.directory / "reserve", cache.directory / "reserve.inodes" / "3"]
    for path in other_files:
        os.chown(path, 65534, 65534)

    def fail() -> None:
        raise StorageError("no room", errno=number)

    assert cache._database.reserve.run(fail, again=lambda: "done") == "done"  # after the inodes
    with pytest.raises(StorageError):
        cache._database.reserve.run(fail)
    assert not ours.exists()
    assert [path.exists() for path in other_files] == [theirs_stay] * 3


LIMITED = """
import resource, runpy, sys
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
runpy.run_module("cachedb", run_name="__main__")
"""


def run_limited(size: int, directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process that may write files of at most `size` bytes."""
    command = [sys.executable, "-c", LIMITED, str(size), "--dir", str(directory), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


@pytest.fixture
def partial(cache: Cache, directory: Path) -> Path:
    """Make a partial download in a closed cache."""
    save(cache, "app:1", MADE)
    cache.close()
    left = partial_path(directory, Digest(OTHER.digest))
    left.parent.mkdir()
    left.write_bytes(b"begun")
    return left


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 4096, 100 * 1024])
def test_a_limit_on_file_size_is_named_and_nothing_is_deleted(
    directory: Path, partial: Path, tmp_path: Path, size: int
) -> None:
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    result = run_limited(size, directory, "blob", "add", tmp_path / "large")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"this process may write files of {size} bytes at most: raise the limit (`ulimit -f`)" in result.stderr
    if size < 100 * 1024:
        result = run_limited(size, directory, "rm", "app:1")
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert "raise the limit (`ulimit -f`)" in result.stderr
    assert run_limited(size, directory, "ls", "-q").stdout == "app:1\n", "a read failed, though it writes no file"
    assert partial.read_bytes() == b"begun"
    assert (directory / "reserve").stat().st_size == 1024 * 1024
    assert set(os.listdir(directory / "reserve.inodes")) == RESERVED
    check(directory)


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, 0, 4096])
def test_a_limit_on_file_size_leaves_the_reserve_unchanged(directory: Path, partial: Path, before: int | None) -> None:
    reserve = directory / "reserve"
    reserve.unlink()
    if before is not None:
        reserve.write_bytes(bytes(before))
    assert run_limited(200 * 1024, directory, "ls", "-q").returncode == 0
    assert (reserve.stat().st_size if reserve.exists() else 0) == (before or 0)


@pytest.mark.slow
def test_an_index_that_outgrows_the_limit_is_not_reported_as_a_full_disk(directory: Path, cache: Cache) -> None:
    output = run_python(
        """
        import errno, os, resource, sqlite3, sys
        from pathlib import Path
        from cachedb.index.sqlite.database import Database
        from cachedb.index.sqlite.errors import translate
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
        database = Database(Path(sys.argv[1]))
        for size in (1 << 20, (4 << 20) - 4096):
            with open(f"{sys.argv[1]}/index.db-wal.test", "wb") as file:
                file.truncate(size)
            os.rename(file.name, f"{sys.argv[1]}/index.db-wal")
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
            print(translate(error, database.path, database.directory).errno == errno.EFBIG)
        """,
        directory,
    )
    assert output == "False\nTrue\n"


def sqlite_error(code: int, text: str = "disk I/O error") -> sqlite3.OperationalError:
    """Return an error as SQLite raises it."""
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "shortage", "expected", "full"),
    [
        (sqlite3.SQLITE_IOERR_READ, None, "see the kernel's log", False),
        (sqlite3.SQLITE_IOERR_NOMEM, errno.ENOSPC, "not enough memory", False),
        (sqlite3.SQLITE_IOERR_WRITE, errno.EIO, "Input/output error: the disk may be failing", False),
        (sqlite3.SQLITE_IOERR_WRITE, errno.EROFS, "mounted read-only", False),
        (sqlite3.SQLITE_IOERR_WRITE, errno.EDQUOT, "quota is used up", True),
        (sqlite3.SQLITE_IOERR_SHMSIZE, errno.ENOSPC, "No space left on device", True),
        (sqlite3.SQLITE_CANTOPEN, errno.ENOSPC, "No space left on device", True),
        (sqlite3.SQLITE_CANTOPEN, errno.EMFILE, "ulimit -n", False),
        (sqlite3.SQLITE_CANTOPEN, None, "owner and mode", False),
        (sqlite3.SQLITE_FULL, errno.ENOSPC, "No space left on device", True),
        (sqlite3.SQLITE_FULL, None, "free some space", False),  # a query's temporary files are on another file system
    ],
)
def test_an_sqlite_error_is_full_if_the_disk_is_full(
    directory: Path,
    partial: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    shortage: int | None,
    expected: str,
    full: bool,
) -> None:
    found = None if shortage is None else OSError(shortage, os.strerror(shortage))
    monkeypatch.setattr(space, "find_shortage", lambda *_, **__: found)
    database, calls = Database(directory), []

    def fail() -> None:
        calls.append(1)
        if len(calls) < 3:
            with sqlite_errors(database.path, database.directory):
                raise sqlite_error(code)

    if full:
        database.reserve.run(fail)
    else:
        with pytest.raises(StorageError, match=expected) as caught:
            database.reserve.run(fail)
        assert not is_full(caught.value)
    assert partial.exists() is not full
    assert (directory / "reserve").exists() is not full
    assert expected in str(translate(sqlite_error(code), database.path, database.directory))


def test_a_directory_with_free_space_has_no_shortage(tmp_path: Path) -> None:
    assert space.find_shortage(tmp_path, 1 << 20) is None
    assert os.listdir(tmp_path) == []
    missing = space.find_shortage(tmp_path / "missing", 1)
    assert missing is not None
    assert missing.errno == errno.ENOENT


def test_a_directory_without_room_for_a_name_has_a_shortage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.ENOSPC))  # as btrfs does if there is no space for metadata
    shortage = space.find_shortage(tmp_path, 1)
    assert shortage is not None
    assert (shortage.errno, shortage.filename) == (errno.ENOSPC, str(tmp_path))
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))  # a file system without hard links
    assert space.find_shortage(tmp_path, 1) is None


@pytest.mark.parametrize(
    "work",
    [
        lambda cache, _: cache.release_hold("app:1"),
        lambda cache, _: cache.unpin("app:1"),
        lambda cache, elsewhere: cache.export("app:1", elsewhere),
    ],
    ids=["release", "unpin", "export"],
)
def test_what_lets_a_full_disk_be_freed_uses_the_reserve(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Cache, Path], object]
) -> None:
    save(cache, "app:1", MADE)
    cache.add_hold("app:1")
    cache.pin("app:1")
    write = Database.write
    elsewhere = tmp_path / "app.tar"
    monkeypatch.setattr(Reserve, "_is_beside", lambda *_: False)

    def write_if_there_is_room(database: Database) -> Any:
        if (cache.directory / "reserve").exists():
            raise StorageError("the index failed", errno=errno.ENOSPC)
        return write(database)

    monkeypatch.setattr(Database, "write", write_if_there_is_room)
    work(cache, elsewhere)


@pytest.mark.parametrize("call", ["open", "posix_fallocate"])
def test_without_unnamed_files_the_numbers_of_statvfs_show_a_shortage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def unsupported(*_: object, **__: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    real = os.statvfs(tmp_path)
    numbers = list(real)
    monkeypatch.setattr(os, call, unsupported)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(numbers))
    assert space.find_shortage(tmp_path, 1) is None
    numbers[5], numbers[7] = 100, 0  # f_files, f_favail
    shortage = space.find_shortage(tmp_path, 1)
    assert shortage is not None
    assert shortage.errno == errno.ENOSPC
    assert space.has_no_inodes(tmp_path)
    numbers[5] = 0  # a file system without a table of inodes
    assert space.find_shortage(tmp_path, 1) is None
    assert not space.has_no_inodes(tmp_path)
    numbers[4] = 0  # f_bavail
    assert space.find_shortage(tmp_path, 1) is not None
    numbers[5] = 100
    assert not space.has_no_inodes(tmp_path), "space is missing, not inodes"
    monkeypatch.setattr(space, "file_size_limit", lambda: 10)
    shortage = space.find_shortage(tmp_path, 5, offset=6)
    assert shortage is not None
    assert shortage.errno == errno.EFBIG


# What a cache needs from a file system


def refuse(number: int) -> Callable[..., Any]:
    def refused(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return refused


class Unshared(mmap.mmap):
    """A mapping whose changes other processes do not see."""

    def __new__(cls, file: int, size: int) -> Unshared:
        return super().__new__(cls, file, size, flags=mmap.MAP_PRIVATE)


@pytest.mark.parametrize(
    ("module", "name", "replacement", "expected"),
    [
        (fcntl, "flock", lambda *_: None, r"two processes can hold one lock \(flock\)"),
        (fcntl, "flock", refuse(errno.ENOSYS), r"files cannot be locked \(flock\): Function not implemented"),
        (fcntl, "fcntl", lambda *_: b"", r"two processes can hold one lock \(fcntl\)"),
        (fcntl, "lockf", refuse(errno.ENOLCK), r"files cannot be locked \(fcntl\): No locks available"),
        (mmap, "mmap", refuse(errno.ENODEV), r"processes cannot share memory \(mmap\): No such device"),
        (mmap, "mmap", Unshared, r"processes do not share memory \(mmap\)"),
        (os, "link", refuse(errno.EPERM), "there are no hard links: Operation not permitted"),
        (os, "link", lambda _, new, **__: Path(new).touch(), "a hard link is another file"),
        (os, "rename", refuse(errno.EIO), "files cannot be renamed: Input/output error"),
        (os, "rename", lambda old, new: Path(new).touch(), "a renamed file keeps its old name"),
    ],
)
def test_a_new_cache_is_refused_on_a_file_system_that_lacks_what_it_needs(
    directory: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, replacement: Any, expected: str
) -> None:
    monkeypatch.setattr(module, name, replacement)
    with pytest.raises(StorageError, match=rf" is on [\w.]+, where {expected}: name a directory on a local disk"):
        Cache.open(directory)
    monkeypatch.undo()
    assert os.listdir(directory) == []
    Cache.open(directory).close()


def test_the_file_system_of_an_existing_cache_is_not_tested_again(
    cache: Cache, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_system, "_find_fault", lambda _: "nothing works")
    Cache.open(directory).close()


def test_a_kernel_without_open_file_description_locks_is_accepted(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "fcntl", refuse(errno.EINVAL))
    Cache.open(directory).close()


def test_a_full_disk_is_not_reported_as_an_inability(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refuse(errno.ENOSPC))
    with pytest.raises(StorageError, match="cannot use the cache directory: No space left on device"):
        Cache.open(directory)


def test_a_real_file_system_without_hard_links_is_refused(tmp_path: Path) -> None:
    file = image(tmp_path / "image", 8 << 20, "mkfs.vfat", install="dosfstools")
    with mounted(tmp_path / "disk", "-t", "vfat", "-o", "loop", file) as disk:
        with pytest.raises(StorageError, match="is on vfat, where there are no hard links"):
            Cache.open(disk / "cache")
        assert os.listdir(disk / "cache") == []
