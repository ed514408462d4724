"""Reading archives and layouts: which images are imported, and which input is refused without leaving anything."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import random
import resource
import secrets
import shutil
import socket
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachedb import Cache
from cachedb.content import publish
from cachedb.disk import writer
from cachedb.errors import CacheError, DigestMismatch, InvalidArchive, InvalidManifest, InvalidName, StorageError
from cachedb.oci.manifests import DOCKER_LIST, OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from cachedb.oci.names import Name
from cachedb.transports.archive import compression as compression_
from cachedb.transports.archive import files as files_module
from cachedb.transports.archive import model, unpack_limit
from cachedb.transports.archive import read as archive
from cachedb.transports.archive.names import Wanted
from tests.conftest import Run, snapshot
from tests.support import make
from tests.support.make import digest_of, hex_of, tar_of

CONTAINERD_NAME = "io.containerd.image.name"
ANY: list[object] = [
    None,
    True,
    0,
    -1,
    1.5,
    2**70,
    "",
    "x",
    "a\nb",
    "../x",
    [],
    {},
    [[]],
    [None],
    {"x": 1},
    "sha256:" + "0" * 64,
]

EXAMPLES = int(os.environ.get("CACHEDB_FUZZ", "60"))
"""Number of examples of each fuzz test; a higher CACHEDB_FUZZ makes them longer."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a cache with one image that shares no blob with the imported ones."""
    directory = tmp_path_factory.mktemp("template") / "cache"
    with Cache.open(directory) as cache:
        cache.cache_from_tar(tar_file(make.docker_files({"kept:1": make.image(1000)})))
    return directory


@pytest.fixture
def unchanged(template: Path, directory: Path) -> Iterator[Cache]:
    """Open a cache, and check after the test that nothing in it has changed."""
    shutil.copytree(template, directory)
    before = snapshot(directory)
    with Cache.open(directory) as cache:
        yield cache
    assert snapshot(directory) == before


def tar_file(files: dict[str, bytes]) -> BinaryIO:
    return io.BytesIO(tar_of(files))


def short(data: object) -> str:
    """Return the id of a test with this parameter."""
    return data[:4].hex() if isinstance(data, bytes) else str(data)[:20]


def small_tar(files: dict[str, bytes]) -> bytes:
    """Return a tar that ends after two blocks of zeros, as Go writes it; Python and GNU tar pad it to 10 kB."""
    data = tar_of(files).rstrip(b"\0")
    return data + bytes(-len(data) % 512 + 1024)


def tiny_docker(layer: bytes = b"not a tar, which is not checked") -> dict[str, bytes]:
    config = json.dumps({"rootfs": {"diff_ids": [digest_of(layer)]}}).encode()
    entries = [{"Config": "config.json", "RepoTags": ["app:1"], "Layers": ["layer.tar"]}]
    return {"manifest.json": json.dumps(entries).encode(), "config.json": config, "layer.tar": layer}


def tiny_oci() -> dict[str, bytes]:
    return oci_of(
        {"schemaVersion": 2, "config": make.descriptor(b"{}", OCI_CONFIG), "layers": [make.descriptor(b"x", OCI_LAYER)]}
    )


def oci_of(manifest: object, *blobs: bytes, media_type: str = OCI_MANIFEST, name: str = "app:1") -> dict[str, bytes]:
    """Return the files of an image layout: a manifest, the config `{}`, the layer `x` and the given blobs."""
    data = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    index = {"manifests": [make.descriptor(data, media_type, annotations={make.REF_NAME: name})]}
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index).encode()}
    return files | {f"blobs/sha256/{hex_of(blob)}": blob for blob in (data, b"{}", b"x", *blobs)}


