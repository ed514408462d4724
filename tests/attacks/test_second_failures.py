"""If a clean-up fails after a failure, the first error is reported."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, CacheError, InvalidArchive, StorageError
from cachedb.content import publish
from cachedb.disk import downloads, single_flight
from cachedb.index import schema
from cachedb.operations import upgrade
from cachedb.transports.archive.formats import Format
from tests.support import make
from tests.support.make import save
from tests.support.registries import Registry

IMAGE = make.image(1, 2)


class Fault:
    """A fault that makes a function fail for some of its first arguments, and counts how often it did.

    The end of the block fails if the fault never fired, because then nothing was tested.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, code: int, when: Callable[[str], bool]
    ) -> None:
        self._set: Callable[[Any], None] = lambda value: monkeypatch.setattr(where, name, value)
        self._real, self._code, self._when, self.fired = getattr(where, name), code, when, 0

    def _call(self, *arguments: Any, **options: Any) -> Any:
        subject = arguments[0] if arguments else ""
        if isinstance(subject, int):
            subject = os.readlink(f"/proc/self/fd/{subject}")
        if (folder := options.get("dir_fd")) is not None:
            subject = f"{os.readlink(f'/proc/self/fd/{folder}')}/{subject}"
        if self._when(str(subject)):
            self.fired += 1
            raise OSError(self._code, os.strerror(self._code))
        return self._real(*arguments, **options)

    def __enter__(self) -> None:
        # A function, because a bound method would not get the object of the patched method.
        self._set(lambda *arguments, **options: self._call(*arguments, **options))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._set(self._real)
        assert kind or self.fired, "the fault did not fire"


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fault]:
    def make_fault(where: Any, name: str, code: int, word: str) -> Fault:
        return Fault(monkeypatch, where, name, code, lambda subject: word in subject)

    return make_fault


MakeFault = Callable[..., Fault]


def test_a_fault_that_does_not_fire_fails_its_test(fault: MakeFault) -> None:
    with pytest.raises(AssertionError, match="did not fire"), fault(os, "fsync", errno.EIO, "nowhere"):
        pass


@pytest.mark.parametrize("form", ["docker", "oci-dir"])
def test_a_failed_export_that_cannot_be_removed_reports_the_first_error(
    cache: Cache, fault: MakeFault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Format
) -> None:
    save(cache, "app:1", IMAGE)
    monkeypatch.setattr(os, "O_TMPFILE", 0)  # as on a file system without unnamed files
    with (
        fault(os, "fsync", errno.ENOSPC, ".part"),
        fault(Path, "unlink", errno.EIO, ".part"),
        pytest.raises(StorageError, match="cannot write the export: No space left"),
    ):
        cache.export("app:1", tmp_path / "out", format=form)
    (left,) = tmp_path.rglob(".cachedb-*.part")
    assert left.is_file()
    if form == "oci-dir":
        cache.export("app:1", tmp_path / "out", format=form)
        assert not list(tmp_path.rglob(".cachedb-*.part")), "the next export must remove it"


def test_an_export_whose_link_cannot_be_renamed_or_removed_reports_the_first_error(
    cache: Cache, fault: MakeFault, tmp_path: Path
) -> None:
    save(cache, "app:1", IMAGE)
    cache.export("app:1", tmp_path / "out", format="oci-dir", link=True)
    with (
        fault(Path, "rename", errno.ENOSPC, "out/blobs"),
        fault(os, "unlink", errno.EIO, "out/blobs"),
        pytest.raises(StorageError, match="cannot write the export: No space left"),
    ):
        cache.export("app:1", tmp_path / "out", format="oci-dir", link=True)


