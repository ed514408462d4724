"""Hosts with limits: shared or read-only file systems, too few descriptors, full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cachedb import Cache, StorageError
from cachedb.disk import file_system
from cachedb.disk.layout import partial_path
from cachedb.errors import os_errors
from cachedb.index import drift, images
from cachedb.index.sqlite.database import Database
from cachedb.index.tables import REVISION
from cachedb.oci.digests import Digest
from cachedb.oci.manifests import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from cachedb.operations import upgrade
from tests.conftest import Run, run_python
from tests.disk.test_locks import count_open_files
from tests.index.sqlite.test_database import content
from tests.support import make
from tests.support.make import save
from tests.support.promises import check
from tests.support.registries import Registry

MADE = make.image(1, 2)

# File systems

LOCAL = ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs", "fuse.fuse-overlayfs", "fuseblk"]
SHARED = ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "fuse.glusterfs", "lustre"]
SHARED += ["virtiofs", "fakeowner", "drvfs", "fuse.osxfs", "fuse.grpcfuse", "wekafs", "panfs", "fuse.seaweedfs"]
SHARED += ["fuse.blobfuse", "fuse.blobfuse2", "fuse.mountpoint-s3", "fuse.geesefs", "fuse.alluxio-fuse", "fuse.cvmfs2"]


@pytest.fixture
def mount_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that fakes the table of mounts; it takes pairs of a mount point and a type."""

    def fake_mounts(*mounts: tuple[object, str]) -> None:
        pairs = [(str(point).replace(" ", "\\040"), kind) for point, kind in mounts]
        lines = [f"{n} 1 0:{n} / {point} rw shared:1 - {kind} dev rw" for n, (point, kind) in enumerate(pairs)]
        (tmp_path / "mountinfo").write_text("\n".join(lines) + "\nnonsense\n1 2 - x\n")

    monkeypatch.setattr(file_system, "_MOUNTS", tmp_path / "mountinfo")
    return fake_mounts


@pytest.mark.parametrize("kind", SHARED)
def test_a_file_system_shared_by_hosts_is_refused_before_anything_is_made(
    mount_table: Callable[..., None], tmp_path: Path, kind: str
) -> None:
    mount_table(("/", "ext4"), (tmp_path / "share", kind))
    with pytest.raises(StorageError, match=rf"is on {kind}, which other hosts may mount too, .*on a local disk"):
        Cache.open(tmp_path / "share" / "deep" / "cache")
    assert not (tmp_path / "share").exists()


@pytest.mark.parametrize(
    ("source", "kind"), [("mountpoint-s3", "fuse.mountpoint-s3"), ("mfs#master:9421", "fuse.mfs"), ("/dev/fuse", None)]
)
def test_a_fuse_file_system_without_a_subtype_is_recognized_by_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, kind: str | None
) -> None:
    point = str(tmp_path).replace(" ", "\\040")
    (tmp_path / "mountinfo").write_text(f"52 35 0:30 / {point} rw,nosuid - fuse {source} rw,user_id=0\n")
    monkeypatch.setattr(file_system, "_MOUNTS", tmp_path / "mountinfo")
    assert file_system.find_file_system_type(tmp_path) == (kind or "fuse")
    if kind:
        with pytest.raises(StorageError, match=f"is on {kind}, which other hosts may mount too"):
            Cache.open(tmp_path / "cache")
    else:
        Cache.open(tmp_path / "cache").close()


@pytest.mark.parametrize("kind", LOCAL)
def test_a_local_file_system_is_accepted(mount_table: Callable[..., None], tmp_path: Path, kind: str) -> None:
    mount_table(("/", "nfs"), (tmp_path, kind))
    Cache.open(tmp_path / "cache").close()


def test_without_a_table_of_mounts_every_file_system_is_accepted(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_system, "_MOUNTS", tmp_path / "nothing")
    assert file_system.find_file_system_type(directory) is None
    Cache.open(directory).close()


def test_the_innermost_and_latest_mount_counts(mount_table: Callable[..., None], tmp_path: Path) -> None:
    spaced = tmp_path / "with space"
    mount_table(
        ("/", "root"), (tmp_path, "outer"), (f"{tmp_path}/a", "under"), (f"{tmp_path}/a", "over"), (spaced, "s")
    )
    found = {
        name: file_system.find_file_system_type(tmp_path / name)
        for name in ("a", "a/b", "ab", ".", "..", "with space/x")
    }
    assert found == {"a": "over", "a/b": "over", "ab": "outer", ".": "outer", "..": "root", "with space/x": "s"}
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert file_system.find_file_system_type(tmp_path / "link" / "x") == "over", "a link must be followed"