def make_header(name: str, size: int = 0, kind: bytes = b"0", link: str = "", **fields: Any) -> bytes:
    """Return a member's header block in GNU format, which allows negative and huge sizes."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, kind, link
    for key, value in fields.items():
        setattr(member, key, value)
    return member.tobuf(format=tarfile.GNU_FORMAT)


def pad_block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def prepend_members(*members: bytes, files: dict[str, bytes] | None = None) -> BinaryIO:
    """Return a valid archive with more members before its own."""
    return io.BytesIO(b"".join(members) + tar_of(files if files is not None else tiny_docker()))


def make_pax(records: bytes, kind: bytes = b"x") -> bytes:
    return make_header("pax", len(records), kind) + pad_block(records)


def make_record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text) + len(str(len(text)))
    length = len(text) + len(str(length))
    return str(length).encode() + text


def import_refused(
    cache: Cache, source: str | Path | BinaryIO, error: type[CacheError] = InvalidArchive, name: str | None = None
) -> str:
    """Import a source that must be refused; return the message, which must be one printable line."""
    with pytest.raises(CacheError) as caught:
        cache.cache_from_tar(source, name)
    message = str(caught.value)
    assert caught.type is error, message
    assert message.isprintable(), message
    assert 10 < len(message) < 500, message
    return message


def read_state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


def make_spool_factory(folder: Path) -> Callable[[], FileIO]:
    def new() -> FileIO:
        file = FileIO(folder / "spool", "xb+")
        (folder / "spool").unlink()
        return file

    return new


def read_images(source: Path | BinaryIO, tmp_path: Path, name: Name | None = None) -> list[model.NamedImage]:
    with files_module.open_files(source, make_spool_factory(tmp_path)) as files:
        return archive.read_images(files, Wanted(name))


def list_names(cache: Cache) -> list[str]:
    return [str(image.name) for image in cache.list_manifests()]


def list_layers(cache: Cache, name: str) -> list[tuple[str, str]]:
    return [(blob.digest, blob.media_type) for blob in cache.get_image_blobs(name) if blob.role == "layer"]


def assert_verified(cache: Cache) -> None:
    """Check that all images are complete and that every blob has its digest."""
    for image in cache.list_manifests():
        assert image.complete
        for blob in cache.get_image_blobs(image.name):
            assert digest_of(cache.get_blob(blob.digest), blob.digest.partition(":")[0]) == blob.digest


# Docker archives


@pytest.mark.parametrize("last", [True, False])
def test_manifest_json_may_be_first_or_last(cache: Cache, last: bool) -> None:
    made = make.image(1, 2)
    files = make.docker_files({"app:1": made})
    if not last:
        files = {"manifest.json": files["manifest.json"], **files}
    (image,) = cache.cache_from_tar(tar_file(files))
    assert (str(image.name), image.complete, image.media_type) == ("app:1", True, OCI_MANIFEST)
    assert list_layers(cache, "app:1") == [(digest_of(layer), OCI_LAYER) for layer in made.layers]
    assert json.loads(cache.get_manifest("app:1"))["config"]["digest"] == digest_of(made.config)


def test_a_docker_archive_gives_the_same_manifest_each_time(cache: Cache) -> None:
    files = make.docker_files({"app:1": make.image(1, 2)})
    (first,) = cache.cache_from_tar(tar_file(files))
    (second,) = cache.cache_from_tar(tar_file(dict(reversed(files.items()))))
    assert first.digest == second.digest


def test_several_images_and_names_are_imported_and_share_blobs(cache: Cache) -> None:
    files = make.docker_files({"app:1": make.image(1, 2), "app:2": make.image(1, 3)})
    entries = json.loads(files["manifest.json"])
    entries[0]["RepoTags"].append("registry:5000/team/app:one")
    cache.cache_from_tar(tar_file({**files, "manifest.json": json.dumps(entries).encode()}))
    assert list_names(cache) == ["app:1", "app:2", "registry:5000/team/app:one"]
    assert cache.get_image("app:1").digest == cache.get_image("registry:5000/team/app:one").digest
    assert cache.get_stats().blob_count == 2 + 2 + 3  # manifests, configs, layers
    assert_verified(cache)


@pytest.mark.parametrize("files", [make.docker_files({"": make.image(1)}), make.oci_files({"": make.image(1)})])
def test_an_image_without_a_name_takes_the_one_given(unchanged: Cache, tmp_path: Path, files: dict[str, bytes]) -> None:
    assert "cachedb import SOURCE NAME" in import_refused(unchanged, tar_file(files))
    with Cache.open(tmp_path / "other") as cache:
        (image,) = cache.cache_from_tar(tar_file(files), "given:1")
        assert str(image.name) == "given:1"


def test_a_name_cannot_be_given_to_several_images(unchanged: Cache) -> None:
    files = {"app:1": make.image(1), "app:2": make.image(2)}
    assert "2 images" in import_refused(unchanged, tar_file(make.docker_files(files)), name="given:1")
    assert "2 images" in import_refused(unchanged, tar_file(make.oci_files(files)), name="given:1")


def test_a_given_name_replaces_an_invalid_one_in_the_archive(tmp_path: Path) -> None:
    for files in (make.docker_files({"BAD": make.image(1)}), make.oci_files({"BAD": make.image(1)})):
        (image,) = read_images(tar_file(files), tmp_path, Name.parse("given:1"))
        assert image.names == [Name("given", "1")]
    two = make.docker_files({"app:1": make.image(1), "app:2": make.image(2)})
    with pytest.raises(InvalidArchive, match="2 images"):
        read_images(tar_file(two), tmp_path, Name.parse("given:1"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_layer_may_be_a_link_to_another(cache: Cache, kind: bytes) -> None:
    layer = make.layer(1)
    config = json.dumps({"rootfs": {"diff_ids": [digest_of(layer)] * 2}}).encode()
    entries = [{"Config": "c.json", "RepoTags": ["app:1"], "Layers": ["one/layer.tar", "two/layer.tar"]}]
    files = {"manifest.json": json.dumps(entries).encode(), "c.json": config, "one/layer.tar": layer}
    target = "../one/layer.tar" if kind == tarfile.SYMTYPE else "one/layer.tar"
    cache.cache_from_tar(prepend_members(make_header("two/layer.tar", 0, kind, target), files=files))
    assert list_layers(cache, "app:1") == [(digest_of(layer), OCI_LAYER)] * 2
    assert cache.get_stats().blob_count == 3


def test_a_configs_file_may_be_named_by_its_digest(cache: Cache) -> None:
    files = make.docker_files({"app:1": make.image(1)})
    (entry,) = json.loads(files["manifest.json"])
    config = files.pop(entry["Config"])
    entry["Config"] = digest_of(config)
    cache.cache_from_tar(tar_file({**files, digest_of(config): config, "manifest.json": json.dumps([entry]).encode()}))
    assert cache.is_image_complete("app:1")


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_layers_of_a_docker_archive_are_unchanged(cache: Cache, compression: str) -> None:
    made = make.image(1, 2, compression=compression)
    cache.cache_from_tar(tar_file(make.docker_files({"app:1": made})))
    kind = f"{OCI_LAYER}+{compression}"
    assert list_layers(cache, "app:1") == [(digest_of(layer), kind) for layer in made.layers]
    assert_verified(cache)


def test_a_layer_may_have_several_gzip_members_and_padding(cache: Cache) -> None:
    plain = make.random_bytes(3_000_000, 1)
    parts = [make.gzipped(plain[start : start + 700_000]) for start in range(0, len(plain), 700_000)]
    files = tiny_docker(plain) | {"layer.tar": b"".join(parts) + bytes(1000)}
    cache.cache_from_tar(tar_file(files))
    assert cache.is_image_complete("app:1")


def test_a_layer_whose_first_file_name_looks_like_a_magic_number_is_not_compressed(cache: Cache) -> None:
    layer = tar_of({"BZh9.txt": b"x"})
    cache.cache_from_tar(tar_file(tiny_docker(layer)))
    assert list_layers(cache, "app:1") == [(digest_of(layer), OCI_LAYER)]


def test_a_layer_that_occurs_twice_in_an_image_is_stored_once(cache: Cache) -> None:
    made = make.image(1, 1, compression="gzip")
    for files in (make.docker_files({"app:1": made}), make.oci_files({"app:2": made})):
        (image,) = cache.cache_from_tar(tar_file(files))
        assert list_layers(cache, str(image.name)) == [(digest_of(made.layers[0]), f"{OCI_LAYER}+gzip")] * 2
    assert_verified(cache)


@pytest.mark.parametrize("layers", [[], None])
def test_an_image_without_layers_is_imported(cache: Cache, layers: object) -> None:
    entries = [{"Config": "c.json", "RepoTags": ["app:1"], "Layers": layers}]
    files = {"c.json": b'{"rootfs":{"type":"layers"}}', "manifest.json": json.dumps(entries).encode()}
    cache.cache_from_tar(tar_file(files))
    assert cache.is_image_complete("app:1")


@pytest.mark.parametrize("files", [tiny_docker(), tiny_oci()])
def test_names_of_members_may_begin_with_a_dot_and_folders_are_ignored(cache: Cache, files: dict[str, bytes]) -> None:
    dotted = {f"./{name}": data for name, data in files.items()}
    cache.cache_from_tar(prepend_members(make_header("./", 0, b"5"), make_header("blobs/", 0, b"5"), files=dotted))
    assert cache.is_image_complete("app:1")


def test_the_last_of_two_members_with_one_name_is_used(cache: Cache) -> None:
    cache.cache_from_tar(prepend_members(make_header("layer.tar", 3) + pad_block(b"old")))
    assert cache.is_image_complete("app:1")


# OCI archives and layouts


@pytest.mark.parametrize("target", ["app.tar", "layout"])
@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_an_oci_image_keeps_its_digest_and_bytes(cache: Cache, tmp_path: Path, target: str, compression: str) -> None:
    made = make.image(1, 2, compression=compression)
    (image,) = cache.cache_from_tar(make.write(tmp_path / target, make.oci_files({"app:1": made})))
    assert (image.digest, image.complete, str(image.name)) == (made.digest, True, "app:1")
    assert {blob.digest: cache.get_blob(blob.digest) for blob in cache.get_image_blobs("app:1")} == made.blobs


def test_nested_indexes_are_imported_with_all_platforms(cache: Cache) -> None:
    amd, arm = make.image(1, 2), make.image(1, 3, architecture="arm64")
    inner = make.index(amd, arm)
    outer = json.dumps(
        {"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [make.descriptor(inner, OCI_INDEX)] * 2}
    ).encode()
    files = make.oci_files({"": amd, "b": arm}, roots={"multi:1": inner})
    index = {"manifests": [make.descriptor(outer, DOCKER_LIST, annotations={make.REF_NAME: "multi:1"})]}
    files |= {f"blobs/sha256/{hex_of(outer)}": outer, "index.json": json.dumps(index).encode()}
    (image,) = cache.cache_from_tar(tar_file(files))
    assert (image.digest, image.media_type) == (digest_of(outer), DOCKER_LIST)
    found = {blob.digest for blob in cache.get_image_blobs("multi:1")}
    assert found == {digest_of(outer), digest_of(inner), *amd.blobs, *arm.blobs}
    assert_verified(cache)


def test_platforms_listed_beside_their_index_are_no_images_of_their_own(cache: Cache) -> None:
    amd, arm = make.image(1), make.image(2)
    files = make.oci_files({"": amd, "b": arm}, roots={"multi:1": make.index(amd, arm)})
    index = json.loads(files["index.json"])
    index["manifests"] += [make.descriptor(made.manifest, OCI_MANIFEST) for made in (amd, arm)]
    cache.cache_from_tar(tar_file({**files, "index.json": json.dumps(index).encode()}))
    assert list_names(cache) == ["multi:1"]


def test_an_archive_in_both_formats_is_read_as_oci_with_the_names_of_docker(cache: Cache) -> None:
    made = make.image(1, compression="gzip")
    files = make.oci_files({"": made})
    annotations = {CONTAINERD_NAME: "docker.io/library/app:1", make.REF_NAME: "1"}
    index = {"manifests": [make.descriptor(made.manifest, OCI_MANIFEST, annotations=annotations)]}
    paths = [f"blobs/sha256/{hex_of(data)}" for data in (made.config, *made.layers)]
    entries = [{"Config": paths[0], "RepoTags": ["app:1", "app:stable"], "Layers": paths[1:]}]
    files |= {"index.json": json.dumps(index).encode(), "manifest.json": json.dumps(entries).encode()}
    cache.cache_from_tar(tar_file(files))
    assert list_names(cache) == ["app:1", "app:stable"]
    assert cache.get_image("app:1").digest == made.digest


@pytest.mark.parametrize(
    ("annotations", "name"),
    [
        ({make.REF_NAME: "registry:5000/app:1"}, "registry:5000/app:1"),
        ({make.REF_NAME: "1", CONTAINERD_NAME: "docker.io/library/app:1"}, "docker.io/library/app:1"),
        ({make.REF_NAME: "docker.io/library/app:1", CONTAINERD_NAME: "other:2"}, "docker.io/library/app:1"),
        ({CONTAINERD_NAME: "app:1"}, "app:1"),
    ],
)
def test_the_annotation_with_a_full_name_is_used(tmp_path: Path, annotations: dict[str, str], name: str) -> None:
    files = tiny_oci()
    index = json.loads(files["index.json"])
    index["manifests"][0]["annotations"] = annotations
    (image,) = read_images(tar_file({**files, "index.json": json.dumps(index).encode()}), tmp_path)
    assert list(map(str, image.names)) == [name]


def test_digests_may_be_sha512(cache: Cache) -> None:
    layer = {"mediaType": OCI_LAYER, "digest": digest_of(b"y", "sha512"), "size": 1}
    files = oci_of({"schemaVersion": 2, "config": make.descriptor(b"{}", OCI_CONFIG), "layers": [layer]})
    cache.cache_from_tar(tar_file({**files, f"blobs/sha512/{digest_of(b'y', 'sha512').partition(':')[2]}": b"y"}))
    assert list_layers(cache, "app:1") == [(layer["digest"], OCI_LAYER)]
    assert_verified(cache)


def layout_blob(folder: Path, data: bytes) -> Path:
    return folder / "blobs" / "sha256" / hex_of(data)


def test_the_files_of_a_layout_are_linked_if_asked_for(cache: Cache, tmp_path: Path) -> None:
    made = make.image(1, 2)
    folder = make.write(tmp_path / "layout", make.oci_files({"app:1": made}))
    cache.cache_from_tar(folder, link=True)
    for digest, data in made.blobs.items():
        assert cache.get_blob_path(digest).samefile(layout_blob(folder, data))
    assert cache.verify().problems == []
    cache.export("app:1", tmp_path / "again", format="oci-dir", link=True)
    assert layout_blob(tmp_path / "again", made.manifest).samefile(layout_blob(folder, made.manifest))


def test_a_file_of_a_layout_that_cannot_be_linked_is_copied(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, link = make.image(1, 2), os.link
    folder = make.write(tmp_path / "layout", make.oci_files({"app:1": made}))
    link_path = layout_blob(folder, made.config)
    link_path.rename(tmp_path / "config")
    link_path.symlink_to(tmp_path / "config")
    unlinkable = layout_blob(folder, made.layers[0])

    def refuse_across(source: str, target: Path, **options: Any) -> None:
        if Path(source) == unlinkable:
            raise OSError(18, "Invalid cross-device link")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", refuse_across)
    (image,) = cache.cache_from_tar(folder, link=True)
    assert image.complete
    for data, linked in ((made.config, False), (made.layers[0], False), (made.layers[1], True)):
        path = cache.get_blob_path(digest_of(data))
        assert path.samefile(layout_blob(folder, data)) is linked
        assert not path.is_symlink()
        assert path.read_bytes() == data


def test_a_file_that_changes_before_it_is_copied_instead_of_linked_is_refused(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make.image(1)
    folder = make.write(tmp_path / "layout", make.oci_files({"app:1": made}))

    def change_and_refuse(source: str, target: Path, **options: Any) -> None:
        Path(source).write_bytes(Path(source).read_bytes()[::-1])
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", change_and_refuse)
    with pytest.raises(DigestMismatch):
        cache.cache_from_tar(folder, link=True)
    assert (cache.list_manifests(), cache.list_blobs()) == ([], [])


@pytest.mark.parametrize("writer", ["another user", "everybody"])
def test_a_file_that_other_users_can_write_to_is_copied(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    made = make.image(1, 2)
    folder = make.write(tmp_path / "layout", make.oci_files({"app:1": made}))
    if writer == "everybody":
        layout_blob(folder, made.config).chmod(0o666)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    (image,) = cache.cache_from_tar(folder, link=True)
    assert image.complete
    path = cache.get_blob_path(digest_of(made.config))
    assert not path.samefile(layout_blob(folder, made.config))
    assert path.stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("kind", ["linked", "others can write to it", "the cache is shared", "it is a link"])
def test_a_damaged_file_of_a_layout_is_neither_linked_nor_copied(cache: Cache, tmp_path: Path, kind: str) -> None:
    made = make.image(1, 2)
    folder = make.write(tmp_path / "layout", make.oci_files({"app:1": made}))
    damaged = layout_blob(folder, made.layers[1])
    damaged.write_bytes(made.layers[1][:-1] + b"!")
    if kind == "others can write to it":
        damaged.chmod(0o666)
    elif kind == "the cache is shared":
        cache.share()
    elif kind == "it is a link":
        damaged.rename(tmp_path / "layer")
        damaged.symlink_to(tmp_path / "layer")
    with pytest.raises(DigestMismatch):
        cache.cache_from_tar(folder, link=True)
    assert (cache.list_manifests(), cache.list_blobs()) == ([], [])


@pytest.mark.parametrize("change", ["replaced", "grown", "changed"])
def test_a_file_of_a_layout_that_changes_while_it_is_linked_is_refused(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    made, link = make.image(1, 2), os.link
    folder = make.write(tmp_path / "layout", make.oci_files({"app:1": made}))
    layer = made.layers[1]
    victim = layout_blob(folder, layer)
    os.utime(victim, (0, 0))  # otherwise both writes could get the same modification time

    def change_and_link(source: str, target: Path, **options: Any) -> None:
        if Path(source) == victim:
            if change == "replaced":
                victim.unlink()
            victim.write_bytes({"replaced": b"something else", "grown": layer + b"!", "changed": layer[::-1]}[change])
        link(source, target, **options)

    monkeypatch.setattr(os, "link", change_and_link)
    with pytest.raises(StorageError, match=f"layer {digest_of(layer)} was replaced or written to while it was read"):
        cache.cache_from_tar(folder, link=True)
    assert (cache.list_manifests(), cache.list_blobs()) == ([], [])


def test_a_file_of_a_layout_that_grows_before_it_is_linked_is_refused(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, hold_stored = make.image(1, 2), publish.hold_stored
    folder = make.write(tmp_path / "layout", make.oci_files({"app:1": made}))

    def grow_and_hold(*arguments: Any) -> Any:
        layout_blob(folder, made.layers[1]).write_bytes(made.layers[1] + b"!")
        return hold_stored(*arguments)

    monkeypatch.setattr(publish, "hold_stored", grow_and_hold)  # called after the layout was read
    with pytest.raises(DigestMismatch, match="should have 10240 bytes, and has more"):
        cache.cache_from_tar(folder, link=True)
    assert (cache.list_manifests(), cache.list_blobs()) == ([], [])


def test_a_stored_blob_of_a_layout_is_not_linked_again(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make.image(1, 2)
    folder = make.write(tmp_path / "layout", make.oci_files({"app:1": made}))
    cache.cache_from_tar(folder, link=True)
    monkeypatch.delattr(os, "link")
    assert cache.cache_from_tar(folder, "app:2", link=True)[0].complete


def test_linking_is_refused_for_an_archive(cache: Cache, tmp_path: Path) -> None:
    source = make.write(tmp_path / "app.tar", make.oci_files({"app:1": make.image(1)}))
    with pytest.raises(CacheError, match="only an image layout folder"):
        cache.cache_from_tar(source, link=True)
    with pytest.raises(StorageError, match="No such file"):
        cache.cache_from_tar(tmp_path / "nosuch", link=True)


def test_a_layout_may_have_more_files_than_a_process_may_open(cache: Cache, tmp_path: Path) -> None:
    layers = [b"%d" % number for number in range(120)]
    entries = [make.descriptor(layer, OCI_LAYER) for layer in layers]
    manifest = {"schemaVersion": 2, "config": make.descriptor(b"{}", OCI_CONFIG), "layers": entries}
    folder = make.write(tmp_path / "layout", oci_of(manifest, *layers))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    try:
        cache.cache_from_tar(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert cache.is_image_complete("app:1")


# Sources


@pytest.mark.parametrize("compress", [gzip.compress, make.zstd_compressed, lzma.compress, bz2.compress])
def test_an_archive_may_be_compressed(cache: Cache, tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "app"
    path.write_bytes(compress(tar_of(tiny_docker())))
    cache.cache_from_tar(path)
    assert cache.is_image_complete("app:1")
    assert os.listdir(cache.directory / "ingest" / os.listdir(cache.directory / "ingest")[0]) == []


def test_an_archive_may_come_from_a_pipe_a_few_bytes_at_a_time(cache: Cache) -> None:
    for data in (tar_of(tiny_docker()), gzip.compress(tar_of(tiny_docker())), bz2.compress(tar_of(tiny_oci()))):
        read, write = os.pipe()

        def send(target: int = write, content: bytes = data) -> None:
            with open(target, "wb", buffering=0) as pipe:
                for start in (0, 1, 2, 5):  # an unbuffered reader gets these pieces one by one
                    pipe.write(content[start : {0: 1, 1: 2, 2: 5}.get(start)])
                    time.sleep(0.01)

        sender = threading.Thread(target=send)
        sender.start()
        with open(read, "rb", buffering=0) as pipe:
            assert len(cache.cache_from_tar(pipe)) == 1
        sender.join()


def test_an_archive_may_come_from_a_fifo(cache: Cache, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    sender = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(tar_of(tiny_docker()),))
    sender.start()
    cache.cache_from_tar(tmp_path / "fifo")
    sender.join()
    assert cache.is_image_complete("app:1")


def test_an_open_file_is_read_from_its_position(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"in front" + tar_of(tiny_docker()))
    with open(tmp_path / "file", "rb") as file:
        file.seek(8)
        cache.cache_from_tar(file)
    assert cache.is_image_complete("app:1")


@pytest.mark.usefixtures("cache")
def test_an_archive_is_read_from_stdin(cachedb: Run) -> None:
    done = cachedb("import", "-", "-q", input=tar_of(tiny_docker()), text=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"app:1\n", b"")


def test_a_second_import_writes_nothing(cache: Cache, directory: Path) -> None:
    made = {"app:1": make.image(1, 2)}
    for files in (make.oci_files(made), make.docker_files(made)):
        cache.cache_from_tar(tar_file(files))
        paths = [*(directory / "blobs").rglob("*")]
        before = {path: read_state(path) for path in paths}
        rows = snapshot(directory)["image_blobs"]
        cache.cache_from_tar(tar_file(files))
        assert {path: read_state(path) for path in (directory / "blobs").rglob("*")} == before
        assert snapshot(directory)["image_blobs"] == rows


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_as_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    names = ["a", "d" * 90 + "/" + "e" * 90, "x/ü"]
    names += [] if form == tarfile.USTAR_FORMAT else ["l" * 300, "ü" * 200, "p" * 100, "q" * 101]
    with tarfile.open(tmp_path / "made.tar", "w", format=form) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = number * 300
            tar.addfile(member, io.BytesIO(make.random_bytes(member.size, number)))
            member = tarfile.TarInfo(f"link-{number}")
            member.type, member.linkname = tarfile.LNKTYPE, name
            if len(name) <= 100 or form != tarfile.USTAR_FORMAT:
                tar.addfile(member)
    with (
        files_module.open_files(tmp_path / "made.tar", make_spool_factory(tmp_path)) as files,
        tarfile.open(tmp_path / "made.tar") as tar,
    ):
        members = tar.getmembers()
        assert len(members) >= 5
        for known in members:
            section, content = files.find(known.name), tar.extractfile(known)
            assert section is not None
            assert content is not None
            assert section.head(10_000) == content.read()


def test_a_size_may_be_in_base_256_or_in_a_pax_header(cache: Cache) -> None:
    layer = make.layer(1)
    files = tiny_docker(layer)
    del files["layer.tar"]
    base256 = bytearray(make_header("layer.tar", len(layer)))
    base256[124:136] = b"\x80" + len(layer).to_bytes(11, "big")
    base256[148:156] = b" " * 8
    base256[148:156] = b"%06o\0 " % sum(base256)
    cache.cache_from_tar(prepend_members(bytes(base256) + pad_block(layer), files=files))
    cache.cache_from_tar(
        prepend_members(
            make_pax(make_record("size", str(len(layer)))), make_header("layer.tar") + pad_block(layer), files=files
        )
    )
    assert_verified(cache)


# Refused tars


@pytest.mark.slow
@pytest.mark.parametrize("files", [tiny_docker(), tiny_oci()], ids=["docker", "oci"])
def test_an_archive_that_is_cut_short_anywhere_is_refused_unless_only_its_end_is_missing(
    unchanged: Cache, tmp_path: Path, files: dict[str, bytes]
) -> None:
    data = small_tar(files)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        end = tar.getmembers()[-1].offset_data + tar.getmembers()[-1].size
    (tmp_path / "cut.tar").write_bytes(data)
    for length in reversed(range(len(data))):
        os.truncate(tmp_path / "cut.tar", length)
        if length >= end:
            assert len(read_images(tmp_path / "cut.tar", tmp_path)) == 1
            continue
        with pytest.raises(InvalidArchive):
            read_images(tmp_path / "cut.tar", tmp_path)
        if length % 512 in (0, 1, 511):
            import_refused(unchanged, io.BytesIO(data[:length]))


@pytest.mark.parametrize("compress", [gzip.compress, make.zstd_compressed, lzma.compress, bz2.compress])
def test_a_compressed_archive_that_is_cut_short_anywhere_is_refused(
    unchanged: Cache, compress: Callable[[bytes], bytes]
) -> None:
    data = compress(small_tar(tiny_docker()))
    for length in range(len(data)):
        with pytest.raises(InvalidArchive):
            unchanged.cache_from_tar(io.BytesIO(data[:length]))
    assert "cut short" in import_refused(unchanged, io.BytesIO(data[:-1]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        bytes(100),
        bytes(10240),
        b"{}" * 5000,
        make.random_bytes(10240, 1),
        gzip.compress(b"x"),
        b"\x1f\x8b\x08",
    ],
    ids=short,
)
def test_data_that_is_no_tar_is_refused(unchanged: Cache, data: bytes) -> None:
    message = import_refused(unchanged, io.BytesIO(data))
    assert "not a tar" in message or "damaged" in message or "cut short" in message


def test_a_tar_without_an_image_is_refused(unchanged: Cache, tmp_path: Path) -> None:
    assert "neither index.json nor manifest.json" in import_refused(unchanged, tar_file({"a": b"x"}))
    (tmp_path / "folder").mkdir()
    assert "neither index.json nor manifest.json" in import_refused(unchanged, tmp_path / "folder")


def test_a_file_that_cannot_be_read_is_a_storage_error(unchanged: Cache, tmp_path: Path) -> None:
    assert "No such file" in import_refused(unchanged, tmp_path / "absent.tar", StorageError)
    import_refused(unchanged, tmp_path / ("x" * 300), StorageError)


@pytest.mark.parametrize("name", ["../x", "/../x", "a/../../x", "..", "a/../b", "x" * 10_000, "/".join("x" * 3000)])
def test_a_member_whose_name_leaves_the_archive_or_is_too_long_is_refused(unchanged: Cache, name: str) -> None:
    with_long_name = make_header("@LongLink", len(name), b"L") + pad_block(name.encode())
    assert "in the archive" in import_refused(unchanged, prepend_members(with_long_name, make_header("short")))
    assert "in the archive" in import_refused(
        unchanged, prepend_members(make_pax(make_record("path", name)), make_header("short"))
    )


def test_the_slash_before_absolute_names_is_left_out(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """GNU tar and Docker do so, too."""
    files = {f"/{name}": data for name, data in tiny_docker().items()}
    data = files.pop("/layer.tar")
    linked = make_header("/layer.tar", 0, b"1", "/data") + make_header("/data", len(data)) + pad_block(data)
    cache.cache_from_tar(prepend_members(linked, files=files))
    assert cache.is_image_complete("app:1")
    assert "the / at the start of names is left out: 'layer.tar', ..." in caplog.text


OUTSIDE = [(b"1", "../../x"), (b"2", "../../x"), (b"2", "/etc/passwd"), (b"1", "../.."), (b"2", "a/../../../x")]


@pytest.mark.parametrize(("kind", "target"), OUTSIDE)
def test_a_link_that_leaves_the_archive_is_not_followed(
    unchanged: Cache, kind: bytes, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = tiny_docker()
    (entry,) = json.loads(files["manifest.json"])
    files["manifest.json"] = json.dumps([entry | {"Layers": ["one/layer.tar"]}]).encode()
    source = prepend_members(make_header("one/layer.tar", 0, kind, target), files=files)
    assert "the link 'one/layer.tar' leads out of the archive" in import_refused(unchanged, source)
    assert "links that lead out of the archive are not followed: 'one/layer.tar'" in caplog.text


@pytest.mark.parametrize(("kind", "target"), OUTSIDE)
def test_a_link_that_leaves_the_archive_does_not_matter_if_nothing_names_it(
    cache: Cache, kind: bytes, target: str
) -> None:
    cache.cache_from_tar(prepend_members(make_header("one/latest", 0, kind, target)))
    assert cache.is_image_complete("app:1")


@pytest.mark.parametrize("kind", [b"1", b"2"])
def test_a_link_with_too_long_a_target_is_refused(unchanged: Cache, kind: bytes) -> None:
    target = "x" * 10_000
    long_link = make_header("@LongLink", len(target), b"K") + pad_block(target.encode())
    assert "link" in import_refused(unchanged, prepend_members(long_link, make_header("one/link", 0, kind, "short")))


def test_a_layer_may_be_a_link_from_the_top_of_the_archive(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    files = tiny_docker()
    (entry,) = json.loads(files["manifest.json"])
    files["manifest.json"] = json.dumps([entry | {"Layers": ["one/link"]}]).encode()
    cache.cache_from_tar(prepend_members(make_header("one/link", 0, b"2", "layer.tar"), files=files))
    assert cache.is_image_complete("app:1")
    assert "from the top of the archive, because they lead nowhere else: 'one/link'" in caplog.text


def test_a_link_that_leads_to_a_file_from_its_folder_is_not_taken_from_the_top(unchanged: Cache) -> None:
    files = tiny_docker()
    (entry,) = json.loads(files["manifest.json"])
    files["manifest.json"] = json.dumps([entry | {"Layers": ["one/link"]}]).encode()
    files["one/layer.tar"] = b"another layer"
    source = prepend_members(make_header("one/link", 0, b"2", "layer.tar"), files=files)
    import_refused(unchanged, source, DigestMismatch)


def test_a_tar_of_a_layouts_folder_is_read(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"layout/{name}": data for name, data in make.oci_files({"app:1": make.image(1)}).items()}
    cache.cache_from_tar(tar_file(files))
    assert cache.is_image_complete("app:1")
    assert "the image layout is read from the folder 'layout' in the archive" in caplog.text


def test_a_layouts_folder_beside_other_files_is_not_read(unchanged: Cache) -> None:
    files = {f"layout/{name}": data for name, data in make.oci_files({"app:1": make.image(1)}).items()}
    assert "neither index.json nor manifest.json" in import_refused(unchanged, tar_file({**files, "other": b""}))


def test_a_byte_order_mark_before_a_table_is_ignored(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    files = tiny_docker()
    files["manifest.json"] = b"\xef\xbb\xbf" + files["manifest.json"]
    cache.cache_from_tar(tar_file(files))
    assert cache.is_image_complete("app:1")
    assert "the byte order mark at the start of manifest.json is ignored" in caplog.text


@pytest.mark.parametrize("garbage", [b"garbage here", b"\x1f\x8b\x08" + bytes(100_000) + b"x", b"\0\0no gzip" * 30_000])
def test_garbage_behind_a_gzip_compressed_archive_is_ignored(
    cache: Cache, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """gzip(1) and Docker ignore it, too."""
    cache.cache_from_tar(io.BytesIO(gzip.compress(small_tar(tiny_docker())) + garbage))
    assert cache.is_image_complete("app:1")
    assert "the garbage at the end of the gzip compressed archive is not read" in caplog.text


def test_garbage_in_place_of_the_rest_of_an_archive_is_refused(unchanged: Cache) -> None:
    data = small_tar(tiny_docker())
    for cut in (len(data) - 1024, len(data) - 2048):
        assert "cut short" in import_refused(unchanged, io.BytesIO(gzip.compress(data[:cut]) + b"garbage here"))


def test_a_gzip_compressed_archive_with_no_complete_member_is_damaged(unchanged: Cache) -> None:
    data = bytearray(gzip.compress(small_tar(tiny_docker())))
    data[-6] ^= 1  # in the checksum
    assert "gzip data in the archive is damaged" in import_refused(unchanged, io.BytesIO(data))


def test_garbage_behind_a_compressed_layer_is_refused(unchanged: Cache) -> None:
    layer = b"x" * 2000
    files = tiny_docker(layer) | {"layer.tar": make.gzipped(layer) + b"garbage here"}
    assert "gzip data in the archive is damaged" in import_refused(unchanged, tar_file(files))


@pytest.mark.parametrize("kind", [b"1", b"2"])
def test_links_in_a_circle_are_refused(unchanged: Cache, kind: bytes) -> None:
    assert "form a loop" in import_refused(
        unchanged, prepend_members(make_header("a", 0, kind, "b"), make_header("b", 0, kind, "a"))
    )
    assert "form a loop" in import_refused(unchanged, prepend_members(make_header("a", 0, kind, "a")))


def test_a_hard_link_of_a_file_to_itself_is_ignored(tmp_path: Path) -> None:
    """GNU tar writes it for a file that it was given twice."""
    data = tar_of(tiny_docker())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    source = data[:end] + make_header("layer.tar", 0, b"1", "layer.tar") + bytes(1024)
    assert len(read_images(io.BytesIO(source), tmp_path)) == 1


@pytest.mark.parametrize("kind", [0x50, 0x5F])
def test_zstd_may_begin_with_a_skippable_frame(cache: Cache, kind: int) -> None:
    """pzstd writes one (RFC 8878, section 3.1.2)."""
    frame = bytes([kind]) + b"\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"size"
    layer = make.layer(1)
    (archive,) = cache.cache_from_tar(
        io.BytesIO(frame + make.zstd_compressed(tar_of(make.docker_files({"a:1": make.image(1)}))))
    )
    assert archive.complete
    files = tiny_docker(layer)
    files["layer.tar"] = frame + make.zstd_compressed(layer)
    cache.cache_from_tar(tar_file(files))
    assert list_layers(cache, "app:1") == [(digest_of(files["layer.tar"]), f"{OCI_LAYER}+zstd")]


@pytest.mark.slow
def test_a_chain_of_very_many_links_is_refused_at_once(unchanged: Cache) -> None:
    links = [make_header(f"l{number}", 0, b"2", f"l{number + 1}") for number in range(10_000)]
    begin = time.process_time()
    assert "form a loop" in import_refused(unchanged, prepend_members(*links))
    assert time.process_time() - begin < 5


def test_a_dangling_link_is_refused_only_if_an_image_needs_it(cache: Cache) -> None:
    cache.cache_from_tar(prepend_members(make_header("unused", 0, b"2", "nowhere")))
    files = tiny_docker()
    del files["layer.tar"]
    message = import_refused(cache, prepend_members(make_header("layer.tar", 0, b"2", "nowhere"), files=files))
    assert "'layer.tar' is named in manifest.json" in message


@pytest.mark.parametrize("kind", [b"3", b"4", b"6", b"S", b"D", b"M", b"V", b"Z"])
def test_devices_fifos_sparse_files_and_unknown_members_are_refused(unchanged: Cache, kind: bytes) -> None:
    assert "neither a file, a folder nor a link" in import_refused(
        unchanged, prepend_members(make_header("odd", 0, kind))
    )


def test_sparse_files_in_pax_headers_are_refused(unchanged: Cache) -> None:
    sparse = make_record("GNU.sparse.major", "1") + make_record("GNU.sparse.minor", "0")
    assert "sparse" in import_refused(unchanged, prepend_members(make_pax(sparse), make_header("a")))
    assert "sparse" in import_refused(
        unchanged, prepend_members(make_pax(make_record("GNU.sparse.map", "0,1")), make_header("a"))
    )


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**62), 2**62, 2**80])
def test_a_member_of_an_impossible_size_is_refused(unchanged: Cache, size: int) -> None:
    for kind in (b"0", b"x", b"L", b"g"):
        import_refused(unchanged, prepend_members(make_header("a", size, kind)))
    import_refused(unchanged, prepend_members(make_pax(make_record("size", str(size))), make_header("a")))


def test_a_signed_octal_size_is_refused(unchanged: Cache) -> None:
    for text in (b"-0000001000\0", b"+0000001000\0", b"0o000001000\0", b"00_00001000\0", b"0000000 100\0"):
        damaged = bytearray(make_header("a"))
        damaged[124:136] = text
        damaged[148:156] = b" " * 8
        damaged[148:156] = b"%06o\0 " % sum(damaged)
        assert "damaged" in import_refused(unchanged, prepend_members(bytes(damaged)))


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
def test_a_header_of_gigabytes_is_refused_without_reading_it(unchanged: Cache, tmp_path: Path, kind: bytes) -> None:
    with open(tmp_path / "huge.tar", "wb") as file:
        file.write(make_header("huge", 3 * 1024**3, kind))
        file.truncate(3 * 1024**3 + 2048)
    with peak_below(4):
        assert "extended headers that are too large" in import_refused(unchanged, tmp_path / "huge.tar")


@pytest.mark.slow
def test_thousands_of_chained_headers_are_handled_at_once(unchanged: Cache) -> None:
    begin = time.process_time()
    assert "neither" in import_refused(
        unchanged, prepend_members(make_pax(make_record("comment", "x")) * 5000, files={"a": b""})
    )
    big = make_pax(b" " * 1024 * 1024)
    import_refused(unchanged, prepend_members(make_pax(make_record("comment", "x" * 1_000_000)) * 70))
    import_refused(unchanged, prepend_members(big))
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "records",
    [
        b"1" * 1024 * 1024,  # a naive search for digits takes quadratic time
        b"2 " * 512 * 1024,  # each pair of bytes is a record without a keyword
        b"2 " * 512 * 1023 + b"=",
        b"0 a=b\n",
        b"-6 a=b\n",
        b"6 a=b",
        b"6 a=bc",
        b"5 a=b\n",
        b"99 a=b\n",
        b"6 abc\n",
        b"99999999999999999999999 a=b\n",
        b"a=b\n",
        b"\0" * 512,
    ],
    ids=short,
)
def test_damaged_pax_headers_are_refused_at_once(unchanged: Cache, records: bytes) -> None:
    begin = time.process_time()
    with peak_below(16):
        assert "damaged" in import_refused(unchanged, prepend_members(make_pax(records), make_header("a")))
    assert time.process_time() - begin < 2


def test_a_global_header_may_have_a_comment_but_no_path(cache: Cache) -> None:
    assert "all members" in import_refused(cache, prepend_members(make_pax(make_record("path", "x"), b"g")))
    cache.cache_from_tar(prepend_members(make_pax(make_record("comment", "0" * 40), b"g")))
    assert cache.is_image_complete("app:1")


def test_a_header_at_the_end_without_its_member_is_refused(unchanged: Cache) -> None:
    import_refused(
        unchanged, io.BytesIO(small_tar(tiny_docker())[:-1024] + make_pax(make_record("path", "x")) + bytes(1024))
    )


def test_too_many_members_are_refused(unchanged: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_MEMBERS_LIMIT", 10)
    assert "more than 10 members" in import_refused(
        unchanged, prepend_members(*(make_header(f"f{number}") for number in range(12)))
    )


@pytest.mark.slow
def test_member_names_of_too_many_megabytes_are_refused(unchanged: Cache) -> None:
    name = "/".join(["x" * 200] * 20)
    member = make_header("@LongLink", len(name), b"L") + pad_block(name.encode()) + make_header("short")
    assert "names of more than 16777216 characters" in import_refused(unchanged, prepend_members(member * 4200))


def test_a_full_disk_is_a_storage_error_and_the_spool_is_deleted(tmp_path: Path) -> None:
    compressed = gzip.compress(tar_of(tiny_docker(make.random_bytes(200_000, 1))))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError):
            read_images(io.BytesIO(compressed), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


class peak_below:  # noqa: N801
    """Check that a block uses less memory than a limit."""

    def __init__(self, megabytes: int) -> None:
        self.limit = megabytes * 1024 * 1024

    def __enter__(self) -> None:
        tracemalloc.start()

    def __exit__(self, *_: object) -> None:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < self.limit


# Refused documents

DOCUMENTS = [
    b"null",
    b"[]",
    b"{}",
    b"0",
    b'""',
    b"true",
    b"[null]",
    b"[[]]",
    b"[{}]",
    b"[0]",
    b"",
    b"{",
    b"\xff",
]


@pytest.mark.parametrize("document", [*DOCUMENTS, b'{"manifests":null}', b'{"manifests":{}}', b'{"manifests":[]}'])
def test_documents_without_an_image_are_refused(unchanged: Cache, document: bytes) -> None:
    import_refused(unchanged, tar_file({"manifest.json": document}))
    import_refused(unchanged, tar_file({"index.json": document}))
    import_refused(unchanged, tar_file(tiny_docker() | {"manifest.json": document}))
    import_refused(unchanged, tar_file(tiny_docker() | {"config.json": document}))
    import_refused(unchanged, tar_file(tiny_oci() | {"index.json": document}))
    import_refused(unchanged, tar_file(tiny_oci() | {"oci-layout": document}))
    import_refused(unchanged, tar_file(oci_of(document)), InvalidManifest)
    import_refused(unchanged, tar_file(oci_of(document, media_type=OCI_INDEX)), InvalidManifest)


@pytest.mark.parametrize(
    "document",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"schemaVersion": NaN}',
        b"[Infinity]",
        b"[" + b"9" * 100_000 + b"]",
        '{"schemaVersion": 2}'.encode("utf-16"),
    ],
    ids=short,
)
def test_invalid_json_and_json_too_deep_for_a_parser_are_refused(unchanged: Cache, document: bytes) -> None:
    for name in ("manifest.json", "config.json"):
        assert (
            "not JSON" in (message := import_refused(unchanged, tar_file(tiny_docker() | {name: document})))
            or "deep" in message
        )
    for name in ("index.json", "oci-layout"):
        assert (
            "not JSON" in (message := import_refused(unchanged, tar_file(tiny_oci() | {name: document})))
            or "deep" in message
        )
    import_refused(unchanged, tar_file(oci_of(document)), InvalidManifest)


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "oci-layout", "config.json"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_document_of_2_gb_is_refused_without_reading_it(
    unchanged: Cache, tmp_path: Path, name: str, folder: bool
) -> None:
    files = tiny_oci() if name in ("index.json", "oci-layout") else tiny_docker()
    del files[name]
    size = 2 * 1024**3
    if folder:
        path = make.write(tmp_path / "layout", files)
        with open(path / name, "wb") as file:
            file.truncate(size)
    else:
        path = tmp_path / "app.tar"
        front = small_tar(files)[:-1024] + make_header(name, size)
        with open(path, "wb") as file:
            file.write(front)
            file.truncate(len(front) + size + 1024)
    with peak_below(4):
        assert "more than 4194304 are refused" in import_refused(unchanged, path)


def test_a_manifest_of_over_4_mib_is_refused(unchanged: Cache) -> None:
    manifest = b"x" * (4 * 1024 * 1024 + 1)
    assert "more than 4194304 are refused" in import_refused(unchanged, tar_file(oci_of(manifest)), InvalidManifest)


def walk_document(value: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a document."""
    yield at
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in pairs:
        yield from walk_document(below, (*at, key))


