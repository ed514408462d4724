"""Only files that provably belong to the cache are deleted or changed, even if a link replaces one of its folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from cachedb import Cache, CacheError, CacheReplaced, NotACache, NotOurs, SchemaMismatch, StorageError, schema
from cachedb.disk import folders, marker
from cachedb.disk.folders import Folders, apply_folder_mode
from cachedb.index.sqlite import backups
from cachedb.index.sqlite.database import Database
from cachedb.operations import upgrade
from tests.conftest import Run, files_of, run_python, stored_rows
from tests.index.sqlite.test_database import content
from tests.support.make import digest_of, hex_of, image, save
from tests.support.mounting import mounted

APP = image(1, 2)


def run_successfully(cachedb: Run, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = cachedb(*arguments)
    assert done.returncode == 0, done.stderr
    return done


def run_failing(cachedb: Run, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = cachedb(*arguments)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) <= 1, "the error has several lines"
    return done


OTHER_USER = 65534
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root to become other users")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Make a user's folder whose names have every form that cachedb deletes in its own folders."""
    folder = tmp_path / "elsewhere"
    names = (
        "thesis.txt",
        f"sha256-{'a' * 64}",
        "1-abcdefabcdef/1",
        f"1-abcdefabcdef/2.sha256-{'b' * 64}",
        "1-abcdefabcdef.session",
        f"{'c' * 64}.producing",
        f"partial/sha256-{'d' * 64}",
        ".backup-abcdefgh",
        "000001-0004-before-0005.db",
        "sha256/" + "e" * 64,
    )
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
        os.utime(folder / name, (0, 0))
    return folder


FOLDERS = ("blobs", "blobs/sha256", "ingest", "trash", "locks", "backups")


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_a_link_is_refused_and_its_target_unchanged(
    cachedb: Run, directory: Path, elsewhere: Path, name: str
) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    shutil.rmtree(directory / name)
    (directory / name).symlink_to(elsewhere)
    before = content(elsewhere)
    for arguments in (["ls"], ["gc"], ["verify", "--repair"], ["rm", "app:1"], ["db", "backup"]):
        done = run_failing(cachedb, *arguments)
        assert f"'{directory / name}' is a symbolic link: put a folder back in its place" in done.stderr, arguments
    assert content(elsewhere) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_that_replaces_a_folder_of_an_open_cache_is_not_followed(
    directory: Path, elsewhere: Path, name: str
) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
        cache.add_blob(b"garbage")
        cache._session.close()
        shutil.rmtree(directory / name)
        (directory / name).symlink_to(elsewhere)
        for file in ("write.lock", "write.queue", ".lock"):
            (elsewhere / file).write_text("of another program")
        before = content(elsewhere)
        for operation in (
            lambda: cache.remove_manifest("app:1"),
            lambda: schema.back_up(directory),
            cache.collect_garbage,
            lambda: cache.verify(repair=True),
            lambda: cache.cache_from_tar("/nonexistent"),
        ):
            with suppress(CacheError):
                operation()
    assert content(elsewhere) == before


def test_a_session_folder_that_is_a_link_is_not_followed(directory: Path, elsewhere: Path) -> None:
    Cache.open(directory).close()
    link = directory / "ingest" / "1-00000000dead"
    link.symlink_to(elsewhere)
    before = content(elsewhere)
    with Cache.open(directory) as cache:
        cache.collect_garbage()
        assert [(leftover.path, "is a symbolic link" in leftover.reason) for leftover in cache.get_leftovers()] == [
            (link, True)
        ]
    assert content(elsewhere) == before


def test_a_folder_of_partial_downloads_that_is_a_link_is_not_followed(directory: Path, elsewhere: Path) -> None:
    Cache.open(directory).close()
    (directory / "ingest" / "partial").symlink_to(elsewhere)
    before = content(elsewhere)
    with Cache.open(directory) as cache, pytest.raises(NotOurs, match="is a symbolic link"):
        cache.collect_garbage()
    assert content(elsewhere) == before