@pytest.mark.skipif(not shutil.which("findmnt"), reason="findmnt is not installed: apt-get install util-linux")
@pytest.mark.parametrize("path", ["/", "/proc", "/dev", "/tmp"])
def test_the_type_of_a_real_mount_is_that_of_findmnt(path: str) -> None:
    output = subprocess.run(["findmnt", "-no", "FSTYPE", "-T", path], capture_output=True, text=True, check=True).stdout
    assert file_system.find_file_system_type(Path(path)) == output.split()[-1]


# Read-only


def mount(*arguments: object) -> None:
    """Run mount(8); skip the test if it fails."""
    if subprocess.run(["mount", *map(str, arguments)], check=False, capture_output=True).returncode:
        pytest.skip("cannot mount file systems: run as root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", path)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def durable_files(path: Path) -> dict[str, bytes | None]:
    """Return the content of the cache directory, without the shared memory of processes."""
    return {name: data for name, data in content(path).items() if not name.endswith("-shm")}


def check_read_only(cachedb: Run, path: Path, tmp_path: Path, *, blobs: int = 5) -> None:
    """Assert that reading works, that writing raises an error, and that no file changes."""
    archive = make.write(tmp_path / "new.tar", make.oci_files({"new:1": make.image(9)}))
    before = durable_files(path)
    with Cache.open(path) as cache:
        assert cache.is_image_complete("app:1")
        assert cache.get_manifest("app:1") == MADE.manifest
        assert cache.get_stats().blob_count == blobs
        assert cache.get_image("app:1").size == sum(map(len, MADE.blobs.values()))
        assert all(cache.get_blob(digest) == data for digest, data in MADE.blobs.items())
        assert cache.verify().problems == []
        assert cache.list_holds() == []
        with cache.hold("app:1"), cache.producing("app:1") as image:
            assert image is not None
        cache.export("app:1", tmp_path / "exported.tar")
        for write in (
            lambda: cache.cache_from_tar(archive),
            lambda: cache.remove_manifest("app:1"),
            lambda: cache.collect_garbage(),
            lambda: cache.add_hold("app:1"),
            lambda: cache.add_blob(b"new"),
            lambda: cache.tag("app:1", "app:2"),
            lambda: cache.producing("app:3").__enter__(),
            lambda: cache.verify(repair=True),
        ):
            with pytest.raises(StorageError, match=r"ead-only|read only|Permission denied|readonly|can only be read"):
                write()
    assert drift.check(path) == []
    copy = sqlite3.connect(upgrade.back_up(path, tmp_path / "copy.db"))
    assert copy.execute("SELECT repository FROM images").fetchall() == [("app",)]
    copy.close()
    with pytest.raises(StorageError, match="ead-only"):
        upgrade.back_up(path)
    for command in (["ls", "-q"], ["gc"]):
        result = cachedb("--dir", path, *command)
        assert (result.returncode, result.stdout) == ((0, "app:1\n") if command[0] == "ls" else (1, "")), result
        assert result.stderr.count("\n") == (command[0] == "gc")
    assert durable_files(path) == before


@pytest.mark.slow
@pytest.mark.parametrize("wal", ["none", "with shared memory", "alone"])
def test_a_cache_on_a_read_only_file_system_can_be_read(cachedb: Run, disk: Path, tmp_path: Path, wal: str) -> None:
    path = disk / "cache"
    if wal == "none":
        with Cache.open(path) as cache:
            save(cache, "app:1", MADE)
            cache.add_blob(b"garbage")
    else:
        run_python(
            """
            import os, sys
            from cachedb import Cache
            from tests.support.make import save
            from tests.attacks.test_limits import MADE
            cache = Cache.open(sys.argv[1])
            save(cache, "app:1", MADE)
            cache.add_blob(b"garbage")
            os._exit(0)
            """,
            path,
        )
        assert (path / "index.db-wal").stat().st_size
        if wal == "alone":
            (path / "index.db-shm").unlink()
    mount("-o", "remount,ro", disk)
    check_read_only(cachedb, path, tmp_path)


def test_a_read_only_cache_with_an_unfinished_backfill_opens_with_upgrade(disk: Path) -> None:
    with Cache.open(disk / "cache") as cache:
        save(cache, "app:1", MADE)
    shell = sqlite3.connect(disk / "cache" / "index.db")
    shell.execute(f"INSERT INTO backfills VALUES ('{REVISION}', 0)")
    shell.commit()
    shell.close()
    mount("-o", "remount,ro", disk)
    with Cache.open(disk / "cache", upgrade=True) as cache:
        assert cache.is_image_complete("app:1")
    with pytest.raises(StorageError, match="ead-only"):
        upgrade.upgrade(disk / "cache")