def replace_value(document: Any, at: tuple[Any, ...], value: object) -> Any:
    if not at:
        return value
    copy = json.loads(json.dumps(document))
    place = copy
    for key in at[:-1]:
        place = place[key]
    place[at[-1]] = value
    return copy


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "index.json", "oci-layout", "manifest", "index"])
def test_a_document_with_any_value_anywhere_is_read_or_refused(tmp_path: Path, name: str) -> None:
    image = json.loads(make.image(1).manifest)
    image |= {"config": make.descriptor(b"{}", OCI_CONFIG), "layers": [make.descriptor(b"x", OCI_LAYER)]}
    data = json.dumps(image).encode()
    platform = {"os": "linux", "architecture": "arm", "variant": "v7"}
    entry = make.descriptor(data, OCI_MANIFEST, platform=platform, annotations={"a": "b"})
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]}
    base = tiny_docker() if name in ("manifest.json", "config.json") else oci_of(image)
    document = {"manifest": image, "index": index}.get(name) or json.loads(base[name])
    read = 0
    for at in walk_document(document):
        for value in ANY:
            changed = replace_value(document, at, value)
            if name == "manifest":
                files = oci_of(changed)
            elif name == "index":
                files = oci_of(changed, data, media_type=OCI_INDEX)
            else:
                files = base | {name: json.dumps(changed).encode()}
            try:
                read += len(read_images(tar_file(files), tmp_path))
            except CacheError as error:
                assert str(error).isprintable(), (at, value)  # noqa: PT017
    assert read


