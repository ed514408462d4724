"""Exports: their contents, that they are reproducible, and that they appear complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from cachedb import (
    Busy,
    Cache,
    CacheError,
    DigestMismatch,
    Filters,
    IncompleteImage,
    InvalidManifest,
    InvalidName,
    NotInCache,
    StorageError,
)
from cachedb.disk import waiting
from cachedb.oci.manifests import DOCKER_MANIFEST, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST
from cachedb.transports.archive import write_layout
from cachedb.transports.archive.formats import Format
from tests.conftest import Run, files_of
from tests.support import make
from tests.support.waiting import wait_until

ARCHIVES = ("docker", "docker-archive", "oci-archive")
FORMATS = (*ARCHIVES, "oci-dir")
IMAGE = make.image(1, 2, compression="gzip")


def import_image(cache: Cache, tmp_path: Path, image: make.ImageContent = IMAGE, name: str = "app:1") -> None:
    """Import an image from an OCI archive."""
    cache.cache_from_tar(make.write(tmp_path / "source.tar", make.oci_files({"source:1": image})), name)


def import_index(cache: Cache, tmp_path: Path, data: bytes, *images: make.ImageContent, name: str = "app:1") -> None:
    files = make.oci_files({str(number): image for number, image in enumerate(images)}, {"source:1": data})
    cache.cache_from_tar(make.write(tmp_path / "source.tar", files), name)


def read_contents(path: Path) -> dict[str, bytes]:
    """Return the files of an archive in their order, or those of a folder, sorted."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    with tarfile.open(path) as tar:
        return {member.name: read_member(tar, member) for member in tar if member.isfile()}


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def list_names(index: bytes) -> list[str]:
    return [entry["annotations"][make.REF_NAME] for entry in json.loads(index)["manifests"]]


def blob_files(*images: make.ImageContent) -> dict[str, bytes]:
    return {f"blobs/{digest.replace(':', '/')}": data for image in images for digest, data in image.blobs.items()}


# Contents


@pytest.mark.parametrize("form", ["docker", "oci-archive", "oci-dir"])
def test_an_oci_format_is_an_image_layout(cache: Cache, tmp_path: Path, form: Format) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "out", format=form)
    files = read_contents(tmp_path / "out")
    assert json.loads(files.pop("oci-layout")) == {"imageLayoutVersion": "1.0.0"}
    assert json.loads(files.pop("index.json")) == {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": [
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": IMAGE.digest,
                "size": len(IMAGE.manifest),
                "annotations": {
                    "io.containerd.image.name": "docker.io/library/app:1",
                    "org.opencontainers.image.ref.name": "app:1",
                },
            }
        ],
    }
    docker = files.pop("manifest.json", None)
    assert files == blob_files(IMAGE)
    assert (docker is not None) == (form == "docker")


def test_the_default_format_is_a_docker_archive_as_well(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "out")
    files = read_contents(tmp_path / "out")
    ((entry),) = json.loads(files["manifest.json"])
    assert entry["RepoTags"] == ["app:1"]
    assert files[entry["Config"]] == IMAGE.config
    assert [files[path] for path in entry["Layers"]] == IMAGE.layers


@pytest.mark.parametrize(("compression", "suffix"), [("", ".tar"), ("gzip", ".tar.gz"), ("zstd", ".tar.zst")])
def test_a_docker_archive_has_manifest_config_and_layers(
    cache: Cache, tmp_path: Path, compression: str, suffix: str
) -> None:
    image = make.image(1, 2, compression=compression)
    import_image(cache, tmp_path, image)
    cache.export("app:1", tmp_path / "out", format="docker-archive")
    config, layers = f"{make.hex_of(image.config)}.json", [make.hex_of(layer) + suffix for layer in image.layers]
    files = read_contents(tmp_path / "out")
    assert json.loads(files["manifest.json"]) == [{"Config": config, "RepoTags": ["app:1"], "Layers": layers}]
    assert files[config] == image.config
    assert [files[path] for path in layers] == image.layers
    assert len(files) == 4


def test_a_layer_that_occurs_twice_is_written_once(cache: Cache, tmp_path: Path) -> None:
    image = make.image(1, 1)
    import_image(cache, tmp_path, image)
    for form in ARCHIVES:
        cache.export("app:1", tmp_path / form, format=form)  # type: ignore[arg-type]
        with tarfile.open(tmp_path / form) as tar:
            names = tar.getnames()
        assert len(names) == len(set(names))
        cache.cache_from_tar(tmp_path / form, f"again:{form}")
        assert json.loads(cache.get_manifest(f"again:{form}"))["layers"] == json.loads(image.manifest)["layers"]


@pytest.mark.parametrize("form", ARCHIVES)
def test_a_folder_in_an_archive_is_a_member_before_its_files(cache: Cache, tmp_path: Path, form: Format) -> None:
    """Without such a member skopeo makes the folder itself, owned by root, and fails if it may not."""
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "out", format=form)
    folders: list[str] = ["."]
    with tarfile.open(tmp_path / "out") as tar:
        for member in tar:
            assert str(PurePosixPath(member.name).parent) in folders
            if member.isdir():
                folders.append(member.name)
                assert member.mode == 0o755
    assert len(folders) == len(set(folders))


def test_the_documents_of_a_stream_come_before_its_layers(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "out")
    first = list(read_contents(tmp_path / "out"))[:4]
    assert first == ["oci-layout", "index.json", "manifest.json", f"blobs/sha256/{IMAGE.digest.partition(':')[2]}"]


# Reproducible exports


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_image_gives_the_same_bytes_from_any_cache(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Format
) -> None:
    files = make.oci_files({"app:1": IMAGE})
    cache.cache_from_tar(make.write(tmp_path / "source.tar", files), "app:1")
    cache.export("app:1", tmp_path / "first", format=form)
    later = time.time() + 1e6
    monkeypatch.setattr(time, "time", lambda: later)
    old = os.umask(0o077)
    try:
        with Cache.open(tmp_path / "other") as other:
            other.cache_from_tar(make.write(tmp_path / "folder", dict(reversed(files.items()))), "app:1")
            other.export("app:1", tmp_path / "second", format=form)
    finally:
        os.umask(old)
    if form == "oci-dir":
        assert read_contents(tmp_path / "first") == read_contents(tmp_path / "second")
    else:
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_of_an_export_has_the_same_bytes(cache: Cache, tmp_path: Path, form: Format) -> None:
    cache.cache_from_tar(make.write(tmp_path / "source.tar", make.docker_files({"app:1": make.image(1, 2)})))
    cache.export("app:1", tmp_path / "first", format=form)
    with Cache.open(tmp_path / "other") as other:
        other.cache_from_tar(tmp_path / "first")
        assert other.get_image("app:1").digest == cache.get_image("app:1").digest
        other.export("app:1", tmp_path / "second", format=form)
    if form == "oci-dir":
        assert read_contents(tmp_path / "first") == read_contents(tmp_path / "second")
    else:
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


# Importing an export


@pytest.mark.parametrize("form", ["docker", "oci-archive", "oci-dir"])
@pytest.mark.parametrize(
    "name",
    [
        "app:1",
        "app:latest",
        "team/app:v1.0",
        "registry.example:5000/team/app:1",
        "localhost/app:1",
        f"app@{IMAGE.digest}",
        f"registry.example/app@{make.digest_of(IMAGE.manifest, 'sha512')}",
    ],
)
def test_an_imported_export_has_the_same_digests_and_name(
    cache: Cache, tmp_path: Path, form: Format, name: str
) -> None:
    import_image(cache, tmp_path)
    if "@sha512" in name:
        cache.save_manifest(name, IMAGE.manifest)
    else:
        cache.tag("app:1", name)
    cache.export(name, tmp_path / "out", format=form)
    with Cache.open(tmp_path / "other") as other:
        (image,) = other.cache_from_tar(tmp_path / "out")
        assert str(image.name) == name
        assert image.digest == cache.get_image(name).digest
        assert other.get_manifest(name) == IMAGE.manifest
        found = {blob.digest for blob in other.get_image_blobs(name)}
        assert found == {blob.digest for blob in cache.get_image_blobs(name)}


def test_a_docker_archive_of_a_name_by_digest_has_no_tag(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path, name=f"app@{IMAGE.digest}")
    cache.export(f"app@{IMAGE.digest}", tmp_path / "out", format="docker-archive")
    assert json.loads(read_contents(tmp_path / "out")["manifest.json"])[0]["RepoTags"] is None


