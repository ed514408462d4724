"""Atomic files: they appear when they are complete; the next writer removes what a killed one left."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache
from cachedb.disk.durable import atomic_file, clone_content, copy_to_new, part_path, remove_leftovers
from cachedb.operations import upgrade
from cachedb.transports.archive.formats import Format
from tests.conftest import Run, start_python
from tests.support import make


@pytest.fixture
def filled(cache: Cache) -> Cache:
    make.save(cache, "app:1", make.image(1, size=300_000))
    return cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


_DISABLE_UNNAMED_FILES = """
import errno, os
real = os.open
def named(path, flags, *arguments, **options):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(errno.EOPNOTSUPP, "not supported")
    return real(path, flags, *arguments, **options)
os.open = named
"""


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make O_TMPFILE fail, as on a file system without unnamed files."""
    real = os.open

    def open_(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)


def start_export(cache: Cache, target: Path, form: Format, *, named: bool) -> subprocess.Popen[str]:
    """Start an export that waits at its first progress until it reads a line."""
    process = start_python(
        (_DISABLE_UNNAMED_FILES if named else "")
        + """
import sys
from cachedb import Cache
waited = []
def wait(*_):
    if not waited:
        waited.append(1)
        print("begun", flush=True)
        sys.stdin.readline()
with Cache.open(sys.argv[1]) as cache:
    cache.export("app:1", sys.argv[2], format=sys.argv[3], progress=wait)
""",
        cache.directory,
        target,
        form,
    )
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    return process