def test_a_value_that_is_nested_deeply_is_refused_and_not_quoted(unchanged: Cache) -> None:
    manifest = b'{"schemaVersion":2,"layers":[],"config":{"size":' + b"[" * 200 + b"]" * 200 + b"}}"
    error = import_refused(unchanged, tar_file(oci_of(manifest)), InvalidManifest)
    assert "the invalid size [...]" in error


# Refused content


@pytest.mark.parametrize("suffix", ["", ".tar"])
@pytest.mark.parametrize("name", ["\ud800", "x\0", "x" * 5000])
def test_an_invalid_file_name_in_a_document_is_refused(cache: Cache, tmp_path: Path, suffix: str, name: str) -> None:
    entries = [{"Config": name, "RepoTags": ["app:1"], "Layers": []}]
    path = make.write(tmp_path / f"archive{suffix}", {"manifest.json": json.dumps(entries).encode()})
    with pytest.raises(InvalidArchive, match="has an invalid file name"):
        cache.cache_from_tar(path)


@pytest.mark.parametrize("files", [tiny_docker(), tiny_oci()], ids=["docker", "oci"])
@pytest.mark.parametrize("folder", [False, True])
def test_the_error_of_a_missing_file_names_it(
    unchanged: Cache, tmp_path: Path, files: dict[str, bytes], folder: bool
) -> None:
    for number, name in enumerate(files):
        if name in ("manifest.json", "index.json", "oci-layout"):
            continue
        less = {key: data for key, data in files.items() if key != name}
        source = make.write(tmp_path / f"layout{number}", less) if folder else tar_file(less)
        assert name.rpartition("/")[2] in import_refused(unchanged, source)