def test_an_image_is_exported_by_the_digest_that_a_tag_points_to(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    cache.export(f"app@{IMAGE.digest}", tmp_path / "out")
    assert list_names(read_contents(tmp_path / "out")["index.json"]) == [f"app@{IMAGE.digest}"]


@pytest.mark.slow
def test_paths_of_over_a_hundred_characters_are_not_truncated(cache: Cache, tmp_path: Path) -> None:
    layer = make.layer(1)
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [make.digest_of(layer)]}}
    ).encode()
    digests = [make.digest_of(data, "sha512") for data in (config, layer)]
    document = json.loads(IMAGE.manifest)
    document["config"].update(digest=digests[0], size=len(config))
    del document["layers"][1:]
    document["layers"][0].update(mediaType="application/vnd.oci.image.layer.v1.tar", digest=digests[1], size=len(layer))
    manifest = json.dumps(document).encode()
    name = f"app@{make.digest_of(manifest, 'sha512')}"
    for digest, data in zip(digests, (config, layer), strict=True):
        cache.save_blob(digest, data)
    cache.save_manifest(name, manifest)
    for form in FORMATS:
        cache.export(name, tmp_path / form, format=form)  # type: ignore[arg-type]
        with Cache.open(tmp_path / f"cache-{form}") as other:
            (image,) = other.cache_from_tar(tmp_path / form, "app:1" if form == "docker-archive" else None)
            assert image.complete
            if form != "docker-archive":
                assert str(image.name) == name
                assert {other.get_blob(digest) for digest in digests} == {config, layer}


# Destinations


@pytest.mark.slow
def test_an_export_can_go_to_stdout(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "out")
    piped: Any = cachedb("export", "app:1", "-", text=False)
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert piped.stdout == (tmp_path / "out").read_bytes()
    with (tmp_path / "redirected").open("ab") as file:
        file.write(b"before")
        file.flush()
        assert cachedb("export", "app:1", "-", capture_output=False, stdout=file).returncode == 0
    assert (tmp_path / "redirected").read_bytes() == b"before" + piped.stdout


@pytest.mark.slow
def test_the_error_of_a_closed_pipe_is_at_most_one_line(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path, make.image(1, size=300_000))
    reading, writing = os.pipe()
    os.close(reading)
    failed = cachedb("export", "app:1", "-", capture_output=False, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert failed.returncode == 1
    assert len(failed.stderr.splitlines()) <= 1
    assert "Traceback" not in failed.stderr


def test_an_export_can_go_to_a_nonblocking_pipe(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path, make.image(1, size=300_000))
    cache.export("app:1", tmp_path / "out")
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    received = io.BytesIO()

    def drain() -> None:
        with open(reading, "rb") as file:
            received.write(file.read())

    reader = threading.Thread(target=drain)
    reader.start()
    with open(writing, "wb") as file:
        cache.export("app:1", file)
    reader.join()
    assert received.getvalue() == (tmp_path / "out").read_bytes()


def open_gzip(path: Path) -> Any:
    return gzip.open(path, "wb")


def open_plain(path: Path) -> Any:
    return path.open("wb")


def open_both_ways(path: Path) -> Any:
    return path.open("wb+")


def open_unbuffered(path: Path) -> Any:
    return path.open("wb", buffering=0)


@pytest.mark.parametrize("opened", [open_gzip, open_plain, open_both_ways, open_unbuffered])
def test_an_export_is_written_to_the_given_file_object(
    cache: Cache, tmp_path: Path, opened: Callable[[Path], Any]
) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "expected")
    with opened(tmp_path / "out") as file:
        file.write(b"before")
        cache.export("app:1", file)
        file.write(b"after")
    data = (tmp_path / "out").read_bytes()
    data = gzip.decompress(data) if opened is open_gzip else data
    assert data == b"before" + (tmp_path / "expected").read_bytes() + b"after"


def test_an_export_can_go_to_memory_or_a_temporary_file(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "expected")
    memory = io.BytesIO()
    cache.export("app:1", memory)
    assert memory.getvalue() == (tmp_path / "expected").read_bytes()
    with tempfile.TemporaryFile() as file:
        cache.export("app:1", file)
        file.seek(0)
        assert file.read() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_the_umask_sets_the_mode_of_an_export(cache: Cache, tmp_path: Path, form: Format) -> None:
    import_image(cache, tmp_path)
    old = os.umask(0o027)
    try:
        cache.export("app:1", tmp_path / "out", format=form)
    finally:
        os.umask(old)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()] or [tmp_path / "out"]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_an_existing_file_is_replaced_when_the_new_one_is_complete(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_image(cache, tmp_path)
    (tmp_path / "sub").mkdir()
    target = tmp_path / "sub" / "out"
    target.write_bytes(b"old")
    seen = set[bytes]()
    cache.export("app:1", target, progress=lambda *_: seen.add(target.read_bytes()))
    assert seen == {b"old"}
    assert "manifest.json" in read_contents(target)
    assert os.listdir(tmp_path / "sub") == ["out"]


def test_an_export_through_a_symbolic_link_replaces_its_target(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/out")
    cache.export("app:1", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "real" / "out").is_symlink()
    assert os.listdir(tmp_path / "real") == ["out"]


def test_a_destination_may_have_the_longest_possible_name(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / ("ü" * 127))
    assert (tmp_path / ("ü" * 127)).is_file()


@pytest.mark.slow
def test_an_export_can_go_to_a_device_or_a_fifo(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "out")
    assert cachedb("export", "app:1", "/dev/null").returncode == 0
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "fifo")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "fifo").read_bytes()))
    reader.start()
    assert cachedb("export", "app:1", tmp_path / "fifo").returncode == 0
    reader.join()
    assert received == [(tmp_path / "out").read_bytes()]
    assert (tmp_path / "fifo").is_fifo()


# Failed exports leave nothing


def check_failure(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Check that a command failed with one line on stderr; return the line."""
    assert done.returncode == code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("cachedb: ")
    return line


@pytest.mark.parametrize("form", FORMATS)
def test_the_error_of_a_missing_folder_is_one_line(cachedb: Run, cache: Cache, tmp_path: Path, form: Format) -> None:
    import_image(cache, tmp_path)
    line = check_failure(cachedb("export", "--format", form, "app:1", tmp_path / "missing" / "out"))
    assert "No such file or directory" in line
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("form", ARCHIVES)
def test_an_archive_does_not_replace_a_folder(cachedb: Run, cache: Cache, tmp_path: Path, form: Format) -> None:
    import_image(cache, tmp_path)
    (tmp_path / "folder").mkdir()
    assert "directory" in check_failure(cachedb("export", "--format", form, "app:1", tmp_path / "folder"))
    assert os.listdir(tmp_path / "folder") == []


def test_a_folder_does_not_replace_a_file(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    (tmp_path / "file").write_bytes(b"kept")
    assert "Not a directory" in check_failure(cachedb("export", "--format", "oci-dir", "app:1", tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_exporting_an_unknown_image_leaves_the_destination_unchanged(cachedb: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"kept")
    check_failure(cachedb("export", "app:1", tmp_path / "out"), 3)
    assert (tmp_path / "out").read_bytes() == b"kept"


@pytest.mark.parametrize("form", FORMATS)
def test_an_incomplete_image_is_refused(cache: Cache, tmp_path: Path, form: Format) -> None:
    cache.save_manifest("app:1", IMAGE.manifest)
    cache.save_blob(make.digest_of(IMAGE.config), IMAGE.config)
    with pytest.raises(IncompleteImage, match=make.digest_of(IMAGE.layers[0])):
        cache.export("app:1", tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_truncated_blob_is_not_exported(cache: Cache, tmp_path: Path, form: Format) -> None:
    import_image(cache, tmp_path)
    path = cache.get_blob_path(make.digest_of(IMAGE.layers[1]))
    path.chmod(0o644)
    os.truncate(path, 10)
    with pytest.raises(CacheError, match="has 10 bytes, but"):
        cache.export("app:1", tmp_path / "out", format=form)
    assert not (tmp_path / "out").is_file()
    assert not (tmp_path / "out" / "index.json").exists()


def corrupt_blob(cache: Cache, digest: str) -> None:
    """Change a byte in the middle of a blob's file."""
    path = cache.get_blob_path(digest)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)


LARGE = make.image(1, 2, size=3_000_000)  # more than one chunk


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMATS, "link"])
@pytest.mark.parametrize("blob", [LARGE.layers[0], LARGE.layers[1], LARGE.config], ids=["first", "second", "config"])
def test_a_blob_with_another_content_is_not_exported(
    cachedb: Run, cache: Cache, tmp_path: Path, form: Format, blob: bytes
) -> None:
    import_image(cache, tmp_path, LARGE)
    corrupt_blob(cache, make.digest_of(blob))
    options = ["--format", "oci-dir", "--link"] if form == "link" else ["--format", form]  # type: ignore[comparison-overlap]
    (tmp_path / "sub").mkdir()
    line = check_failure(cachedb("export", *options, "app:1", tmp_path / "sub" / "out"))
    assert f"the file of {make.digest_of(blob)} is damaged" in line
    assert "verify --repair" in line
    assert list((tmp_path / "sub").iterdir()) == []


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "oci-dir"])
def test_a_streamed_export_with_a_damaged_blob_is_incomplete(
    cachedb: Run, cache: Cache, directory: Path, tmp_path: Path, form: Format
) -> None:
    import_image(cache, tmp_path, LARGE)
    last = sorted(LARGE.blobs)[-1]
    corrupt_blob(cache, last)
    done: Any = cachedb("export", "--format", form, "app:1", "-", text=False)
    assert done.returncode == 1
    assert b"is damaged" in done.stderr
    (tmp_path / "half.tar").write_bytes(done.stdout)
    with Cache.open(tmp_path / "other") as other, pytest.raises(CacheError):
        other.cache_from_tar(tmp_path / "half.tar")