@pytest.mark.slow
def test_a_read_only_mount_of_a_cache_shows_what_others_write(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    save(cache, "app:1", MADE)
    with Cache.open(cache.directory) as other:
        other.add_blob(b"garbage")
    view = tmp_path / "view"
    view.mkdir()
    mount("--bind", cache.directory, view)
    try:
        mount("-o", "remount,ro,bind", view)
        check_read_only(cachedb, view, tmp_path)
        with Cache.open(view) as reader:
            save(cache, "app:2", make.image(3))
            assert reader.is_image_complete("app:2")
            cache.remove_manifest("app:2")
            assert not reader.is_image_complete("app:2")
    finally:
        subprocess.run(["umount", "--lazy", view], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user: run as root")
def test_a_user_without_write_permission_can_read_a_cache() -> None:
    # Not below pytest's own folders, which only their owner can read.
    with tempfile.TemporaryDirectory() as folder:
        read_as_another_user(Path(folder) / "cache")


def read_as_another_user(path: Path) -> None:
    cache = Cache.open(path)
    save(cache, "app:1", MADE)
    cache.add_blob(b"garbage")
    cache.close()
    path.parent.chmod(0o755)
    script = """
        import os, sys
        from cachedb import Cache, StorageError
        from tests.attacks.test_limits import MADE
        os.chdir(sys.argv[1])
        os.setuid(65534)
        with Cache.open(".") as cache:
            assert cache.get_manifest("app:1") == MADE.manifest
            with cache.hold("app:1"):
                pass
            assert cache.verify().problems == []
            try:
                cache.collect_garbage()
            except StorageError as error:
                print(error)
    """
    for folder, _, names in os.walk(path):
        Path(folder).chmod(0o755)
        for name in names:
            (Path(folder) / name).chmod(0o444)
    assert "check the owner and mode" in run_python(script, path)


# Descriptors


@pytest.mark.slow
def test_no_operation_leaves_a_descriptor_open(cache: Cache, directory: Path, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "app.tar", make.oci_files({"app:1": MADE}))

    def work() -> None:
        cache.cache_from_tar(archive)
        cache.export("app:1", tmp_path / "out.tar")
        cache.release_hold(cache.add_hold("app:1")[0].id)
        with cache.hold("app:1"), cache.producing("app:1"), cache.producing("app:2"):
            cache.get_image_blobs("app:1")
        cache.get_blob(MADE.digest)
        cache.remove_manifest("app:1")
        cache.collect_garbage()
        cache.verify()
        Cache.open(directory).close()

    work()
    before = count_open_files()
    for _ in range(20):
        work()
    assert count_open_files() == before


@pytest.mark.slow
def test_an_archive_with_more_blobs_than_the_limit_on_open_files_is_imported(directory: Path, tmp_path: Path) -> None:
    layers = [b"%d" % number for number in range(500)]
    made = make.image(1)._replace(layers=layers)
    config = b'{"architecture": "amd64", "os": "linux"}'
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": make.descriptor(config, OCI_CONFIG),
            "layers": [make.descriptor(data, OCI_LAYER) for data in layers],
        }
    ).encode()
    files = make.oci_files({"many:1": made._replace(config=config, manifest=manifest)})
    make.write(tmp_path / "many.tar", files)
    output = run_python(
        """
        import os, resource, sys
        from cachedb import Cache, CacheError
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with Cache.open(sys.argv[1]) as cache:
            cache.cache_from_tar(sys.argv[2])
            print(cache.is_image_complete("many:1"))
            files = [os.open("/dev/null", os.O_RDONLY) for _ in range(64 - len(os.listdir("/proc/self/fd")))]
            files.append(os.open("/dev/null", os.O_RDONLY))
            for _ in range(3):
                try:
                    cache.add_blob(b"new")
                except CacheError as error:
                    print(error)
                os.close(files.pop())
            for file in files:
                os.close(file)
            cache.add_blob(b"new")
        """,
        directory,
        tmp_path / "many.tar",
    )
    first, *errors = output.splitlines()
    assert first == "True"
    assert errors
    assert all("ulimit -n" in line or "limit on open files" in line for line in errors)
    check(directory)