@pytest.mark.parametrize("name", ["trash", "index.db-wal"])
def test_a_link_in_the_folder_of_a_new_index_is_not_followed(directory: Path, elsewhere: Path, name: str) -> None:
    """A session makes a new index in a folder inside its own."""
    Cache.open(directory).close()
    inner = directory / "ingest" / "1-00000000dead" / "3"
    inner.mkdir(parents=True)
    (inner / "index.db").touch()
    (inner / name).symlink_to(elsewhere)
    before = content(elsewhere)
    Cache.open(directory).close()
    assert set(os.listdir(inner)) == {"index.db", name}
    assert content(elsewhere) == before


def test_the_next_open_removes_the_new_index_of_a_killed_process(directory: Path) -> None:
    Cache.open(directory).close()
    inner = directory / "ingest" / "1-00000000dead" / "3"
    with closing(Database(inner)) as new:
        upgrade.prepare(new)
        with new.write():
            shutil.copytree(inner, inner.with_name("4"))
    for name in ("5", "6"):  # of a process killed at the beginning
        inner.with_name(name).mkdir()
    inner.with_name("6").joinpath("blobs").mkdir()
    with Cache.open(directory) as cache:
        assert cache.get_leftovers() == []
    assert not inner.parent.exists()


@pytest.mark.parametrize(
    "name", ["1/docs/thesis.txt", "1/thesis.txt", "1/index.db/thesis.txt", "1/blobs/sha256/thesis.txt", "1/trash/x/y"]
)
def test_a_folder_in_a_session_folder_that_is_no_new_index_is_kept(directory: Path, name: str) -> None:
    Cache.open(directory).close()
    session = directory / "ingest" / "123-aaaaaaaaaaaa"
    (session / name).parent.mkdir(parents=True)
    (session / name).write_text("thesis")
    (session / "1" / "cachedb.json").write_text("{}")
    (session / "2").write_text("a partial blob")
    Cache.open(directory).close()
    assert (session / name).read_text() == "thesis"
    assert (session / "1" / "cachedb.json").exists()
    assert not (session / "2").exists()
    with Cache.open(directory) as cache:
        assert [leftover.path for leftover in cache.get_leftovers()] == [session]
        (problem,) = cache.verify().problems
        assert (problem.kind, problem.path) == ("orphan", session)


@NEEDS_ROOT
@pytest.mark.parametrize("place", ["2", "2/blobs"])
def test_another_file_system_in_a_session_folder_is_kept(directory: Path, tmp_path: Path, place: str) -> None:
    Cache.open(directory).close()
    disk, inner = tmp_path / "disk", directory / "ingest" / "123-aaaaaaaaaaaa" / place
    disk.mkdir()
    inner.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inner], check=True)
    try:
        (inner / "index.db").touch()
        (inner / "sha256").mkdir()
        Cache.open(directory).close()
        assert sorted(os.listdir(inner)) == ["index.db", "sha256"]
    finally:
        subprocess.run(["umount", "-l", inner], check=True)


def test_no_backup_is_made_behind_a_link(directory: Path, index: Database, elsewhere: Path) -> None:
    shutil.rmtree(directory / "backups")
    (directory / "backups").symlink_to(elsewhere)
    before = content(elsewhere)
    with pytest.raises(NotOurs, match="is a symbolic link"):
        backups.back_up(index, "mine")
    assert content(elsewhere) == before