@pytest.mark.parametrize("folder", [False, True])
def test_content_that_differs_from_its_digest_or_size_is_refused(
    unchanged: Cache, tmp_path: Path, folder: bool
) -> None:
    for case, files in (("docker", tiny_docker()), ("oci", tiny_oci())):
        for number, (name, data) in enumerate(files.items()):
            if name in ("manifest.json", "index.json", "oci-layout", "config.json"):
                continue
            for what, other in (("other", bytes([data[0] ^ 1]) + data[1:]), ("more", data + b"x"), ("less", data[:-1])):
                changed = {**files, name: other}
                target = tmp_path / f"{case}{number}{what}"
                message = import_refused(
                    unchanged, make.write(target, changed) if folder else tar_file(changed), DigestMismatch
                )
                assert name.rpartition("/")[2][:20] in message or "config" in message


def test_a_config_that_differs_from_the_digest_in_its_name_is_refused(unchanged: Cache) -> None:
    files = make.docker_files({"app:1": make.image(1)})
    (config,) = (name for name in files if name != "manifest.json" and name.endswith(".json"))
    import_refused(unchanged, tar_file({**files, config: files[config] + b" "}), DigestMismatch)


@pytest.mark.parametrize("compress", [make.gzipped, make.zstd_compressed])
def test_a_compressed_layer_that_differs_from_its_diff_id_is_refused(
    unchanged: Cache, compress: Callable[[bytes], bytes]
) -> None:
    good = tiny_docker(b"what the config says" * 1000)
    message = import_refused(unchanged, tar_file(good | {"layer.tar": compress(b"something else")}), DigestMismatch)
    assert "does not match its diff id" in message
    packed = compress(b"what the config says" * 1000)
    assert "cut short" in import_refused(unchanged, tar_file(good | {"layer.tar": packed[:-1]}))
    assert "damaged" in import_refused(unchanged, tar_file(good | {"layer.tar": packed + b"more"}))
    import_refused(unchanged, tar_file(good | {"layer.tar": packed * 2}), DigestMismatch)