@pytest.mark.parametrize("link", [False, True])
def test_a_layout_that_an_image_cannot_be_added_to_stays_as_it_was(cache: Cache, tmp_path: Path, link: bool) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "layout", format="oci-dir")
    before = read_contents(tmp_path / "layout")
    import_image(cache, tmp_path, LARGE)
    corrupt_blob(cache, make.digest_of(LARGE.layers[0]))
    with pytest.raises(DigestMismatch, match="is damaged"):
        cache.export("app:1", tmp_path / "layout", format="oci-dir", link=link)
    assert read_contents(tmp_path / "layout") == before


@pytest.mark.parametrize("form", [*FORMATS, "link"])
def test_a_blob_that_is_a_symbolic_link_is_not_exported(cache: Cache, tmp_path: Path, form: Format) -> None:
    import_image(cache, tmp_path)
    path = cache.get_blob_path(make.digest_of(IMAGE.layers[0]))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="it is a symbolic link, not a regular file"):
        cache.export("app:1", tmp_path / "out", format="oci-dir" if form == "link" else form, link=form == "link")  # type: ignore[comparison-overlap]
    assert not (tmp_path / "out").exists()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when an export begins to wait for the lock of a layout."""
    event, real = threading.Event(), write_layout._read_progress

    def noted_progress(destination: Path) -> int | None:
        event.set()
        return real(destination)

    monkeypatch.setattr(write_layout, "_read_progress", noted_progress)
    return event


@pytest.fixture
def locked_layout(tmp_path: Path) -> Iterator[Path]:
    """A layout into which another export seems to write."""
    layout = tmp_path / "layout"
    layout.mkdir()
    lock = os.open(layout, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield layout
    os.close(lock)


def test_an_export_waits_for_one_that_fails_and_makes_the_folder_again(
    cache: Cache, tmp_path: Path, waits: threading.Event
) -> None:
    import_image(cache, tmp_path)
    layout = tmp_path / "layout"
    layout.mkdir()
    lock = os.open(layout, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    thread = threading.Thread(target=cache.export, args=("app:1", layout), kwargs={"format": "oci-dir"})
    thread.start()
    assert waits.wait(60)
    layout.rmdir()
    os.close(lock)
    thread.join()
    assert (layout / "index.json").is_file()


def test_an_export_waits_for_another_only_as_long_as_the_cache_allows(
    directory: Path, cache: Cache, tmp_path: Path, locked_layout: Path
) -> None:
    import_image(cache, tmp_path)
    holder = rf"waited 0\.1 s for the lock of the layout '{locked_layout}', which is held by process {os.getpid()} "
    with Cache.open(directory, wait=0.1) as hurried, pytest.raises(Busy, match=holder):
        hurried.export("app:1", locked_layout, format="oci-dir")
    assert os.listdir(locked_layout) == []


@pytest.mark.slow
def test_an_export_waits_longer_while_the_other_one_makes_progress(
    directory: Path, cache: Cache, tmp_path: Path, locked_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_image(cache, tmp_path)
    looks, real = [0], write_layout._read_progress

    def noted_progress(destination: Path) -> int | None:
        looks[0] += 1
        if looks[0] <= 200:  # they take over a second
            os.utime(destination, ns=(0, looks[0]))
        return real(destination)

    monkeypatch.setattr(write_layout, "_read_progress", noted_progress)
    with Cache.open(directory, wait=0.2) as hurried, pytest.raises(Busy):
        hurried.export("app:1", locked_layout, format="oci-dir")
    assert looks[0] > 200


@pytest.mark.slow
def test_an_export_into_a_layout_shows_its_progress(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_image(cache, tmp_path, make.image(1, size=20 * 1024 * 1024))
    monkeypatch.setattr(write_layout, "_PROGRESS_SECONDS", 0)
    layout, noted = tmp_path / "layout", list[int | None]()

    def progress(_done: int, _total: int) -> None:
        noted.append(write_layout._read_progress(layout))
        os.utime(layout, ns=(0, 0))

    cache.export("app:1", layout, format="oci-dir", progress=progress)
    assert len(noted) > 2
    assert any(noted[1:])  # the first is the time of the folder's creation


def test_a_wait_for_a_layout_ends_when_the_export_begins(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_image(cache, tmp_path)
    monkeypatch.setattr(waiting, "_SILENT_SECONDS", 0)
    layout, awaited = tmp_path / "layout", list[set[str]]()
    layout.mkdir()
    lock = os.open(layout, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    arguments = {"format": "oci-dir", "progress": lambda *_: awaited.append(set(waiting._logged_holders))}
    thread = threading.Thread(target=cache.export, args=("app:1", layout), kwargs=arguments)
    thread.start()
    assert wait_until(lambda: bool(waiting._logged_holders))
    os.close(lock)
    thread.join()
    assert awaited
    assert not any(awaited)


def test_an_export_that_cannot_show_its_progress_goes_on(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_image(cache, tmp_path)
    refused: list[object] = []

    def utime(path: object, *_: object, **__: object) -> None:
        refused.append(path)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)

    with monkeypatch.context() as patch:
        patch.setattr(write_layout, "_PROGRESS_SECONDS", 0)
        patch.setattr(os, "utime", utime)
        cache.export("app:1", tmp_path / "layout", format="oci-dir")
    assert refused
    assert list_names((tmp_path / "layout" / "index.json").read_bytes()) == ["app:1"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_blob_that_is_cut_short_while_it_is_read_fails_the_export(cache: Cache, tmp_path: Path, form: Format) -> None:
    large = make.image(1, size=20 * 1024 * 1024)
    import_image(cache, tmp_path, large)
    path = cache.get_blob_path(make.digest_of(large.layers[0]))
    path.chmod(0o644)

    def cut(done: int, _total: int) -> None:
        if done > 8 * 1024 * 1024:  # a part of the blob is written
            os.truncate(path, 1024)

    with pytest.raises(CacheError, match="was cut short while it was read"):
        cache.export("app:1", tmp_path / "out", format=form, progress=cut)
    assert not (tmp_path / "out").is_file()
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "target"), [*((form, "out") for form in FORMATS), ("docker", "/dev/full"), ("docker-archive", "/dev/full")]
)
def test_the_error_of_a_full_disk_is_one_line(
    cache: Cache, directory: Path, tmp_path: Path, form: Format, target: str
) -> None:
    import_image(cache, tmp_path, make.image(1, size=300_000))
    # The limit on file size is smaller than the layer and larger than the index.
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2)"
    code = f"import resource; from cachedb.cli.main import main; {limit}; main()"
    (tmp_path / "sub").mkdir()
    arguments = ["--dir", str(directory), "export", "--format", form, "app:1", str(tmp_path / "sub" / target)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True, check=False)
    line = check_failure(done)
    assert ("No space left on device" if target == "/dev/full" else "File too large") in line
    left = [path for path in (tmp_path / "sub").rglob("*") if path.is_file()]
    assert {path.name for path in left if path.stat().st_size > 100_000} == set()
    assert not {"out", "index.json"} & {path.name for path in left}
    assert not [path for path in left if path.name.endswith(".part")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system to fill it")
@pytest.mark.parametrize("form", FORMATS)
def test_the_error_of_a_full_file_system_is_one_line(cachedb: Run, cache: Cache, tmp_path: Path, form: Format) -> None:
    import_image(cache, tmp_path, make.image(1, size=300_000))
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        line = check_failure(cachedb("export", "--format", form, "app:1", small / "out"))
        assert "No space left on device" in line
        assert "free some space" in line
        left = [path.name for path in small.rglob("*") if path.is_file()]
        assert not [name for name in left if name.endswith(".part")]
        assert not {"out", "index.json"} & set(left)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "number"),
    [
        *((form, signal.SIGKILL) for form in FORMATS),
        *(("docker", number) for number in (signal.SIGTERM, signal.SIGINT)),
        ("oci-dir", signal.SIGTERM),
    ],
)
def test_a_killed_export_leaves_nothing_under_the_final_name(
    cache: Cache, directory: Path, tmp_path: Path, form: Format, number: int
) -> None:
    import_image(cache, tmp_path, make.image(1, size=300_000))
    (tmp_path / "sub").mkdir()
    # The script waits to be killed at its first progress, when the first blob is written.
    code = f"""