@NEEDS_ROOT
def test_a_restore_takes_no_files_behind_a_link_for_blobs(directory: Path, elsewhere: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    backup = schema.back_up(directory)
    rows = stored_rows(directory)
    shutil.move(directory / "blobs", directory.parent / "moved")
    (elsewhere / "sha256").mkdir(exist_ok=True)
    (elsewhere / "sha256" / hex_of(b"mine")).write_bytes(b"mine")
    (directory / "blobs").symlink_to(elsewhere)
    with pytest.raises(NotOurs, match="is a symbolic link"):
        schema.restore(directory, backup)
    assert stored_rows(directory) == rows


def test_a_folder_on_another_file_system_is_refused(directory: Path) -> None:
    Cache.open(directory).close()
    with mounted(directory / "trash", "-t", "tmpfs", "tmpfs") as trash:
        (trash / f"sha256-{'a' * 64}").touch()
        with pytest.raises(NotOurs, match="trash' is on another file system"):
            Cache.open(directory)
        assert os.listdir(trash) == [f"sha256-{'a' * 64}"]


@pytest.fixture
def content_store(tmp_path: Path) -> Path:
    """Make a content store of containerd."""
    store = tmp_path / "io.containerd.content.v1.content"
    for path, data in {f"blobs/sha256/{digest_of(b'layer')[7:]}": b"layer", "ingest/ab12/data": b"partial"}.items():
        (store / path).parent.mkdir(parents=True, exist_ok=True)
        (store / path).write_bytes(data)
    return store


def test_a_content_store_of_another_program_is_refused_and_unchanged(cachedb: Run, content_store: Path) -> None:
    before = content(content_store)
    for arguments in (["ls"], ["verify", "--repair"], ["gc"], ["db", "upgrade"], ["import", "examples/hello.oci.tar"]):
        done = cachedb("--dir", content_store, *arguments)
        assert done.returncode in (1, 3), arguments
        assert "Traceback" not in done.stderr
        assert content(content_store) == before, arguments
    with pytest.raises(NotACache, match=r"has no 'cachedb.json' and is not empty \(it holds 'blobs'\)"):
        Cache.open(content_store)


def test_adopt_moves_nothing_out_of_a_content_store(content_store: Path, cache: Cache) -> None:
    before = content(content_store)
    with pytest.raises(NotACache, match="adopt it without --move"):
        cache.adopt(content_store, how="move")
    assert content(content_store) == before


def test_adopt_refuses_to_move_blobs_through_a_link(cache: Cache, content_store: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "manifests" / "app").mkdir(parents=True)
    (old / "manifests" / "app" / "1").write_bytes(APP.manifest)
    (old / "blobs").symlink_to(content_store / "blobs")
    before = content(content_store)
    with pytest.raises(NotOurs, match="old/blobs' is a symbolic link"):
        cache.adopt(old, how="move")
    assert content(content_store) == before


# The marker


def test_the_marker_is_synced_before_any_folder_is_made(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "link", "mkdir")}

    def note_calls(name: str) -> None:
        def replacement(first: object, *arguments: object, **options: object) -> object:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            happened.append(f"{name} {Path(path).name.split('-')[0]}")
            return real[name](first, *arguments, **options)

        monkeypatch.setattr(os, name, replacement)

    for name in real:
        note_calls(name)
    Cache.open(directory).close()
    made = [step for step in happened if not step.startswith("mkdir cache")]
    assert made[made.index("fsync .cachedb") :][:3] == ["fsync .cachedb", "link .cachedb", "fsync cache"]
    assert made.index("fsync .cachedb") < made.index("mkdir blobs")


def test_a_marker_has_a_format_and_an_id_and_the_next_open_keeps_it(directory: Path) -> None:
    Cache.open(directory).close()
    first = json.loads((directory / "cachedb.json").read_text())
    assert first["format"] == 1
    assert len(first["id"]) == 32
    assert stat.S_IMODE((directory / "cachedb.json").stat().st_mode) == 0o600
    Cache.open(directory).close()
    assert json.loads((directory / "cachedb.json").read_text()) == first
    Cache.open(directory.with_name("other")).close()
    assert json.loads((directory.with_name("other") / "cachedb.json").read_text())["id"] != first["id"]


