"""Test how folders in skopeo's directory format are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.errors import DigestMismatch, InvalidArchive
from tests.support import make
from tests.support.make import digest_of, hex_of

AMD, ARM = make.image(1), make.image(2, architecture="arm64")
VERSION = b"Directory Transport Version: 1.1\n"


def write_directory(path: Path, manifest: bytes, *children: make.ImageContent) -> Path:
    """Write an image as `skopeo copy --all ... dir:PATH` does."""
    files = {"version": VERSION, "manifest.json": manifest}
    for made in children:
        files |= {hex_of(data): data for data in (made.config, *made.layers)}
        if made.manifest != manifest:
            files[f"{hex_of(made.manifest)}.manifest.json"] = made.manifest
    return make.write(path, files)


def test_an_image_is_read_from_skopeos_directory_format(cache: Cache, tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "app", AMD.manifest, AMD)
    (image,) = cache.cache_from_tar(folder, "app:1")
    assert (image.digest, image.complete) == (AMD.digest, True)
    with pytest.raises(InvalidArchive, match="the image in the archive has no name"):
        cache.cache_from_tar(folder)


def test_an_index_is_read_from_skopeos_directory_format(cache: Cache, tmp_path: Path) -> None:
    index = make.index(AMD, ARM)
    cache.cache_from_tar(write_directory(tmp_path / "app", index, AMD, ARM), "app:1")
    assert cache.get_image("app:1").digest == digest_of(index)
    assert [child.complete for child in cache.get_platforms("app:1")] == [True, True]


def test_a_blob_with_another_digest_is_refused(cache: Cache, tmp_path: Path) -> None:
    folder = write_directory(tmp_path / "app", AMD.manifest, AMD)
    (folder / hex_of(AMD.layers[0])).write_bytes(bytes(len(AMD.layers[0])))
    with pytest.raises(DigestMismatch):
        cache.cache_from_tar(folder, "app:1")


def test_signatures_are_left_out_with_a_warning(cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_directory(tmp_path / "app", AMD.manifest, AMD)
    cache.cache_from_tar(folder, "app:1")
    assert caplog.messages == []
    (folder / "signature-1").write_bytes(b"signature")
    cache.cache_from_tar(folder, "app:1")
    assert caplog.messages == ["not imported: the signatures in the folder (signature-1, ...)"]


@pytest.mark.parametrize("version", [None, b"Directory Transport Version: 2.0\n", b""])
def test_a_folder_of_another_version_is_refused(cache: Cache, tmp_path: Path, version: bytes | None) -> None:
    folder = write_directory(tmp_path / "app", AMD.manifest, AMD)
    if version is None:
        (folder / "version").unlink()
    else:
        (folder / "version").write_bytes(version)
    with pytest.raises(InvalidArchive, match="no file `version` of Directory Transport Version 1"):
        cache.cache_from_tar(folder, "app:1")