def test_a_blob_that_is_already_stored_is_verified_again(cache: Cache) -> None:
    cache.cache_from_tar(tar_file(tiny_oci()))
    import_refused(cache, tar_file(tiny_oci() | {f"blobs/sha256/{hex_of(b'x')}": b"y"}), DigestMismatch)
    assert_verified(cache)


def test_nothing_is_imported_if_one_image_is_damaged(unchanged: Cache) -> None:
    files = make.docker_files({"app:1": make.image(1), "app:2": make.image(2)})
    layer = json.loads(files["manifest.json"])[1]["Layers"][0]
    import_refused(unchanged, tar_file({**files, layer: make.layer(3)}), DigestMismatch)


@pytest.mark.slow
def test_a_gzip_bomb_is_checked_in_bounded_memory(unchanged: Cache) -> None:
    bomb = gzip.compress(bytes(100 * 1024 * 1024), 1)
    with peak_below(40):
        import_refused(unchanged, tar_file(tiny_docker() | {"layer.tar": bomb}), DigestMismatch)


BOMB = tar_of({"layer.tar": bytes(40 * 1024 * 1024)})
LAYER_BOMB = tiny_docker(bytes(40 * 1024 * 1024))


def layer_bomb(compress: Callable[[bytes], bytes]) -> bytes:
    return tar_of(LAYER_BOMB | {"layer.tar": compress(LAYER_BOMB["layer.tar"])})


@pytest.mark.slow
@pytest.mark.parametrize("compress", [gzip.compress, make.zstd_compressed, lzma.compress, bz2.compress])
@pytest.mark.parametrize("piped", [False, True])
def test_an_archive_that_unpacks_to_many_times_its_size_is_refused(
    unchanged: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes], piped: bool
) -> None:
    monkeypatch.setattr(unpack_limit, "_RATIO_FREE", 8 * 1024 * 1024)
    data = compress(BOMB)
    path = make.write_bytes(tmp_path / "bomb", data)
    message = import_refused(unchanged, io.BytesIO(data) if piped else path)
    assert "unpacks to more than" in message
    assert "100 times the compressed size" in message
    assert "--max-unpacked SIZE or CACHEDB_MAX_UNPACKED=SIZE" in message