def test_a_cache_of_an_older_release_gets_a_marker_at_its_next_open(cachedb: Run, directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    (directory / "cachedb.json").unlink()
    assert run_successfully(cachedb, "ls", "-q").stdout == "app:1\n"
    assert (directory / "cachedb.json").exists()


@pytest.mark.slow
def test_a_cache_without_marker_and_index_is_recognized_by_a_backup(cachedb: Run, directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    run_successfully(cachedb, "db", "backup")
    (directory / "cachedb.json").unlink()
    (directory / "index.db").unlink()
    run_failing(cachedb, "verify", "--repair")
    assert run_successfully(cachedb, "ls", "-q").stdout == "app:1\n"


def test_a_cache_without_marker_index_and_backup_is_left_unchanged(cachedb: Run, directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    (directory / "cachedb.json").unlink()
    (directory / "index.db").unlink()
    (directory / "trash" / f"sha256-{'a' * 64}").touch()
    before = content(directory)
    for arguments in (["ls"], ["verify", "--repair"], ["gc"]):
        assert "name another directory" in run_failing(cachedb, *arguments).stderr
    assert content(directory) == before


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 1}', '{"format": "1", "id": ""}', "\0" * 99])
def test_an_invalid_marker_is_refused(directory: Path, text: str) -> None:
    Cache.open(directory).close()
    (directory / "cachedb.json").write_text(text)
    with pytest.raises(NotACache, match=r"'cachedb.json' is not a marker of cachedb: delete it"):
        Cache.open(directory)


def test_a_marker_of_a_newer_release_is_refused(directory: Path) -> None:
    Cache.open(directory).close()
    (directory / "cachedb.json").write_text(json.dumps({"format": 2, "id": "0" * 32}))
    with pytest.raises(SchemaMismatch, match="use a newer release"):
        Cache.open(directory)


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_a_marker_that_is_no_regular_file_is_refused(directory: Path, elsewhere: Path, kind: str) -> None:
    Cache.open(directory).close()
    path = directory / "cachedb.json"
    path.unlink()
    make: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(elsewhere / "thesis.txt"),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }
    make[kind]()
    what = "cannot be opened: it is a symbolic link: put" if kind == "link" else "is not a marker of cachedb: delete"
    with pytest.raises(NotACache, match=f"^'cachedb.json' .*{what}"):
        Cache.open(directory)


def test_a_marker_that_only_its_owner_can_read_is_an_error_with_advice(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache.open(directory).close()
    open_file = os.open

    def refuse(path: object, *arguments: object, **options: object) -> int:
        if os.path.basename(str(path)) == "cachedb.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return open_file(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(NotACache, match=r"denied: its owner can run `chmod -R a\+rX` on the directory, or `"):
        Cache.open(directory)


def test_a_cache_can_be_made_beside_an_unfinished_marker(directory: Path) -> None:
    directory.mkdir()
    (directory / f".cachedb-{'0' * 16}.marker").touch()
    (directory / "lost+found").mkdir()
    Cache.open(directory).close()
    assert (directory / "cachedb.json").exists()


def test_threads_that_make_one_cache_agree_on_its_id(directory: Path) -> None:
    directory.mkdir()
    found: list[marker.Marker] = []
    start = threading.Barrier(8)

    def write() -> None:
        folders = Folders(directory)
        start.wait()
        found.append(marker.write(folders.root, lambda file: None))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert os.listdir(directory) == ["cachedb.json"]


# Foreign files in the folders of a cache


@pytest.mark.slow
def test_foreign_files_are_kept_and_verify_names_them(cachedb: Run, directory: Path) -> None:
    strange = [
        "ingest/notes.txt",
        "ingest/1-aa/1",
        "ingest/partial/readme",
        "ingest/partial/sha256-abc",
        "trash/x/deep",
        "trash/file",
        f"trash/sha256:{'a' * 64}",
        "locks/x.session/1",
        "locks/film.session",
        "locks/y.producing",
        "locks/other.lock",
        "backups/.backup-of-my-own",
        "backups/9-before-the-move.db",
    ]
    Cache.open(directory).close()
    for name in strange:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("mine")
        os.utime(directory / name, (0, 0))
    with Cache.open(directory) as cache:
        cache.collect_garbage()
        for _ in range(5):
            run_successfully(cachedb, "db", "backup")
        named = {
            str(problem.path.relative_to(directory)) for problem in cache.verify(repair=True).problems if problem.path
        }
    assert all((directory / name).read_text() == "mine" for name in strange)
    assert named == {
        "ingest/notes.txt",
        "ingest/1-aa",
        "ingest/partial/readme",
        "ingest/partial/sha256-abc",
        "trash/x",
        "trash/file",
        f"trash/sha256:{'a' * 64}",
        "locks/x.session",
        "locks/film.session",
        "locks/y.producing",
        "locks/other.lock",
    }


@pytest.fixture
def immovable(directory: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that makes a file in the cache that even root cannot remove."""
    made: list[Path] = []

    def make(name: str) -> Path:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode:
            pytest.skip("needs root and a file system with chattr +i, such as ext4")
        made.append(path)
        return path

    yield make
    for path in made:
        subprocess.run(["chattr", "-i", path], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        f"trash/sha256-{'a' * 64}",
        f"ingest/1-00000000dead/1.sha256-{'b' * 64}",
        "ingest/1-00000000dead/1",
        f"locks/{'c' * 64}.producing",
        "locks/1-00000000dead.session",
    ],
)
def test_every_command_works_while_a_leftover_cannot_be_removed(
    cachedb: Run, directory: Path, tmp_path: Path, immovable: Callable[[str], Path], name: str
) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    path = immovable(name)
    run_successfully(cachedb, "ls", "-q")
    run_successfully(cachedb, "exists", "app:1")
    run_successfully(cachedb, "export", "app:1", tmp_path / "app.tar")
    run_successfully(cachedb, "tag", "app:1", "app:2")
    run_successfully(cachedb, "rm", "app:2")
    with Cache.open(directory) as cache:
        (leftover,) = cache.get_leftovers()
        assert leftover.path == path or leftover.path in path.parents
        assert "Operation not permitted" in leftover.reason
        assert [problem.path for problem in cache.verify().problems] == [leftover.path]
    assert json.loads(run_successfully(cachedb, "df", "--format", "json").stdout)["leftovers"][0]["reason"]
    shown = run_successfully(cachedb, "df")
    assert "cannot be cleaned up" in shown.stdout
    assert "see `cachedb verify`" in shown.stderr


# Another user's directory


@pytest.mark.slow
@NEEDS_ROOT
def test_another_users_directory_is_refused_unless_it_is_trusted(cachedb: Run) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        directory = Path(folder) / "cache"
        with Cache.open(directory) as cache:
            save(cache, "app:1", APP)
        for path in (directory, *directory.rglob("*")):
            os.chown(path, OTHER_USER, OTHER_USER)
        before = content(directory)
        with pytest.raises(NotOurs, match=r"belongs to user .*\(uid 65534\): share it with .*, or pass --trust"):
            Cache.open(directory)
        assert content(directory) == before
        assert "pass --trust" in run_failing(cachedb, "--dir", directory, "ls").stderr
        assert run_successfully(cachedb, "--dir", directory, "--trust", "ls", "-q").stdout == "app:1\n"
        with Cache.open(directory, trust=True) as cache:
            save(cache, "app:2", image(3))
            with cache.hold("app:2"):
                owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in directory.rglob("*")}
        assert owners == {(OTHER_USER, OTHER_USER)}, "root made a file of its own"


@NEEDS_ROOT
def test_a_folder_of_another_user_is_refused(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
    os.chown(directory / "trash", OTHER_USER, OTHER_USER)
    (directory / "trash" / f"sha256-{'a' * 64}").touch()
    with pytest.raises(NotOurs, match=r"trash' belongs to user .*65534.*give it back to its owner"):
        Cache.open(directory)
    assert os.listdir(directory / "trash") == [f"sha256-{'a' * 64}"]


@NEEDS_ROOT
def test_a_file_that_was_made_in_another_folder_gets_the_group_of_a_shared_one(tmp_path: Path) -> None:
    folder, file = tmp_path / "shared", tmp_path / "file"
    folder.mkdir()
    os.chown(folder, 0, OTHER_USER)
    folder.chmod(0o2770)
    file.touch(0o600)
    with file.open() as opened:
        apply_folder_mode(opened.fileno(), folder.stat())
    assert (file.stat().st_uid, file.stat().st_gid, stat.S_IMODE(file.stat().st_mode)) == (0, OTHER_USER, 0o660)


# A cache that changes under a live process


def test_a_cache_that_was_moved_is_reported_as_replaced(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
        directory.rename(directory.with_name("moved"))
        for call in (
            cache.list_manifests,
            lambda: cache.tag("app:1", "app:2"),
            lambda: cache.has_blob(digest_of(b"")),
            cache.collect_garbage,
        ):
            with pytest.raises(CacheReplaced, match="was moved, removed or replaced while it was open"):
                call()
        assert not directory.exists()
        directory.with_name("moved").rename(directory)
        assert [str(image.name) for image in cache.list_manifests()] == ["app:1"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["directory", "content"])
def test_nothing_is_written_to_a_cache_that_replaced_the_open_one(cachedb: Run, directory: Path, how: str) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app:1", APP)
        if how == "directory":
            shutil.rmtree(directory)
        else:
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        run_python(
            """
            import sys
            from cachedb import Cache
            from tests.support.make import image, save
            with Cache.open(sys.argv[1]) as cache:
                save(cache, "app:1", image(1, 2))
            """,
            directory,
        )
        before = files_of(directory)
        for call in (
            lambda: cache.tag("app:1", "app:2"),
            lambda: cache.remove_manifest("app:1"),
            lambda: cache.hold("app:1").__enter__(),
        ):
            with pytest.raises(CacheReplaced):
                call()
        with pytest.raises(StorageError):
            cache.add_blob(b"new")
        assert files_of(directory) == before
    assert run_successfully(cachedb, "ls", "-q").stdout == "app:1\n"


def test_a_hold_whose_session_lost_its_lock_file_raises(cache: Cache) -> None:
    save(cache, "app:1", APP)
    held = cache.hold("app:1")
    held.__enter__()
    for path in (cache.directory / "locks").glob("*.session"):
        path.unlink()
    with pytest.raises(CacheReplaced, match="its lock file was removed or renamed"):
        held.__exit__(None, None, None)
    with pytest.raises(CacheReplaced, match="open the cache again"), cache.hold("app:1"):
        pass


def test_a_write_whose_lock_file_was_removed_is_rolled_back(cache: Cache, index: Database) -> None:
    save(cache, "app:1", APP)

    def lose_the_lock() -> None:
        with index.write() as connection:
            connection.exec_driver_sql("DELETE FROM images")
            (cache.directory / "locks" / "write.lock").unlink()

    with pytest.raises(
        CacheReplaced, match=r"write.lock' was removed or renamed while it was locked; nothing was written"
    ):
        lose_the_lock()
    assert [str(image.name) for image in cache.list_manifests()] == ["app:1"]
    cache.tag("app:1", "app:2")


@pytest.mark.parametrize("is_reused", [False, True])
def test_a_descriptor_that_the_program_has_closed_is_an_error_and_is_not_closed_again(
    cache: Cache, tmp_path: Path, is_reused: bool
) -> None:
    """A daemon may close all descriptors that it inherits."""
    save(cache, "app:1", APP)
    folders = cache._database.folders
    root = folders.root
    os.close(root)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT) if is_reused else None
    assert other in (None, root)
    with pytest.raises(CacheError, match=r"cannot use the cache directory: (Bad file descriptor|Not a directory)"):
        cache.tag("app:1", "app:2")
    cache.close()
    del folders
    if other is not None:
        assert os.fstat(other).st_ino == (tmp_path / "other").stat().st_ino
        os.close(other)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL])
def test_root_without_permission_can_make_files_in_a_shared_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """In a rootless container, root cannot give a file to the owner of the cache."""

    def fchown(_file: int, _user: int, _group: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fchown", fchown)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with (tmp_path / "file").open("wb") as file:
        folders.give_to_folder_owner(file.fileno(), os.stat_result((0o42770, 1, 1, 2, 1001, 1500, 0, 0, 0, 0)))
        with pytest.raises(OSError, match=os.strerror(number)):
            folders.give_to_folder_owner(file.fileno(), os.stat_result((0o40700, 1, 1, 2, 1001, 1500, 0, 0, 0, 0)))