@pytest.mark.slow
def test_a_process_opens_a_cache_400_times_and_a_hundred_threads_share_one(directory: Path) -> None:
    script = """
        import resource, sys
        from concurrent.futures import ThreadPoolExecutor
        from threading import Barrier
        from cachedb import Cache
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        for _ in range(400):
            cache = Cache.open(sys.argv[1])
            cache.list_holds()
            cache.close()
        together = Barrier(100)
        with Cache.open(sys.argv[1]) as cache, ThreadPoolExecutor(100) as pool:
            def work(number):
                together.wait()
                digest = cache.add_blob(b"%d" % number)
                with cache.hold(digest):
                    return cache.get_blob(digest) == b"%d" % number
            print(sum(pool.map(work, range(100))))
    """
    assert run_python(script, directory) == "100\n"


def test_an_error_does_not_name_a_descriptor_as_a_file() -> None:
    with (
        Path(__file__).open("rb") as file,
        pytest.raises(StorageError, match=r"^cannot work: Not a directory$"),
        os_errors("work"),
    ):
        os.listdir(file.fileno())


# A full disk


@pytest.fixture
def full_disk(disk: Path) -> Path:
    """Return a cache on a disk without free space."""
    with Cache.open(disk / "cache") as cache:
        for number in range(600):
            cache.add_blob(b"garbage %d" % number * 100)
        for digest, data in MADE.blobs.items():
            cache.save_blob(digest, data)
        cache.save_manifest("app:1", MADE.manifest)
    fill(disk / "full")
    return disk / "cache"