@pytest.mark.parametrize("compress", [gzip.compress, make.zstd_compressed])
def test_layers_that_unpack_to_many_times_their_size_are_refused(
    unchanged: Cache, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(unpack_limit, "_RATIO_FREE", 8 * 1024 * 1024)
    message = import_refused(unchanged, io.BytesIO(layer_bomb(compress)))
    assert message.startswith("the layers in the archive unpack to more than ")
    assert "100 times the compressed size" in message


def test_an_archive_that_unpacks_to_more_than_the_cap_is_refused(
    unchanged: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack_limit, "_UNPACKED_LIMIT", 1024 * 1024)
    noise = make.random_bytes(2 * 1024 * 1024, 1)
    message = import_refused(unchanged, io.BytesIO(gzip.compress(tar_of({"layer.tar": noise}), 1)))
    assert "unpacks to more than 1.05 MB, the cap on unpacked bytes" in message


def test_the_layers_of_an_archive_share_one_unpacking_cap(unchanged: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [bytes([number]) * 300_000 for number in range(4)]
    config = json.dumps({"rootfs": {"diff_ids": [digest_of(layer) for layer in layers]}}).encode()
    names = [f"{number}.tar" for number in range(4)]
    entries = [{"Config": "config.json", "RepoTags": ["app:1"], "Layers": names}]
    files = {"manifest.json": json.dumps(entries).encode(), "config.json": config}
    files |= {name: gzip.compress(layer) for name, layer in zip(names, layers, strict=True)}
    monkeypatch.setattr(unpack_limit, "_RATIO_FREE", 1_000_000)
    assert "unpack to more than 1 MB" in import_refused(unchanged, tar_file(files))


@pytest.mark.slow
def test_the_cap_on_unpacked_bytes_can_be_raised(cachedb: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    archive = make.write_bytes(tmp_path / "bomb", gzip.compress(layer_bomb(gzip.compress)))
    with Cache.open(tmp_path / "other") as cache:
        with pytest.raises(InvalidArchive, match="to more than 20 MB, the cap on unpacked bytes"):
            cache.cache_from_tar(archive, max_unpacked=20_000_000)
        monkeypatch.setenv("CACHEDB_MAX_UNPACKED", "1MB")
        assert cache.cache_from_tar(archive, max_unpacked=50_000_000)[0].complete
    refused = cachedb("import", archive)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "to more than 1 MB, the cap on unpacked bytes" in refused.stderr
    assert cachedb("import", "-q", "--max-unpacked", "50MiB", archive).stdout == "app:1\n"
    assert cachedb("import", "--max-unpacked", "much", archive).returncode == 2
    monkeypatch.setenv("CACHEDB_MAX_UNPACKED", "much")
    assert "CACHEDB_MAX_UNPACKED is 'much': write a size such as" in cachedb("import", archive).stderr


@pytest.mark.slow
def test_a_small_image_of_zeros_is_imported(cachedb: Run, tmp_path: Path) -> None:
    archive = make.write_bytes(tmp_path / "zeros", gzip.compress(layer_bomb(gzip.compress)))
    assert cachedb("import", "-q", archive).stdout == "app:1\n"


@pytest.mark.slow
def test_unpacking_leaves_free_space_on_the_disk(
    unchanged: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.statvfs(tmp_path)
    values = list(status)
    values[0] = values[1] = 4096
    values[4] = 5 * 1024 * 1024 // 4096  # f_bavail
    monkeypatch.setattr(os, "fstatvfs", lambda _file: os.statvfs_result(values))
    message = import_refused(unchanged, make.write_bytes(tmp_path / "bomb", gzip.compress(BOMB)), StorageError)
    assert "the file system of the cache has only 5.24 MB left: free some space" in message


@pytest.mark.slow
def test_very_many_gzip_members_are_unpacked_in_linear_time() -> None:
    begin = time.process_time()
    unpack = compression_.Decompressor("gzip")
    assert b"".join(unpack.feed(gzip.compress(b"") * 200_000)) == b""
    assert unpack.ended
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("compress", [lzma.compress, bz2.compress])
def test_a_layer_in_a_compression_without_a_media_type_is_refused(
    unchanged: Cache, compress: Callable[[bytes], bytes]
) -> None:
    layer = make.layer(1)
    message = import_refused(unchanged, tar_file(tiny_docker(layer) | {"layer.tar": compress(layer)}))
    assert "use gzip, zstd or no compression" in message


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:../../etc/passwd",
        "sha256:" + "a/" * 32,
        "md5:" + "0" * 32,
        "sha256:" + "A" * 64,
        "sha256:",
        "x",
        "",
        1,
    ],
)
def test_a_digest_with_a_slash_or_of_an_unknown_algorithm_is_refused(unchanged: Cache, digest: object) -> None:
    bad = make.descriptor(b"x", OCI_LAYER) | {"digest": digest}
    config = make.descriptor(b"{}", OCI_CONFIG)
    import_refused(
        unchanged, tar_file(oci_of({"schemaVersion": 2, "config": config, "layers": [bad]})), InvalidManifest
    )
    index = json.dumps({"manifests": [bad | {"mediaType": OCI_MANIFEST}]}).encode()
    import_refused(unchanged, tar_file(tiny_oci() | {"index.json": index}), InvalidManifest)
    diff_ids = json.dumps({"rootfs": {"diff_ids": [digest]}}).encode()
    assert "diff id" in import_refused(unchanged, tar_file(tiny_docker() | {"config.json": diff_ids}))


@pytest.mark.parametrize("size", [-1, 1.0, True, "1", None, 2**63, 2**64, 10**400, [], {}])
def test_an_invalid_size_is_refused(unchanged: Cache, size: object) -> None:
    layer = make.descriptor(b"x", OCI_LAYER) | {"size": size}
    manifest = {"schemaVersion": 2, "config": make.descriptor(b"{}", OCI_CONFIG), "layers": [layer]}
    import_refused(unchanged, tar_file(oci_of(manifest)), InvalidManifest)


@pytest.mark.parametrize("name", ["App:1", "a b", "a\nb", "x" * 300, "a:" + "t" * 129, "a:b\n", "-", "é", "a@sha256:1"])
def test_an_invalid_name_is_refused(unchanged: Cache, name: str) -> None:
    assert "name" in import_refused(unchanged, tar_file(make.docker_files({name: make.image(1)})))
    assert "name" in import_refused(unchanged, tar_file(make.oci_files({name: make.image(1)})))
    assert "name" in import_refused(unchanged, tar_file(tiny_docker()), InvalidName, name=name)


def test_a_name_by_another_digest_is_refused(unchanged: Cache) -> None:
    name = "app@sha256:" + "0" * 64
    assert "names another digest than" in import_refused(unchanged, tar_file(tiny_oci()), InvalidName, name=name)
    files = oci_of(json.loads(tiny_manifest()), name=name)
    assert "names another digest than" in import_refused(unchanged, tar_file(files), InvalidName)


def tiny_manifest() -> bytes:
    files = tiny_oci()
    return files[next(name for name in files if name.startswith("blobs/"))]


def test_one_name_for_two_images_is_refused(unchanged: Cache) -> None:
    files = make.oci_files({"": make.image(1), "b": make.image(2)})
    index = json.loads(files["index.json"])
    for entry in index["manifests"]:
        entry["annotations"] = {make.REF_NAME: "app:1"}
    assert "two images" in import_refused(unchanged, tar_file({**files, "index.json": json.dumps(index).encode()}))
    files = make.docker_files({"app:1": make.image(1), "app:2": make.image(2)})
    changed = files["manifest.json"].replace(b"app:2", b"app:1")
    assert "two images" in import_refused(unchanged, tar_file({**files, "manifest.json": changed}))


def test_a_layer_declared_as_a_manifest_is_refused(unchanged: Cache) -> None:
    for media_type in (OCI_MANIFEST, OCI_INDEX):
        for layer in (make.layer(1), b"{}", b'{"schemaVersion":2}', bytes(5 * 1024 * 1024)):
            index = {"schemaVersion": 2, "manifests": [make.descriptor(layer, media_type)]}
            import_refused(unchanged, tar_file(oci_of(index, layer, media_type=OCI_INDEX)), InvalidManifest)


def test_an_entry_of_an_unknown_media_type_is_no_image(unchanged: Cache) -> None:
    files = oci_of(json.loads(tiny_manifest()), media_type="application/x-other")
    assert "the archive holds no image" in import_refused(unchanged, tar_file(files))


def test_a_file_after_a_link_of_the_same_name_is_used(tmp_path: Path) -> None:
    source = prepend_members(make_header("layer.tar", 0, b"2", "nowhere"))
    assert len(read_images(source, tmp_path)) == 1


def test_a_manifest_declared_as_an_index_is_refused(unchanged: Cache) -> None:
    files = oci_of(json.loads(tiny_manifest()), media_type=OCI_INDEX)
    import_refused(unchanged, tar_file(files), InvalidManifest)


def test_an_index_that_is_listed_twice_is_read_once(cache: Cache) -> None:
    data, media_type = tiny_manifest(), OCI_MANIFEST
    blobs = [data]
    for _ in range(100):
        entries = [make.descriptor(data, media_type)] * 2
        data, media_type = json.dumps({"schemaVersion": 2, "manifests": entries}).encode(), OCI_INDEX
        blobs.append(data)
    begin = time.process_time()
    cache.cache_from_tar(tar_file(oci_of(data, *blobs, media_type=OCI_INDEX)))
    assert time.process_time() - begin < 5
    assert cache.is_image_complete("app:1")


def test_too_many_blobs_images_or_names_are_refused(unchanged: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_BLOBS_LIMIT", 10)
    entries = [make.descriptor(b"x", OCI_LAYER)] * 10
    manifest = {"schemaVersion": 2, "config": make.descriptor(b"{}", OCI_CONFIG), "layers": entries}
    assert "more than 10 blobs" in import_refused(unchanged, tar_file(oci_of(manifest)))
    files = tiny_docker()
    (entry,) = json.loads(files["manifest.json"])
    entry["RepoTags"] = [f"app:{number}" for number in range(6)]
    assert "more than 10 blobs" in import_refused(
        unchanged, tar_file({**files, "manifest.json": json.dumps([entry]).encode()})
    )
    many = json.dumps([entry] * 1001).encode()
    assert "1001 images" in import_refused(unchanged, tar_file({**files, "manifest.json": many}))
    index = json.loads(tiny_oci()["index.json"])
    many = json.dumps({"manifests": index["manifests"] * 1001}).encode()
    assert "1001 images" in import_refused(unchanged, tar_file({**tiny_oci(), "index.json": many}))


@pytest.mark.parametrize("name", ["index.json", "oci-layout", "blob"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "loop", "device"])
def test_a_special_file_in_a_layout_is_refused_without_hanging(
    unchanged: Cache, tmp_path: Path, name: str, kind: str
) -> None:
    folder = make.write(tmp_path / "l", tiny_oci())
    path = folder / (f"blobs/sha256/{hex_of(b'x')}" if name == "blob" else name)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
        os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "loop" else "/dev/zero")
    import_refused(unchanged, folder, StorageError if kind in ("loop", "socket") else InvalidArchive)


def test_a_file_name_that_is_too_long_in_a_layout_is_a_storage_error(unchanged: Cache, tmp_path: Path) -> None:
    files = tiny_docker()
    changed = files["manifest.json"].replace(b"layer.tar", b"x" * 300)
    import_refused(unchanged, make.write(tmp_path / "folder", {**files, "manifest.json": changed}), StorageError)


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link"])
def test_a_file_put_in_the_place_of_the_spool_is_not_written_to(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    precious = make.write_bytes(tmp_path / "precious", b"mine")
    archive = make.write_bytes(tmp_path / "it.tar.gz", gzip.compress(tar_of(tiny_oci())))
    monkeypatch.setattr(secrets, "randbits", lambda _: 7)  # somebody guesses the name
    if kind == "hard link":
        (cache._session.folder / "7").hardlink_to(precious)
    else:
        (cache._session.folder / "7").symlink_to(precious if kind == "link" else tmp_path / "new")
    with pytest.raises(StorageError, match="File exists"):
        cache.cache_from_tar(archive, "app:1")
    assert precious.read_bytes() == b"mine"
    assert not (tmp_path / "new").exists()


def test_a_spool_has_no_name(cache: Cache) -> None:
    """No other user can write to a file without a name, and it disappears with a killed process."""
    with cache._session.new_file() as file:
        file.write(b"data")
        assert os.listdir(cache._session.folder) == []


def test_a_layout_that_is_truncated_while_it_is_read_is_refused(tmp_path: Path) -> None:
    folder = make.write(tmp_path / "layout", tiny_oci())
    with files_module.open_files(folder, make_spool_factory(tmp_path)) as files:
        (image,) = archive.read_images(files, Wanted())
        os.truncate(folder / f"blobs/sha256/{hex_of(b'x')}", 0)
        with pytest.raises(InvalidArchive, match="cut short"):
            image.image.blobs[-1].section.head(1)


# The command line

BAD: dict[str, tuple[bytes, int]] = {
    "cut short": (tar_of(tiny_docker())[:2000], 1),
    "null": (tar_of({"manifest.json": b"null"}), 1),
    "absent layer": (tar_of({k: v for k, v in tiny_docker().items() if k != "layer.tar"}), 1),
    "fifo": (make_header("a", 0, b"6") + tar_of(tiny_docker()), 1),
    "newline": (tar_of(make.oci_files({"a\nb": make.image(1)})), 1),
    "other digest": (tar_of(oci_of(json.loads(tiny_manifest()), name="app@sha256:" + "0" * 64)), 2),
    "escape": (make_header("\x1b[31m/../x") + tar_of(tiny_docker()), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_the_error_of_a_bad_archive_is_one_line_on_stderr(
    unchanged: Cache, cachedb: Run, tmp_path: Path, case: str
) -> None:
    data, code = BAD[case]
    (tmp_path / "bad.tar").write_bytes(data)
    done = cachedb("import", tmp_path / "bad.tar")
    assert (done.returncode, done.stdout) == (code, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("cachedb: ")
    assert line.isprintable()


# Fuzz

VALID = [
    small_tar(tiny_docker()),
    small_tar(tiny_oci()),
    small_tar(tiny_docker(b"x" * 2000) | {"layer.tar": make.gzipped(b"x" * 2000)}),
    make_pax(make_record("path", "a" * 200)) + make_header("a") + small_tar(tiny_docker()),
    gzip.compress(small_tar(tiny_oci()), mtime=0),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a valid archive with a few random changes."""
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "header", "cut", "drop", "swap", "splice", "fix"]))
        if kind == "flip" and data:
            data[place] ^= draw(st.integers(1, 255))
        elif kind == "header" and data:  # change a field of a header and correct its checksum
            start = place // 512 * 512
            field = draw(st.sampled_from([0, 100, 124, 125, 135, 156, 157, 257, 345]))
            if len(data) >= start + 512:
                data[start + field] = draw(st.sampled_from([0, 0x2E, 0x2F, 0x31, 0x37, 0x80, 0xFF, 0x78]))
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        elif kind == "cut":
            del data[place:]
        elif kind == "drop":
            del data[place // 512 * 512 : place // 512 * 512 + 512]
        elif kind == "swap":
            other = draw(st.integers(0, max(len(data) - 1, 0))) // 512 * 512
            start = place // 512 * 512
            data[start : start + 512], data[other : other + 512] = data[other : other + 512], data[start : start + 512]
        elif kind == "splice":
            data[place:place] = random.Random(place).choice(VALID)[: draw(st.integers(0, 2000))]
    return bytes(data)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    with Cache.open(tmp_path_factory.mktemp("fuzz") / "cache") as cache:
        cache.add_blob(b"begins the session")
        yield cache


@pytest.mark.slow
@settings(max_examples=EXAMPLES * 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=mutated(), named=st.booleans())
def test_a_damaged_archive_is_imported_completely_or_refused_without_traces(
    fuzzed: Cache, data: bytes, named: bool
) -> None:
    before = snapshot(fuzzed.directory)
    try:
        imported = fuzzed.cache_from_tar(io.BytesIO(data), "given:1" if named else None)
    except CacheError as error:
        assert str(error).isprintable()  # noqa: PT017
        assert snapshot(fuzzed.directory) == before
    else:
        assert imported
        assert_verified(fuzzed)


@pytest.mark.slow
@settings(max_examples=EXAMPLES * 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=mutated())
def test_reading_a_damaged_archive_raises_only_our_errors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    try:
        read_images(io.BytesIO(data), tmp_path_factory.getbasetemp())
    except CacheError as error:
        assert str(error).isprintable()  # noqa: PT017


def test_two_images_with_one_config_keep_their_names_of_the_index(cache: Cache, tmp_path: Path) -> None:
    plain, compressed = make.image(1), make.image(1, compression="gzip")
    assert plain.config == compressed.config
    files = make.oci_files({"docker.io/library/a:1": plain, "b:1": compressed})
    config, layer = (f"blobs/sha256/{make.hex_of(data)}" for data in (plain.config, plain.layers[0]))
    entry = {"Config": config, "RepoTags": ["a:1", "b:1"], "Layers": [layer]}
    files["manifest.json"] = json.dumps([entry]).encode()
    found = cache.cache_from_tar(make.write(tmp_path / "made.tar", files))
    assert {str(image.name): image.digest for image in found} == {"a:1": plain.digest, "b:1": compressed.digest}


def test_a_platform_listed_beside_its_index_is_no_image_of_its_own(cache: Cache, tmp_path: Path) -> None:
    one, two = make.image(1), make.image(2, architecture="arm64")
    files = make.oci_files({"1": one, "2": two}, roots={"multi:1": make.index(one, two)})
    index = json.loads(files["index.json"])
    index["manifests"].append(make.descriptor(one.manifest, OCI_MANIFEST))
    files["index.json"] = json.dumps(index).encode()
    entry = {"Config": f"blobs/sha256/{make.hex_of(one.config)}", "RepoTags": ["multi:1"], "Layers": []}
    files["manifest.json"] = json.dumps([entry]).encode()
    (image,) = cache.cache_from_tar(make.write(tmp_path / "made.tar", files))
    assert (str(image.name), image.media_type) == ("multi:1", OCI_INDEX)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom"])
def test_an_endless_stream_that_is_no_tar_is_refused_at_its_beginning(cache: Cache, device: str) -> None:
    with pytest.raises(InvalidArchive, match="not a tar"):
        cache.cache_from_tar(device)


def test_a_stored_blob_is_not_written_again(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make.write(tmp_path / "made.tar", make.oci_files({"app:1": make.image(1, 2)}))
    written: list[int] = []
    write = writer._write_chunk

    def count_and_write(target: int, chunk: memoryview) -> None:
        written.append(len(chunk))
        write(target, chunk)

    monkeypatch.setattr(writer, "_write_chunk", count_and_write)
    cache.cache_from_tar(source)
    assert sum(written) == cache.get_stats().total_size
    written.clear()
    cache.cache_from_tar(source)
    assert written == []