import signal, threading
from cachedb import Cache
from cachedb.cli.signals import exit_terminated
killed = threading.Event()
def stop(done, total):
    print("begun", flush=True)
    killed.wait()
def handle(number, frame):
    killed.set()
    (exit_terminated if number == signal.SIGTERM else signal.default_int_handler)(number, frame)
signal.signal(signal.SIGTERM, handle)
signal.signal(signal.SIGINT, handle)
with Cache.open({str(directory)!r}) as cache:
    cache.export("app:1", {str(tmp_path / "sub" / "out")!r}, format={form!r}, progress=stop)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(number)
        process.wait()
    left = [path.name for path in (tmp_path / "sub").rglob("*") if path.is_file()]
    assert not {"out", "index.json"} & set(left)
    if number != signal.SIGKILL:
        assert not [name for name in left if name.endswith(".part")]
    # The remains do not block the next export.
    cache.export("app:1", tmp_path / "sub" / "out", format=form)
    with Cache.open(tmp_path / "other") as other:
        assert other.cache_from_tar(tmp_path / "sub" / "out")[0].complete
    cache.remove_manifest("app:1")
    cache.collect_garbage()
    assert files_of(directory) == {}


# Platforms


ARM, AMD = make.image(1, 2, architecture="arm64"), make.image(1, 3, architecture="amd64")
OTHERS = [{"os": "linux", "architecture": "s390x"}, {"os": "linux", "architecture": "arm64", "variant": "v8"}]


def test_an_index_is_exported_with_all_platforms(cache: Cache, tmp_path: Path) -> None:
    data = make.index(AMD, ARM)
    import_index(cache, tmp_path, data, AMD, ARM)
    for form in ("docker", "oci-archive", "oci-dir"):
        cache.export("app:1", tmp_path / form, format=form)
        files = read_contents(tmp_path / form)
        assert files.pop(f"blobs/sha256/{make.hex_of(data)}") == data
        assert {files.pop("oci-layout"), files.pop("index.json")}
        assert ("manifest.json" in files) == (form == "docker")
        files.pop("manifest.json", None)
        assert files == blob_files(AMD, ARM)


def read_docker_config(archive: Path) -> bytes:
    """Return the config that manifest.json names; check that all its layers are in the archive."""
    files = read_contents(archive)
    (entry,) = json.loads(files["manifest.json"])
    assert entry["RepoTags"] == ["app:1"]
    assert entry["Layers"]
    assert files.keys() >= set(entry["Layers"])
    return files[entry["Config"]]


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("x86_64", "amd64"), ("aarch64", "arm64"), ("riscv64", "arm64")],
    ids=["first", "second", "absent"],
)
def test_the_default_format_of_an_index_is_a_docker_archive_of_the_hosts_platform_or_else_the_first(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, expected: str
) -> None:
    data = make.index(ARM, AMD, platforms=[{"os": "linux", "architecture": arch} for arch in ("arm64", "amd64")])
    import_index(cache, tmp_path, data, ARM, AMD)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    cache.export("app:1", tmp_path / "out")
    assert json.loads(read_docker_config(tmp_path / "out"))["architecture"] == expected
    with Cache.open(tmp_path / "other") as other:
        (image,) = other.cache_from_tar(tmp_path / "out")
        assert (str(image.name), image.digest) == ("app:1", make.digest_of(data))