def has_unnamed_files(folder: Path) -> bool:
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR))
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_where_files_need_no_name(filled: Cache, folder: Path) -> None:
    if not has_unnamed_files(folder):
        pytest.skip("needs a file system with O_TMPFILE")
    with start_export(filled, folder / "out.tar", "docker", named=False) as process:
        assert os.listdir(folder) == []
        process.kill()
    assert os.listdir(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", ["docker", "oci-dir"])
def test_an_export_removes_files_of_killed_exports_and_keeps_those_of_live_ones(
    filled: Cache, folder: Path, form: Format
) -> None:
    target = folder / "layout" if form == "oci-dir" else folder / "out.tar"
    with start_export(filled, target, form, named=True) as process:
        process.kill()
    left = list(folder.rglob("*.part"))
    assert len(left) in ((1,) if form == "docker" else (1, 2)), "two files of a folder are written at once"
    if form == "oci-dir":
        filled.export("app:1", target, format=form)
    else:
        with start_export(filled, folder / "live.tar", form, named=True) as process:
            (live,) = set(folder.rglob("*.part")) - set(left)
            filled.export("app:1", target, format=form)
            assert list(folder.rglob("*.part")) == [live]
            process.communicate("\n", timeout=60)
            assert process.returncode == 0
        assert (folder / "live.tar").read_bytes() == target.read_bytes()
    assert list(folder.rglob("*.part")) == []


@pytest.mark.slow
def test_exporting_a_layout_keeps_the_file_of_a_live_export_inside_it(filled: Cache, folder: Path) -> None:
    filled.export("app:1", folder / "layout", format="oci-dir")
    with start_export(filled, folder / "layout" / "out.tar", "docker", named=True) as process:
        filled.export("app:1", folder / "layout", format="oci-dir")
        process.communicate("\n", timeout=60)
        assert process.returncode == 0


def test_only_files_that_are_provably_ours_are_removed(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("kept")
    (folder / ".cachedb-0123456789abcdef.part").touch()  # an earlier release did not lock its files
    (folder / ".cachedb-.part").touch()
    (folder / f"{part_path(folder).name}.bak").touch()
    part_path(folder).mkdir()
    part_path(folder).symlink_to(target)
    os.mkfifo(part_path(folder))
    locked = part_path(folder)
    locked.touch()
    before = set(os.listdir(folder))
    ours = part_path(folder)
    ours.touch()
    with locked.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        remove_leftovers(folder)
        assert set(os.listdir(folder)) == before
    remove_leftovers(folder)
    assert set(os.listdir(folder)) == before - {locked.name}
    assert target.read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a file of another user")
def test_files_of_other_users_are_kept(folder: Path) -> None:
    part = part_path(folder)
    part.touch()
    os.chown(part, 65534, 65534)
    remove_leftovers(folder)
    assert part.exists()


def test_a_file_that_was_removed_before_it_was_locked_is_made_again(
    folder: Path, named: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = fcntl.flock, list[str]()

    def flock(file: int, how: int) -> None:
        if not removed:
            removed.extend(os.listdir(folder))
            os.unlink(folder / removed[0])
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic_file(folder / "file") as file:
        file.write(b"whole")
    assert removed
    assert (folder / "file").read_bytes() == b"whole"


def test_an_unnamed_file_that_cannot_be_linked_is_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.ENOENT, "no such file")

    monkeypatch.setattr(os, "link", link)
    with atomic_file(folder / "file") as file:
        file.write(b"whole")
    assert (folder / "file").read_bytes() == b"whole"
    assert os.listdir(folder) == ["file"]


@pytest.mark.parametrize("kind", ["named", "unnamed"])
def test_a_failed_write_leaves_the_file_unchanged(folder: Path, kind: Format, request: pytest.FixtureRequest) -> None:
    if kind == "named":  # type: ignore[comparison-overlap]
        request.getfixturevalue("named")
    (folder / "file").write_text("before")

    def write_half() -> None:
        with atomic_file(folder / "file") as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert (folder / "file").read_text() == "before"
    assert os.listdir(folder) == ["file"]
    with atomic_file(folder / "file") as file:
        file.write(b"after")
    assert (folder / "file").read_text() == "after"
    assert os.listdir(folder) == ["file"]


def test_the_umask_sets_the_mode_of_a_file(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(folder / "file"):
            pass
    finally:
        os.umask(before)
    assert (folder / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.slow
def test_a_report_removes_files_of_killed_reports(filled: Cache, folder: Path, cachedb: Run) -> None:
    part_path(folder).touch()
    (folder / "page.html").touch(mode=0o600)
    (folder / "page.html").chmod(0o604)
    assert cachedb("report", "--html", folder / "page.html").returncode == 0
    assert os.listdir(folder) == ["page.html"]
    assert (folder / "page.html").stat().st_mode & 0o777 == 0o604
    assert "app" in (folder / "page.html").read_text()


@pytest.mark.slow
def test_the_next_backup_removes_what_a_killed_backup_left_in_another_folder(filled: Cache, folder: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from cachedb.index.sqlite import backups
        from cachedb.operations import upgrade
        backups._OPCODES = 10
        def wait(*_):
            print("begun", flush=True)
            sys.stdin.readline()
        upgrade.back_up(Path(sys.argv[1]), Path(sys.argv[2]), progress=wait)
    """
    with start_python(script, filled.directory, folder / "first.db") as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        (live,) = [name for name in os.listdir(folder) if not name.endswith("-journal")]
        upgrade.back_up(filled.directory, folder / "second.db")
        assert live in os.listdir(folder), "the file of a live backup was removed"
        process.kill()
    (folder / f"{live}-journal").touch()
    (folder / ".backup-of-somebody").touch()
    upgrade.back_up(filled.directory, folder / "third.db")
    assert set(os.listdir(folder)) == {"second.db", "third.db", ".backup-of-somebody"}


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link"])
def test_a_copy_of_a_file_is_a_new_file(tmp_path: Path, kind: str) -> None:
    precious, name = tmp_path / "precious", tmp_path / "copy"
    precious.write_bytes(b"mine")
    if kind == "hard link":
        name.hardlink_to(precious)
    else:
        name.symlink_to(precious if kind == "link" else tmp_path / "new")
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileExistsError):
            copy_to_new(io.BytesIO(b"data"), name.name, folder)
        name.unlink()
        copy_to_new(io.BytesIO(b"data"), name.name, folder)
    finally:
        os.close(folder)
    assert (precious.read_bytes(), name.read_bytes()) == (b"mine", b"data")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("error", "raises"),
    [
        (OSError(errno.EXDEV, "another file system"), False),
        (OSError(errno.EOPNOTSUPP, "no reflinks"), False),
        (OSError(errno.ENOSPC, "full disk"), True),
        (TimeoutError("by a signal handler"), True),
    ],
)
def test_content_is_cloned_or_not_but_errors_of_the_disk_and_the_caller_are_raised(
    monkeypatch: pytest.MonkeyPatch, error: OSError, raises: bool
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(fcntl, "ioctl", fail)
    if raises:
        with pytest.raises(type(error), match=str(error.args[-1])):
            clone_content(-1, -1)
    else:
        assert not clone_content(-1, -1)