def fill(path: Path) -> None:
    """Write to a new file until the disk is full."""
    with path.open("xb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_new_content_does_not_use_the_reserve_that_a_full_disk_needs(full_disk: Path, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "new.tar", make.oci_files({"new:1": make.image(9)}))
    with Registry() as remote, Cache.open(full_disk) as cache:
        remote.add(make.image(8), "app", "1")
        for write in (
            lambda: cache.add_blob(b"new"),
            lambda: cache.cache_from_tar(archive),
            lambda: cache.pull(f"{remote.host}/app:1"),
        ):
            with pytest.raises(StorageError, match="No space left on device: free some space"):
                write()
        cache.tag("app:1", "app:2")
        assert cache.remove_manifest("app:1", "app:2").blobs == 4
        assert cache.collect_garbage().blobs == 600
        assert [str(image.name) for image in cache.cache_from_tar(archive)] == ["new:1"]
    check(full_disk)


def test_a_download_does_not_use_the_reserve(disk: Path) -> None:
    made = make.image(8)
    with Cache.open(disk / "cache") as cache:
        cache.save_manifest("app:1", made.manifest)  # so that only blobs are missing
    fill(disk / "full")
    with Registry() as remote, Cache.open(disk / "cache") as cache:
        remote.add(made, "app", "1")
        with pytest.raises(StorageError, match="No space left on device: free some space"):
            cache.pull(f"{remote.host}/app:1")
        assert not [request for request in remote.requests if "/blobs/" in request.path]


def test_new_content_does_not_use_what_was_left_of_the_reserve(full_disk: Path) -> None:
    os.truncate(full_disk / "reserve", 200 * 1024)
    fill(full_disk.parent / "rest")
    with Cache.open(full_disk) as cache:
        assert not (full_disk / "reserve").exists()
        with pytest.raises(StorageError, match="No space left on device: free some space"):
            cache.add_blob(b"new")
        (full_disk.parent / "full").unlink()
        cache.add_blob(b"new")


def test_an_export_or_a_copy_to_a_full_disk_does_not_use_the_reserve(full_disk: Path, tmp_path: Path) -> None:
    with Cache.open(full_disk) as cache:
        for write in (
            lambda: cache.export("app:1", full_disk.parent / "app.tar"),
            lambda: cache.copy(full_disk.parent / "copy"),
        ):
            with pytest.raises(StorageError, match="No space left on device: free some space"):
                write()
        cache.export("app:1", tmp_path / "app.tar")
        cache.copy(tmp_path / "copy")
        assert cache.remove_manifest("app:1").blobs == 4
    assert not (full_disk.parent / "app.tar").exists()
    check(full_disk)
    check(tmp_path / "copy")


def test_a_part_of_the_reserve_is_kept_when_there_is_no_room_for_all_of_it(full_disk: Path) -> None:
    (full_disk / "reserve").rename(full_disk.parent / "taken")
    os.truncate(full_disk.parent / "taken", 400 * 1024)
    with Cache.open(full_disk):
        assert 256 * 1024 <= (full_disk / "reserve").stat().st_size < 1024 * 1024
    fill(full_disk.parent / "rest")
    with Cache.open(full_disk) as cache:
        assert cache.remove_manifest("app:1").blobs == 4
        assert cache.collect_garbage().blobs == 600
    (full_disk.parent / "full").unlink()
    Cache.open(full_disk).close()
    assert (full_disk / "reserve").stat().st_size == 1024 * 1024


@pytest.mark.slow
def test_commands_read_a_cache_on_a_full_disk_and_free_space(cachedb: Run, full_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    assert cachedb("--dir", full_disk, "ls", "-q").stdout == "app:1\n"
    refused = cachedb("--dir", full_disk, "blob", "add", tmp_path / "large")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "No space left on device: free some space (`cachedb gc` may help)" in refused.stderr
    removed = cachedb("--dir", full_disk, "rm", "app:1")
    assert (removed.returncode, removed.stdout) == (0, "freed 4 blobs, 21.5 kB\n"), removed.stderr
    collected = cachedb("--dir", full_disk, "gc")
    assert (collected.returncode, collected.stdout[:15]) == (0, "freed 600 blobs"), collected.stderr
    (full_disk.parent / "full").unlink()
    check(full_disk)
    assert (full_disk / "reserve").stat().st_blocks * 512 >= 1024 * 1024, "the reserve must be there again"


def test_a_process_with_an_open_cache_frees_a_full_disk(full_disk: Path) -> None:
    (full_disk.parent / "full").rename(full_disk.parent / "small")
    os.truncate(full_disk.parent / "small", (full_disk.parent / "small").stat().st_size - 200_000)
    with Cache.open(full_disk) as cache:
        with (full_disk.parent / "full").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        assert cache.remove_manifest("app:1").blobs == 4
        assert cache.collect_garbage().blobs == 600


@pytest.mark.slow
def test_a_pull_that_fills_the_disk_gives_the_space_back(cachedb: Run, disk: Path) -> None:
    directory, small, large = disk / "cache", make.image(1), make.image(2, 3, size=12_000_000)
    with Registry() as remote:
        remote.add(small, "small", "1")
        remote.add(large, "large", "1")
        assert cachedb("--dir", directory, "init").returncode == 0
        before = shutil.disk_usage(disk).used
        refused = cachedb("--dir", directory, "pull", "-q", f"{remote.host}/large:1")
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "free some space" in refused.stderr
        assert os.listdir(partial_path(directory, Digest(large.digest)).parent) == []
        assert cachedb("--dir", directory, "gc").returncode == 0
        assert shutil.disk_usage(disk).used - before < 100_000
        assert cachedb("--dir", directory, "pull", f"{remote.host}/small:1").returncode == 0
    check(directory)


@pytest.mark.parametrize("reserve", [True, False])
def test_partial_downloads_are_deleted_when_the_disk_is_full(cachedb: Run, full_disk: Path, reserve: bool) -> None:
    partial = partial_path(full_disk, Digest(MADE.digest))
    partial.parent.mkdir()
    (full_disk.parent / "full").rename(partial)
    if not reserve:
        (full_disk / "reserve").unlink()
        with (full_disk.parent / "full").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
    assert cachedb("--dir", full_disk, "gc").returncode == 0
    assert not partial.exists()
    check(full_disk)


def test_a_cache_without_space_for_a_reserve_opens_without_one(disk: Path) -> None:
    (disk / "large").write_bytes(bytes(15 * 1024 * 1024 + 800_000))
    with Cache.open(disk / "cache") as cache:
        assert cache.list_manifests() == []
    assert not (disk / "cache" / "reserve").exists()


def test_a_truncated_reserve_is_filled_again(directory: Path) -> None:
    Cache.open(directory).close()
    os.truncate(directory / "reserve", 0)
    Cache.open(directory).close()
    assert (directory / "reserve").stat().st_size == 1024 * 1024


def test_the_reserve_is_kept_on_other_errors_than_a_full_disk(cache: Cache, directory: Path) -> None:
    def fail() -> None:
        with os_errors("work"):
            raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(StorageError, match="Permission denied"):
        cache._database.reserve.run(fail)
    assert (directory / "reserve").exists()


def test_a_read_only_reader_sees_what_others_have_written_since(cache: Cache, directory: Path) -> None:
    save(cache, "app:1", MADE)
    cache.close()
    reader = Database(directory)
    reader.access.is_writable = False
    for number in range(3):
        with Cache.open(directory) as writer:
            save(writer, f"app:{number}", make.image(number))
        with reader.read() as connection:
            found = {image.reference for image in images.read_images(connection)}
        assert str(number) in found
    reader.close()


def test_a_directory_name_that_is_too_long_is_an_error_of_one_line(cachedb: Run) -> None:
    result = cachedb("--dir", "x" * 300, "ls")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "cannot use the cache directory: File name too long" in result.stderr