def test_the_configs_say_the_platforms_that_an_index_does_not_state(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make.index(AMD, ARM, platforms=[{}, {}])
    import_index(cache, tmp_path, data, AMD, ARM)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    cache.export("app:1", tmp_path / "out")
    assert read_docker_config(tmp_path / "out") == ARM.config


@pytest.mark.parametrize("platform", ["linux/arm64", "linux/arm64/v8"])
@pytest.mark.parametrize("form", FORMATS)
def test_one_platform_is_exported_as_an_image_without_an_index(
    cache: Cache, tmp_path: Path, form: Format, platform: str
) -> None:
    import_index(cache, tmp_path, make.index(AMD, ARM, platforms=OTHERS), AMD, ARM)
    cache.export("app:1", tmp_path / "out", format=form, platform=platform)
    with Cache.open(tmp_path / "other") as other:
        (image,) = other.cache_from_tar(tmp_path / "out")
        assert str(image.name) == "app:1"
        assert {blob.digest for blob in other.get_image_blobs("app:1") if blob.role in ("config", "layer")} == {
            make.digest_of(data) for data in (ARM.config, *ARM.layers)
        }
        if form != "docker-archive":
            assert image.digest == ARM.digest


def test_one_platform_of_an_index_by_digest_is_named_by_its_own_digest(cache: Cache, tmp_path: Path) -> None:
    data = make.index(AMD, ARM)
    name = f"app@{make.digest_of(data)}"
    import_index(cache, tmp_path, data, AMD, ARM, name=name)
    cache.export(name, tmp_path / "out", platform="linux/arm64")
    with Cache.open(tmp_path / "other") as other:
        (image,) = other.cache_from_tar(tmp_path / "out")
        assert str(image.name) == f"app@{ARM.digest}"


@pytest.mark.parametrize("form", FORMATS)
def test_the_error_of_an_unknown_platform_names_the_known_ones(
    cachedb: Run, cache: Cache, tmp_path: Path, form: Format
) -> None:
    import_index(cache, tmp_path, make.index(AMD, ARM, platforms=OTHERS), AMD, ARM)
    line = check_failure(cachedb("export", "--format", form, "--platform", "linux/arm", "app:1", tmp_path / "out"), 3)
    assert "linux/arm64/v8, linux/s390x" in line
    assert not (tmp_path / "out").exists()


def test_a_docker_archive_of_an_index_has_the_hosts_platform(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_index(cache, tmp_path, make.index(AMD, ARM), AMD, ARM)
    for machine, image in (("x86_64", AMD), ("aarch64", ARM)):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        cache.export("app:1", tmp_path / machine, format="docker-archive")
        assert read_contents(tmp_path / machine)[f"{make.hex_of(image.config)}.json"] == image.config
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(NotInCache, match=r"linux/riscv64.*linux/amd64, linux/arm64.*--platform"):
        cache.export("app:1", tmp_path / "out", format="docker-archive")
    assert not (tmp_path / "out").exists()


def test_an_attestation_is_kept_and_is_no_platform(cache: Cache, tmp_path: Path) -> None:
    attestation = make.image(9)
    platforms = [{"os": "linux", "architecture": "s390x"}, {"os": "unknown", "architecture": "unknown"}]
    import_index(cache, tmp_path, make.index(AMD, attestation, platforms=platforms), AMD, attestation)
    cache.export("app:1", tmp_path / "whole")
    files = read_contents(tmp_path / "whole")
    assert blob_files(AMD, attestation).items() <= files.items()
    assert json.loads(files["manifest.json"])[0]["Config"].endswith(make.hex_of(AMD.config))
    cache.export("app:1", tmp_path / "one", format="docker-archive")
    assert set(read_contents(tmp_path / "one").values()) >= {AMD.config, *AMD.layers}
    with pytest.raises(NotInCache, match="'unknown/unknown', but for linux/s390x:"):
        cache.export("app:1", tmp_path / "none", platform="unknown/unknown")


# Artifacts

HELM = "application/vnd.cncf.helm.config.v1+json"
ARTIFACTS = {
    "helm": make.artifact("", config=b'{"name": "chart"}', config_type=HELM),
    "wasm": make.artifact("", config=b"not JSON", config_type="application/vnd.wasm.config.v0+json"),
    "oras": make.artifact("application/vnd.example.sbom"),
    "empty image config": make.artifact("application/vnd.example.sbom", config_type=OCI_CONFIG),
}


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_an_artifact_is_refused_as_a_docker_archive(cachedb: Run, cache: Cache, tmp_path: Path, kind: str) -> None:
    make.save(cache, "app:1", ARTIFACTS[kind])
    line = check_failure(cachedb("export", "--format", "docker-archive", "app:1", tmp_path / "out"))
    named = {"helm": HELM, "wasm": "application/vnd.wasm.config.v0+json"}.get(kind, "application/vnd.example.sbom")
    assert f"artifact of type '{named}', which a docker-archive cannot hold: use the format oci-archive" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ARTIFACTS)
def test_the_default_format_of_an_artifact_is_no_docker_archive(cache: Cache, tmp_path: Path, kind: str) -> None:
    make.save(cache, "app:1", ARTIFACTS[kind])
    cache.export("app:1", tmp_path / "out")
    assert "manifest.json" not in read_contents(tmp_path / "out")
    with Cache.open(tmp_path / "other") as other:
        (image,) = other.cache_from_tar(tmp_path / "out")
        assert image.digest == ARTIFACTS[kind].digest


def test_an_image_with_an_artifact_type_is_an_image(cache: Cache, tmp_path: Path) -> None:
    manifest = json.dumps({**json.loads(IMAGE.manifest), "artifactType": "application/vnd.example.app"}).encode()
    make.save(cache, "app:1", IMAGE._replace(manifest=manifest))
    cache.export("app:1", tmp_path / "out", format="docker-archive")
    assert "manifest.json" in read_contents(tmp_path / "out")


@pytest.mark.parametrize("form", ["docker", "docker-archive"])
def test_docker_load_gets_the_image_beside_an_artifact(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Format
) -> None:
    data = make.index(ARTIFACTS["wasm"], ARM, platforms=[{}, {"os": "linux", "architecture": "arm64"}])
    import_index(cache, tmp_path, data, ARTIFACTS["wasm"], ARM)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64" if form == "docker" else "aarch64")
    cache.export("app:1", tmp_path / "out", format=form)
    assert read_docker_config(tmp_path / "out") == ARM.config


# Absent foreign layers


@pytest.fixture
def windows(cache: Cache, tmp_path: Path) -> make.ImageContent:
    """Import an image as app:1 whose first layer is foreign and not stored; return it without this layer."""
    document = json.loads(make.with_docker_types(IMAGE).manifest)
    foreign = {
        "mediaType": f"{make.DOCKER_LAYER.replace('diff', 'foreign.diff')}.gzip",
        "urls": ["https://example.org"],
    }
    document["layers"][0].update(foreign)
    made = IMAGE._replace(manifest=json.dumps(document).encode(), layers=IMAGE.layers[1:])
    files = make.oci_files({"app:1": made})
    files["index.json"] = files["index.json"].replace(OCI_MANIFEST.encode(), DOCKER_MANIFEST.encode())
    (imported,) = cache.cache_from_tar(make.write(tmp_path / "windows", files))
    assert imported.complete
    return made


@pytest.mark.parametrize("form", ["docker", "oci-archive", "oci-dir", "dir"])
@pytest.mark.parametrize("convert", [None, "oci"])
def test_an_image_without_its_foreign_layers_is_exported_and_can_be_imported(
    cache: Cache, tmp_path: Path, windows: make.ImageContent, form: Format, convert: Any
) -> None:
    cache.export("app:1", tmp_path / "out", format=form, convert=convert)
    assert form == "dir" or "manifest.json" not in read_contents(tmp_path / "out")
    with Cache.open(tmp_path / "other") as other:
        (imported,) = other.cache_from_tar(tmp_path / "out", "app:1")
        blobs = [blob.digest for blob in other.get_image_blobs("app:1")]
        assert blobs[1:] == [make.digest_of(data) for data in (windows.config, *windows.layers)]
        assert imported.complete
        document = json.loads(other.get_manifest("app:1"))
        assert [entry["digest"] for entry in document["layers"]] == [make.digest_of(data) for data in IMAGE.layers]


@pytest.mark.usefixtures("windows")
def test_an_image_without_its_foreign_layers_is_refused_as_a_docker_archive(
    cachedb: Run, cache: Cache, tmp_path: Path
) -> None:
    line = check_failure(cachedb("export", "--format", "docker-archive", "app:1", tmp_path / "out"))
    assert "app:1 lacks foreign layers, which a docker-archive must hold" in line
    assert not (tmp_path / "out").exists()


# Referrers

SIGNATURE = make.artifact("application/vnd.example.signature", content=b"signature", subject=IMAGE.manifest)
ABOUT = make.artifact("", config=b"{}\n", config_type="application/vnd.example.note", subject=SIGNATURE.manifest)
REFERRERS = [
    {"mediaType": OCI_MANIFEST, "digest": made.digest, "size": len(made.manifest), "artifactType": kind}
    for made, kind in ((SIGNATURE, "application/vnd.example.signature"), (ABOUT, "application/vnd.example.note"))
]


@pytest.fixture
def signed(cache: Cache) -> Cache:
    """Return a cache with an image that has a referrer, which has a referrer of its own."""
    make.save(cache, "app:1", IMAGE)
    make.attach(cache, "app:1", ABOUT, SIGNATURE)
    return cache


@pytest.mark.parametrize("form", ["docker", "oci-archive", "oci-dir"])
def test_referrers_are_exported_without_a_name_after_their_image(signed: Cache, tmp_path: Path, form: Format) -> None:
    signed.export("app:1", tmp_path / "out", format=form, referrers=True)
    files = read_contents(tmp_path / "out")
    image, *others = json.loads(files["index.json"])["manifests"]
    assert (image["digest"], image["annotations"][make.REF_NAME]) == (IMAGE.digest, "app:1")
    assert others == REFERRERS
    assert blob_files(IMAGE, SIGNATURE, ABOUT).items() <= files.items()


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_without_referrers_tells_how_many_are_left_out(
    cachedb: Run, signed: Cache, tmp_path: Path, form: Format
) -> None:
    done = cachedb("export", "--format", form, "app:1", tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "")
    hint = "a docker-archive cannot hold them" if form == "docker-archive" else "add them with --referrers"
    assert done.stderr == f"cachedb: the export of app:1 lacks 2 referrers: {hint}\n"
    with Cache.open(tmp_path / "plain") as other:
        make.save(other, "app:1", IMAGE)
        other.export("app:1", tmp_path / "same", format=form)
    assert read_contents(tmp_path / "out") == read_contents(tmp_path / "same")


def test_an_export_without_referrers_ignores_a_damaged_one(signed: Cache, tmp_path: Path) -> None:
    corrupt_blob(signed, SIGNATURE.digest)
    signed.export("app:1", tmp_path / "out")
    with pytest.raises(DigestMismatch, match=SIGNATURE.digest):
        signed.export("app:1", tmp_path / "signed", referrers=True)
    assert not (tmp_path / "signed").exists()


def test_an_export_without_referrers_ignores_an_invalid_one(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    document = {**json.loads(SIGNATURE.manifest), "schemaVersion": 3}
    make.attach(cache, "app:1", SIGNATURE._replace(manifest=json.dumps(document).encode()))
    cache.export("app:1", tmp_path / "out")
    with pytest.raises(InvalidManifest, match="schemaVersion"):
        cache.export("app:1", tmp_path / "signed", referrers=True)


def test_a_docker_archive_with_referrers_is_refused(cachedb: Run, signed: Cache, tmp_path: Path) -> None:
    line = check_failure(cachedb("export", "--format", "docker-archive", "--referrers", "app:1", tmp_path / "out"))
    assert "a docker-archive cannot hold referrers: use another format" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_platform_is_exported_with_its_own_referrers(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    data = make.save_index(cache, "app:1", AMD, ARM)
    kind = "application/vnd.example.signature"
    own, others, of_index = (make.artifact(kind, subject=subject) for subject in (ARM.manifest, AMD.manifest, data))
    make.attach(cache, "app:1", own, others, of_index)
    done = cachedb("export", "--referrers", "--platform", "linux/arm64", "app:1", tmp_path / "one")
    assert done.stderr == "cachedb: the export of app:1 lacks 2 referrers: their subjects are not exported\n"
    files = read_contents(tmp_path / "one")
    assert [entry["digest"] for entry in json.loads(files["index.json"])["manifests"]] == [ARM.digest, own.digest]
    assert not files.keys() & {f"blobs/sha256/{make.hex_of(made.manifest)}" for made in (others, of_index)}
    assert cachedb("export", "--referrers", "app:1", tmp_path / "all").stderr == ""
    assert len(json.loads(read_contents(tmp_path / "all")["index.json"])["manifests"]) == 4


def test_a_second_export_into_a_layout_lists_referrers_once(signed: Cache, tmp_path: Path) -> None:
    for _ in range(2):
        signed.export("app:1", tmp_path / "layout", format="oci-dir", referrers=True)
    entries = json.loads((tmp_path / "layout" / "index.json").read_bytes())["manifests"]
    assert [entry["digest"] for entry in entries] == [IMAGE.digest, SIGNATURE.digest, ABOUT.digest]


def test_an_image_in_a_layout_is_replaced_with_its_referrers(signed: Cache, tmp_path: Path) -> None:
    layout, newer = tmp_path / "layout", make.image(7)

    def export(name: str, **options: Any) -> list[str]:
        signed.export(name, layout, format="oci-dir", **options)
        return [entry["digest"] for entry in json.loads((layout / "index.json").read_bytes())["manifests"]]

    for name in ("app:1", "kept:1"):
        export("app:1", referrers=True, tag=name)
    make.save(signed, "app:1", newer)
    kept = [IMAGE.digest, SIGNATURE.digest, ABOUT.digest]
    assert export("app:1") == [*kept, newer.digest], "another name still has the referrers"
    make.save(signed, "kept:1", newer)
    assert export("kept:1") == [newer.digest] * 2


def test_a_replaced_index_takes_along_the_referrers_of_its_manifests(cache: Cache, tmp_path: Path) -> None:
    make.save_index(cache, "app:1", AMD, ARM)
    make.attach(cache, "app:1", make.artifact("application/vnd.example.signature", subject=ARM.manifest))
    cache.export("app:1", tmp_path / "layout", format="oci-dir", referrers=True)
    make.save(cache, "app:1", AMD)
    cache.export("app:1", tmp_path / "layout", format="oci-dir")
    entries = json.loads((tmp_path / "layout" / "index.json").read_bytes())["manifests"]
    assert [entry["digest"] for entry in entries] == [AMD.digest]


@pytest.mark.slow
def test_an_attached_manifest_of_another_subject_is_no_referrer(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    make.attach(cache, "app:1", make.artifact("application/vnd.example.note", subject=AMD.manifest))
    lacks = "the export of app:1 lacks 3 other attached blobs: no format has a place for them"
    for option in ("--referrers", "--format=dir"):
        done = cachedb("export", option, "app:1", tmp_path / f"out{option[:3]}")
        assert (done.returncode, done.stderr) == (0, f"cachedb: {lacks}: save them with `cachedb blob cat`\n")
    assert len(json.loads(read_contents(tmp_path / "out--r")["index.json"])["manifests"]) == 1


# Conversion

DOCKER_IMAGE = make.with_docker_types(IMAGE)


@pytest.mark.parametrize("form", ["docker", "oci-archive", "oci-dir"])
def test_an_image_is_exported_with_oci_media_types(cachedb: Run, cache: Cache, tmp_path: Path, form: Format) -> None:
    make.save(cache, "app:1", DOCKER_IMAGE)
    done = cachedb("export", "--convert", "oci", "--format", form, "app:1", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    files = read_contents(tmp_path / "out")
    (entry,) = json.loads(files["index.json"])["manifests"]
    manifest = files[f"blobs/{entry['digest'].replace(':', '/')}"]
    assert entry["mediaType"] == OCI_MANIFEST
    assert json.loads(manifest) == json.loads(IMAGE.manifest)
    expected = blob_files(IMAGE._replace(manifest=manifest))
    assert {path: data for path, data in files.items() if path.startswith("blobs/")} == expected
    assert not cache.has_blob(entry["digest"])
    assert cache.get_image("app:1").digest == DOCKER_IMAGE.digest


def test_a_manifest_list_is_exported_as_an_index(cache: Cache, tmp_path: Path) -> None:
    amd, arm = make.with_docker_types(AMD), make.with_docker_types(ARM)
    for name, image in (("amd:1", amd), ("arm:1", arm)):
        make.save(cache, name, image)
    cache.save_manifest("app:1", make.docker_list(make.index(amd, arm)))
    cache.export("app:1", tmp_path / "out", convert="oci")
    with Cache.open(tmp_path / "other") as other:
        (converted,) = other.cache_from_tar(tmp_path / "out")
        assert converted.media_type == OCI_INDEX
        assert {blob.media_type for blob in other.get_image_blobs("app:1") if blob.role == "manifest"} == {OCI_MANIFEST}
        assert converted.complete
    cache.export("app:1", tmp_path / "one", convert="oci", platform="linux/arm64")
    (entry,) = json.loads(read_contents(tmp_path / "one")["index.json"])["manifests"]
    assert entry["mediaType"] == OCI_MANIFEST


def test_a_converted_image_with_a_name_by_digest_gets_its_new_digest(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, f"app@{DOCKER_IMAGE.digest}", DOCKER_IMAGE)
    cache.export(f"app@{DOCKER_IMAGE.digest}", tmp_path / "out", convert="oci")
    (entry,) = json.loads(read_contents(tmp_path / "out")["index.json"])["manifests"]
    assert entry["digest"] != DOCKER_IMAGE.digest
    assert entry["annotations"][make.REF_NAME] == f"app@{entry['digest']}"


def test_the_conversion_of_an_image_with_oci_media_types_changes_nothing(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    cache.export("app:1", tmp_path / "out")
    cache.export("app:1", tmp_path / "converted", convert="oci")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "converted").read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_tells_that_skopeo_cannot_find_a_docker_manifest_by_name(
    cachedb: Run, cache: Cache, tmp_path: Path, form: Format
) -> None:
    make.save(cache, "app:1", DOCKER_IMAGE)
    done = cachedb("export", "--format", form, "app:1", tmp_path / "out")
    warning = "skopeo cannot find app:1 by name, because it has Docker media types: add --convert oci"
    assert done.stderr == ("" if form == "docker-archive" else f"cachedb: {warning}\n")
    assert done.returncode == 0


def test_an_export_tells_of_referrers_that_a_conversion_leaves_out(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", DOCKER_IMAGE)
    make.attach(cache, "app:1", make.artifact("application/vnd.example.signature", subject=DOCKER_IMAGE.manifest))
    done = cachedb("export", "--convert", "oci", "--referrers", "app:1", tmp_path / "out")
    assert done.stderr == "cachedb: the export of app:1 lacks 1 referrer: their subjects are not exported\n"


def test_a_conversion_without_a_manifest_to_convert_is_refused(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", DOCKER_IMAGE)
    line = check_failure(cachedb("export", "--convert", "oci", "--format", "docker-archive", "app:1", tmp_path / "out"))
    assert "a docker-archive has no manifest to convert" in line
    with pytest.raises(CacheError, match="images cannot be converted to 'docker': use oci"):
        cache.export("app:1", tmp_path / "out", convert="docker")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


# Folders for skopeo's `dir:`


def read_dir(path: Path) -> dict[str, bytes]:
    files = read_contents(path)
    assert files.pop("version") == b"Directory Transport Version: 1.1\n"
    return files


def dir_files(image: make.ImageContent) -> dict[str, bytes]:
    blobs = {make.hex_of(data): data for data in (image.config, *image.layers)}
    return {"manifest.json": image.manifest, **blobs}


@pytest.mark.parametrize("link", [False, True])
def test_a_dir_has_the_manifest_and_its_blobs(cache: Cache, tmp_path: Path, link: bool) -> None:
    make.save(cache, "app:1", IMAGE)
    cache.export("app:1", tmp_path / "out", format="dir", link=link)
    assert read_dir(tmp_path / "out") == dir_files(IMAGE)


def test_a_dir_of_an_index_has_the_hosts_platform_or_the_named_one(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_index(cache, tmp_path, make.index(AMD, ARM), AMD, ARM)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cache.export("app:1", tmp_path / "host", format="dir")
    assert read_dir(tmp_path / "host") == dir_files(AMD)
    cache.export("app:1", tmp_path / "named", format="dir", platform="linux/arm64")
    assert read_dir(tmp_path / "named") == dir_files(ARM)


def test_a_dir_holds_an_artifact(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", ARTIFACTS["helm"])
    cache.export("app:1", tmp_path / "out", format="dir")
    assert read_dir(tmp_path / "out") == dir_files(ARTIFACTS["helm"])


def test_a_dir_gets_a_converted_manifest(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", DOCKER_IMAGE)
    cache.export("app:1", tmp_path / "out", format="dir", convert="oci")
    assert json.loads((tmp_path / "out" / "manifest.json").read_bytes()) == json.loads(IMAGE.manifest)


def test_an_image_in_a_dir_is_replaced(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    make.save(cache, "app:2", ARM)
    cache.export("app:1", tmp_path / "out", format="dir")
    for name in ("signature-1", "notes.txt"):
        (tmp_path / "out" / name).write_text("by others")
    cache.export("app:2", tmp_path / "out", format="dir")
    assert read_dir(tmp_path / "out") == {**dir_files(ARM), "notes.txt": b"by others"}


def test_an_old_file_that_cannot_be_removed_from_a_dir_fails_no_export(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    cache.export("app:1", tmp_path / "out", format="dir")
    (tmp_path / "out" / ("a" * 64)).mkdir()
    cache.export("app:1", tmp_path / "out", format="dir")
    assert read_dir(tmp_path / "out") == dir_files(IMAGE)


def test_an_image_in_a_dir_stays_if_the_next_one_is_damaged(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    make.save(cache, "app:2", ARM)
    cache.export("app:1", tmp_path / "out", format="dir")
    corrupt_blob(cache, make.digest_of(ARM.layers[1]))
    with pytest.raises(DigestMismatch):
        cache.export("app:2", tmp_path / "out", format="dir")
    assert read_dir(tmp_path / "out") == dir_files(IMAGE)


def test_a_dir_does_not_replace_another_folder(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "version").write_text("2.0\n")
    line = check_failure(cachedb("export", "app:1", f"dir:{tmp_path}/out"))
    assert "out' is neither empty nor a folder of skopeo's dir: transport" in line
    assert os.listdir(tmp_path / "out") == ["version"]


def test_a_dir_with_referrers_or_a_tag_is_refused(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    with pytest.raises(CacheError, match="a dir cannot hold referrers"):
        cache.export("app:1", tmp_path / "out", format="dir", referrers=True)
    with pytest.raises(CacheError, match="stores no tag: leave out the tag 'x'"):
        cache.export("app:1", tmp_path / "out", format="dir", tag="x")
    assert not (tmp_path / "out").exists()


# Transports of skopeo, and names in the archive


@pytest.mark.parametrize(
    ("place", "form"),
    [("docker-archive", "docker-archive"), ("oci-archive", "oci-archive"), ("oci", "oci-dir"), ("dir", "dir")],
)
@pytest.mark.parametrize("option", [[], ["-o"]], ids=["argument", "option"])
def test_a_transport_in_the_destination_sets_the_format(
    cachedb: Run, cache: Cache, tmp_path: Path, place: str, form: Format, option: list[str]
) -> None:
    make.save(cache, "app:1", IMAGE)
    done = cachedb("export", "app:1", *option, f"{place}:{tmp_path}/out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    cache.export("app:1", tmp_path / "expected", format=form)
    assert read_contents(tmp_path / "out") == read_contents(tmp_path / "expected")


def test_a_path_with_a_colon_is_a_path(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    assert cachedb("export", "app:1", "./oci:b.tar", cwd=tmp_path).returncode == 0
    assert "manifest.json" in read_contents(tmp_path / "oci:b.tar")


def test_a_transport_may_write_to_stdout(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    cache.export("app:1", tmp_path / "out", format="docker-archive", tag="other:2")
    piped: Any = cachedb("export", "app:1", "docker-archive:-:other:2", text=False)
    assert piped.stdout == (tmp_path / "out").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["app:1"], "expected names and a destination"),
        (["-o", "b.tar"], "expected names, patterns or --filter"),
        (["--format", "docker", "app:1", "oci:layout"], "DEST begins with another format than --format docker"),
        (["--link", "app:1", "oci-archive:a.tar"], "--link works only with --format oci-dir or dir"),
        (["app:1", "dir:-"], "the format dir cannot be written to stdout"),
    ],
)
def test_a_contradiction_of_destination_and_options_is_a_usage_error(
    cachedb: Run, cache: Cache, tmp_path: Path, arguments: list[str], message: str
) -> None:
    make.save(cache, "app:1", IMAGE)
    done = cachedb("export", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert not {"a.tar", "b.tar", "layout"} & set(os.listdir(tmp_path))


@pytest.mark.parametrize("format", FORMATS)
def test_several_images_are_exported_to_one_archive_and_share_its_blobs(
    cache: Cache, tmp_path: Path, format: Format
) -> None:
    images = {"team/a:1": IMAGE, "team/b:1": make.image(1, 3, compression="gzip"), "other:1": make.image(9)}
    for name, made in images.items():
        make.save(cache, name, made)
    cache.tag("team/a:1", "team/same:1")
    path = tmp_path / "all"
    exported = cache.export("team/*", path, format=format)
    assert exported == ["team/a:1", "team/b:1", "team/same:1"]
    contents = read_contents(path)
    assert list(contents.values()).count(IMAGE.layers[0]) == 1
    with Cache.open(tmp_path / "other") as other:
        other.cache_from_tar(path)
        assert other.list_names() == exported
        for image in other.list_manifests():
            assert image.complete
            # A docker-archive does not hold the manifests.
            assert format == "docker-archive" or image.digest == cache.get_image(image.name).digest
    again = tmp_path / "again"
    cache.export(["team/same:1", "team/b:1", "team/a:1"], again, format=format)
    assert read_contents(again).keys() == contents.keys()


def test_several_images_replace_those_of_their_names_in_a_layout(cache: Cache, tmp_path: Path) -> None:
    for number, name in enumerate(("team/a:1", "team/b:1", "other:1")):
        make.save(cache, name, make.image(number))
    cache.export("*", tmp_path / "layout", format="oci-dir")
    make.save(cache, "team/b:1", IMAGE)
    cache.export("team/*", tmp_path / "layout", format="oci-dir")
    index = json.loads((tmp_path / "layout" / "index.json").read_bytes())
    found = {entry["annotations"][make.REF_NAME]: entry["digest"] for entry in index["manifests"]}
    assert len(index["manifests"]) == len(found)
    assert found == {str(image.name): image.digest for image in cache.list_manifests()}


@pytest.mark.slow
def test_a_selection_of_no_image_writes_nothing(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    assert cache.export([], tmp_path / "none") == []
    assert cache.export("app:*", tmp_path / "none", filters=Filters(incomplete=True)) == []
    done = cachedb("export", "nope*", tmp_path / "none", "--ignore-missing")
    assert (done.returncode, done.stderr) == (0, "no image matches: nothing is exported\n")
    assert cachedb("export", "nope*", tmp_path / "none").returncode == 3
    assert not (tmp_path / "none").exists()
    assert cachedb("export", "--filter", "incomplete=false", tmp_path / "one").returncode == 0
    assert (tmp_path / "one").exists()


def test_only_one_image_gets_a_tag_or_a_folder_for_dir(cache: Cache, tmp_path: Path) -> None:
    for name in ("app:1", "app:2"):
        make.save(cache, name, IMAGE)
    for options in ({"tag": "other:1"}, {"format": "dir"}):
        with pytest.raises(CacheError, match="2 are exported: export them one by one"):
            cache.export("app:*", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_format_may_repeat_the_transport(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    assert cachedb("export", "--format", "oci-dir", "app:1", f"oci:{tmp_path}/out").returncode == 0


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("2", ("2", "docker.io/library/app:2")),
        ("other:2", ("other:2", "docker.io/library/other:2")),
        ("quay.io/team/app", ("quay.io/team/app", "quay.io/team/app:latest")),
        (f"other@{IMAGE.digest}", (f"other@{IMAGE.digest}", f"docker.io/library/other@{IMAGE.digest}")),
    ],
)
def test_a_tag_names_the_image_in_a_layout(
    cachedb: Run, cache: Cache, tmp_path: Path, tag: str, expected: tuple[str, str]
) -> None:
    make.save(cache, "app:1", IMAGE)
    assert cachedb("export", "app:1", f"oci:{tmp_path}/out:{tag}").returncode == 0
    (entry,) = json.loads((tmp_path / "out" / "index.json").read_bytes())["manifests"]
    names = entry["annotations"]
    assert (names[make.REF_NAME], names["io.containerd.image.name"]) == expected


@pytest.mark.parametrize(("tag", "expected"), [("other", "other:latest"), ("team/other:2", "team/other:2")])
def test_a_tag_names_the_image_in_a_docker_archive(
    cachedb: Run, cache: Cache, tmp_path: Path, tag: str, expected: str
) -> None:
    make.save(cache, "app:1", IMAGE)
    assert cachedb("export", "app:1", f"docker-archive:{tmp_path}/out:{tag}").returncode == 0
    assert json.loads(read_contents(tmp_path / "out")["manifest.json"])[0]["RepoTags"] == [expected]


def test_a_tag_replaces_the_image_of_that_tag_in_a_layout(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", IMAGE)
    make.save(cache, "app:2", ARM)
    for name, tag in (("app:1", "latest"), ("app:1", "old"), ("app:2", "latest")):
        cache.export(name, tmp_path / "out", format="oci-dir", tag=tag)
    entries = json.loads((tmp_path / "out" / "index.json").read_bytes())["manifests"]
    found = {entry["annotations"][make.REF_NAME]: entry["digest"] for entry in entries}
    assert found == {"old": IMAGE.digest, "latest": ARM.digest}


@pytest.mark.parametrize("tag", ["a b", "Team/app:1", "", "-x", f"app@{ARM.digest}"])
def test_an_invalid_tag_is_refused(cache: Cache, tmp_path: Path, tag: str) -> None:
    make.save(cache, "app:1", IMAGE)
    with pytest.raises(InvalidName):
        cache.export("app:1", tmp_path / "out", format="oci-dir", tag=tag)
    assert not (tmp_path / "out").exists()


# Image layout folders


def test_an_image_is_added_to_an_existing_layout(cache: Cache, tmp_path: Path) -> None:
    two = make.image(1, 3)
    layout = make.write(tmp_path / "layout", make.oci_files({"theirs:1": two, "app:1": make.image(7)}))
    import_image(cache, tmp_path)
    cache.export("app:1", layout, format="oci-dir")
    files = read_contents(layout)
    assert list_names(files["index.json"]) == ["theirs:1", "app:1"]
    assert blob_files(IMAGE, two).items() <= files.items()
    with Cache.open(tmp_path / "other") as other:
        assert {str(image.name): image.digest for image in other.cache_from_tar(layout)} == {
            "app:1": IMAGE.digest,
            "theirs:1": two.digest,
        }


def test_an_empty_folder_becomes_a_layout(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    (tmp_path / "out").mkdir()
    cache.export("app:1", tmp_path / "out", format="oci-dir")
    assert (tmp_path / "out" / "index.json").is_file()


def test_a_folder_with_other_files_is_refused(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    line = check_failure(cachedb("export", "--format", "oci-dir", "app:1", tmp_path / "out"))
    assert "neither empty nor an OCI image layout" in line
    assert os.listdir(tmp_path / "out") == ["letter.txt"]


@pytest.mark.parametrize("index", [b"null", b"[]", b"{}", b'{"manifests": 1}', b"not JSON"])
def test_a_layout_whose_index_cannot_be_read_is_refused(cache: Cache, tmp_path: Path, index: bytes) -> None:
    import_image(cache, tmp_path)
    make.write(tmp_path / "layout", {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index})
    with pytest.raises(CacheError, match=r"index\.json"):
        cache.export("app:1", tmp_path / "layout", format="oci-dir")
    assert (tmp_path / "layout" / "index.json").read_bytes() == index


def test_entries_of_a_layout_without_a_name_are_kept(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    entries: list[object] = [{"digest": "x"}, {"annotations": None}, {"annotations": {"a": "b"}}, "odd"]
    index = json.dumps({"schemaVersion": 2, "manifests": entries, "annotations": {"own": "kept"}}).encode()
    make.write(tmp_path / "layout", {"oci-layout": b"{}", "index.json": index})
    cache.export("app:1", tmp_path / "layout", format="oci-dir")
    written = json.loads((tmp_path / "layout" / "index.json").read_bytes())
    assert written["manifests"][:-1] == entries
    assert written["annotations"] == {"own": "kept"}


@pytest.mark.slow
def test_concurrent_exports_into_one_new_layout_are_all_in_it(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    names = [f"app:{number}" for number in range(6)]
    for number, name in enumerate(names):
        import_image(cache, tmp_path, make.image(100, number), name)
    results: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(
            target=lambda name=name: results.append(cachedb("export", "--format", "oci-dir", name, tmp_path / "layout"))
        )
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(done.returncode, done.stderr) for done in results] == [(0, "")] * len(names)
    assert sorted(list_names((tmp_path / "layout" / "index.json").read_bytes())) == names


def test_an_export_into_a_layout_waits_for_another(cache: Cache, tmp_path: Path, waits: threading.Event) -> None:
    import_image(cache, tmp_path)
    layout = tmp_path / "layout"
    layout.mkdir()
    lock = os.open(layout, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (layout / ".half-written").write_bytes(b"")  # of the export that has the lock and has not written `oci-layout` yet
    thread = threading.Thread(target=cache.export, args=("app:1", layout), kwargs={"format": "oci-dir"})
    thread.start()
    assert waits.wait(60)
    assert thread.is_alive()
    (layout / ".half-written").unlink()
    os.close(lock)
    thread.join()
    assert list_names((layout / "index.json").read_bytes()) == ["app:1"]


def test_all_blobs_of_a_layout_are_synced_before_its_index(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_image(cache, tmp_path)
    layout, synced, renamed = tmp_path / "layout", set[int](), list[str]()  # a file has no name when it is synced
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        if layout in target.parents:
            assert self.stat().st_ino in synced, "a file was renamed before it was synced"
            # A later rename into a folder makes another sync of the folder necessary.
            synced.discard(target.parent.stat().st_ino)
            renamed.append(target.name)
            if target.name == "index.json":
                folders = (tmp_path, layout / "blobs", layout / "blobs" / "sha256")
                assert {path.stat().st_ino for path in folders} <= synced
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    cache.export("app:1", layout, format="oci-dir")
    assert renamed[-1] == "index.json"
    assert len(renamed) == 6
    assert layout.stat().st_ino in synced


def test_an_archive_and_its_folder_are_synced_when_the_call_returns(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_image(cache, tmp_path)
    (tmp_path / "sub").mkdir()
    synced, real = list[int](), os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    cache.export("app:1", tmp_path / "sub" / "out")
    assert synced[-2:] == [(tmp_path / "sub" / "out").stat().st_ino, (tmp_path / "sub").stat().st_ino]


# Links


def compare_with_cache(cache: Cache, layout: Path) -> set[bool]:
    """Return whether the blobs of a layout are the cache's own files; both answers if some are and some are not."""
    return {
        os.path.samefile(path, cache.get_blob_path(f"{path.parent.name}:{path.name}"))
        for path in (layout / "blobs").rglob("*")
        if path.is_file()
    }


def test_a_linked_layout_shares_the_files_of_the_cache(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    calls: list[tuple[int, int]] = []
    cache.export(
        "app:1", tmp_path / "linked", format="oci-dir", link=True, progress=lambda *counts: calls.append(counts)
    )
    cache.export("app:1", tmp_path / "copied", format="oci-dir")
    assert compare_with_cache(cache, tmp_path / "linked") == {True}
    assert compare_with_cache(cache, tmp_path / "copied") == {False}
    assert read_contents(tmp_path / "linked") == read_contents(tmp_path / "copied")
    total = sum(len(data) for data in IMAGE.blobs.values())
    assert calls[-1] == (total, total)


def test_an_export_replaces_links_and_copies_in_a_layout(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    for link in (False, True, True):
        cache.export("app:1", tmp_path / "layout", format="oci-dir", link=link)
        assert compare_with_cache(cache, tmp_path / "layout") == {link}
    assert len(read_contents(tmp_path / "layout")) == 6  # no temporary file is left
    cache.export("app:1", tmp_path / "layout", format="oci-dir")
    assert compare_with_cache(cache, tmp_path / "layout") == {False}
    assert read_contents(tmp_path / "layout").keys() >= blob_files(IMAGE).keys()


def test_blobs_that_cannot_be_linked_are_copied(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_image(cache, tmp_path)

    def refuse(source: object, target: object, **_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    cache.export("app:1", tmp_path / "layout", format="oci-dir", link=True)
    assert compare_with_cache(cache, tmp_path / "layout") == {False}
    assert read_contents(tmp_path / "layout").items() >= blob_files(IMAGE).items()


def test_a_linked_layout_survives_the_removal_of_its_image(cache: Cache, directory: Path, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    cache.export("app:1", tmp_path / "layout", format="oci-dir", link=True)
    cache.remove_manifest("app:1")
    cache.collect_garbage()
    assert files_of(directory) == {}
    assert cache.cache_from_tar(tmp_path / "layout")[0].digest == IMAGE.digest


def test_links_are_refused_for_archives(cachedb: Run, cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    assert "oci-dir" in check_failure(cachedb("export", "--link", "app:1", tmp_path / "out"), 2)
    assert not (tmp_path / "out").exists()


# Reflinks, formats and errors


def test_blobs_are_cloned_if_the_file_system_can(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_image(cache, tmp_path, make.image(1, size=3_000_000))
    cache.export("app:1", tmp_path / "copied", format="oci-dir")
    cloned: list[int] = []

    def clone(target: int, _request: int, source: int) -> None:
        cloned.append(os.write(target, os.pread(source, 100_000_000, 0)))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    cache.export("app:1", tmp_path / "cloned", format="oci-dir")
    assert sum(cloned) > 3_000_000
    assert read_contents(tmp_path / "cloned") == read_contents(tmp_path / "copied")
    corrupt_blob(cache, make.digest_of(make.image(1, size=3_000_000).layers[0]))
    with pytest.raises(DigestMismatch, match="is damaged"):
        cache.export("app:1", tmp_path / "rotten", format="oci-dir")
    assert not (tmp_path / "rotten").exists()


def test_an_unknown_format_is_an_error(cache: Cache, cachedb: Run, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    with pytest.raises(CacheError, match="'zip' is not a format"):
        cache.export("app:1", tmp_path / "out", format="zip")  # type: ignore[arg-type]
    check_failure(cachedb("export", "--format", "zip", "app:1", tmp_path / "out"), 2)


def test_an_image_layout_cannot_go_to_a_stream(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    with pytest.raises(CacheError, match="give its path"):
        cache.export("app:1", io.BytesIO(), format="oci-dir")


def test_errors_of_the_file_system_are_storage_errors(cache: Cache, tmp_path: Path) -> None:
    import_image(cache, tmp_path)
    (tmp_path / "file").write_bytes(b"")
    for form in FORMATS:
        with pytest.raises(StorageError, match="cannot write the export"):
            cache.export("app:1", tmp_path / "file" / "out", format=form)  # type: ignore[arg-type]
        with pytest.raises(StorageError, match="cannot write the export"):
            cache.export("app:1", tmp_path / ("x" * 300), format=form)  # type: ignore[arg-type]


def test_a_folder_that_is_no_layout_keeps_all_its_files(cache: Cache, tmp_path: Path) -> None:
    made = make.image(1)
    for digest, data in made.blobs.items():
        cache.save_blob(digest, data)
    cache.save_manifest("app:1", made.manifest)
    others = [tmp_path / "out" / ".cachedb-0123.part", tmp_path / "out" / "other" / ".cachedb-0123.part"]
    others[1].parent.mkdir(parents=True)
    for path in others:
        path.touch()
    with pytest.raises(CacheError, match=r"neither empty nor an OCI image layout: name another folder$"):
        cache.export("app:1", tmp_path / "out", format="oci-dir")
    assert all(path.exists() for path in others)