@pytest.mark.parametrize("damaged", [True, False])
def test_a_spooled_archive_that_cannot_be_removed_hides_no_error(
    cache: Cache, fault: MakeFault, tmp_path: Path, damaged: bool
) -> None:
    archive = make.write(tmp_path / "app.tar", make.oci_files({"app:1": IMAGE}))
    data = gzip.compress(archive.read_bytes())
    archive.write_bytes(data[: len(data) // 2] if damaged else data)
    with fault(os, "unlink", errno.EIO, "/ingest/"):
        if damaged:
            with pytest.raises(InvalidArchive, match="cut short"):
                cache.cache_from_tar(archive)
        else:
            assert [str(image.name) for image in cache.cache_from_tar(archive)] == ["app:1"]


def test_a_failed_backup_that_cannot_be_removed_reports_the_first_error(cache: Cache, fault: MakeFault) -> None:
    cache.add_blob(b"x")
    with (
        fault(os, "fsync", errno.ENOSPC, ".backup-"),
        fault(Path, "unlink", errno.EIO, ".backup-"),
        pytest.raises(StorageError, match="cannot make a backup of the index: No space left"),
    ):
        upgrade.back_up(cache.directory)
    assert list((cache.directory / "backups").glob("*.db")) == []
    upgrade.back_up(cache.directory)
    assert list((cache.directory / "backups").glob(".backup-*")) == [], "the next backup must remove it"


def test_a_failed_change_of_the_schema_whose_backup_cannot_be_removed_reports_the_first_error(
    directory: Path, fault: MakeFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    Cache.open(directory).close()

    def broken(*_: Any) -> None:
        raise StorageError("the first error")

    monkeypatch.setattr(schema, "run_migrations", broken)
    with fault(os, "unlink", errno.EIO, "-before-"), pytest.raises(StorageError, match=r"^the first error$"):
        upgrade.downgrade(directory, "-1")


def test_a_refused_blob_that_cannot_be_removed_reports_the_first_error(cache: Cache, fault: MakeFault) -> None:
    with (
        fault(os, "unlink", errno.EIO, "/ingest/"),
        pytest.raises(CacheError, match="should have digest"),
    ):
        cache.save_blob(make.digest_of(b"x"), b"y")


def test_a_failed_publication_that_cannot_be_retracted_reports_the_first_error(
    cache: Cache, fault: MakeFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.add_blob(b"before")

    def retract(*_: Any) -> None:
        failed.append(1)
        raise StorageError("the second error")

    failed: list[int] = []
    monkeypatch.setattr(publish, "retract", retract)
    with (
        fault(publish, "set_stored", errno.ENOSPC, ""),
        pytest.raises(StorageError, match="No space left"),
    ):
        cache.add_blob(b"new")
    assert failed


def test_a_failed_pull_whose_download_cannot_be_removed_reports_the_first_error(
    cache: Cache, fault: MakeFault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with Registry() as remote:
        remote.add(IMAGE, "app", "1")
        with (
            fault(os, "fsync", errno.ENOSPC, "/ingest/partial/"),
            fault(downloads, "remove_stale_downloads", errno.EIO, ""),
            pytest.raises(StorageError, match="No space left"),
        ):
            cache.pull(f"{remote.host}/app:1")


def test_failed_work_whose_lock_file_cannot_be_removed_reports_the_first_error(cache: Cache, fault: MakeFault) -> None:
    def work() -> None:
        with single_flight.claim_or_find(cache.directory, "app", lambda: None):
            raise ValueError("the first error")

    with fault(Path, "unlink", errno.EIO, ".producing"), pytest.raises(ValueError, match="the first error"):
        work()
    with single_flight.claim_or_find(cache.directory, "app", lambda: None) as found:
        assert found is None, "the lock must be released"


def test_a_failed_block_releases_its_claim(cache: Cache) -> None:
    def work() -> None:
        with single_flight.try_claim(cache.directory, "app") as is_claimed:
            assert is_claimed
            raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        work()
    with single_flight.try_claim(cache.directory, "app") as is_claimed:
        assert is_claimed
    with single_flight.claim_or_find(cache.directory, "app", lambda: None) as found:
        assert found is None
