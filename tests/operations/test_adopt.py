"""Adoption of a cache whose index is one `index.json`: intact images are adopted, and the rest is reported."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachedb import Adoption, Cache, CacheError, ImageInfo, NotACache, StorageError
from cachedb.oci.manifests import OCI_MANIFEST
from cachedb.operations import adopt
from cachedb.operations.adopt import How
from tests.conftest import Run, files_of, stored_rows
from tests.operations.test_pull import assert_is_stored
from tests.support import make
from tests.support.mounting import mounted
from tests.support.promises import check

IMAGES = {
    "app/1": make.image(1, 2, compression="gzip"),
    "app/2": make.image(1, 3, compression="gzip"),
    "registry.example.org:5000/team/deep/er/app/latest": make.image(4),
}
NAMES = ["app:1", "app:2", "registry.example.org:5000/team/deep/er/app:latest"]
FIRST = IMAGES["app/1"]

pytestmark = pytest.mark.usefixtures("check_promises")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "work" / ".cache"
    make.json_cache(path, IMAGES)
    return path


def blob_path(old: Path, data: bytes) -> Path:
    return old / "blobs" / "sha256" / make.hex_of(data)


def read_tree(path: Path) -> dict[str, tuple[bytes | None, int]]:
    """Return all files and folders below a path with their content and mode."""
    return {
        str(found.relative_to(path)): (found.read_bytes() if found.is_file() else None, found.lstat().st_mode)
        for found in sorted(path.rglob("*"))
    }


def list_left_out(adoption: Adoption) -> list[tuple[str, str | None]]:
    return [(item.kind, item.name) for item in adoption.left_out]


# Intact images


@pytest.mark.parametrize("how", adopt.HOWS)
def test_all_images_are_adopted_with_their_names_and_blobs(cache: Cache, old: Path, how: How) -> None:
    before = read_tree(old)
    found = cache.adopt(old, how=how)
    assert [str(image.name) for image in found.images] == NAMES
    assert all(image.complete for image in found.images)
    assert (found.left_out, found.index_damage, found.unused) == ([], None, 0)
    everything = {digest: data for image in IMAGES.values() for digest, data in image.blobs.items()}
    assert (found.blobs, found.bytes) == (len(everything), sum(map(len, everything.values())))
    for name, image in zip(NAMES, IMAGES.values(), strict=True):
        assert_is_stored(cache, name, image)
    if how != "move":
        assert read_tree(old) == before


def test_media_types_and_roles_are_those_of_the_manifest(cache: Cache, old: Path) -> None:
    cache.adopt(old)
    assert [(blob.role, blob.media_type) for blob in cache.get_image_blobs("app:1")] == [
        ("manifest", OCI_MANIFEST),
        ("config", "application/vnd.oci.image.config.v1+json"),
        *[("layer", "application/vnd.oci.image.layer.v1.tar+gzip")] * 2,
    ]
    image = cache.get_image("app:1")
    assert (image.os, image.architecture) == ("linux", "amd64")


def test_how_link_links_blobs_and_copies_manifests(cache: Cache, old: Path) -> None:
    cache.adopt(old, how="link")
    for data in (FIRST.config, *FIRST.layers):
        assert cache.get_blob_path(make.digest_of(data)).samefile(blob_path(old, data))
    assert not cache.get_blob_path(FIRST.digest).samefile(old / "manifests" / "app" / "1")
    (old / "manifests" / "app" / "1").write_bytes(b"the old cache writes to a tag")


@pytest.mark.parametrize("how", ["link", "move"])
def test_a_blob_that_cannot_be_linked_is_copied(
    cache: Cache, old: Path, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, refused = os.link, set()

    def refuse_across(source: Path, target: Path, **options: Any) -> None:
        if Path(source).is_relative_to(old):
            refused.add(Path(source))
            raise OSError(18, "Invalid cross-device link")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", refuse_across)
    found = cache.adopt(old, how=how)
    assert blob_path(old, FIRST.config) in refused
    assert not found.left_out
    assert_is_stored(cache, "app:1", FIRST)
    if how == "link":
        assert not cache.get_blob_path(make.digest_of(FIRST.config)).samefile(blob_path(old, FIRST.config))


def test_a_file_that_is_replaced_while_it_is_linked_is_left_out(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, victim = os.link, blob_path(old, FIRST.layers[1])

    def replace_and_link(source: Path, target: Path, **options: Any) -> None:
        if Path(source) == victim:
            victim.unlink()
            victim.write_bytes(b"something else")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", replace_and_link)
    found = cache.adopt(old, how="link")
    assert list_left_out(found) == [("unreadable", "app:1")]


def test_a_moved_blob_is_read_only(cache: Cache, old: Path) -> None:
    assert blob_path(old, FIRST.config).stat().st_mode & 0o222
    cache.adopt(old, how="move")
    for digest in FIRST.blobs:
        assert cache.get_blob_path(digest).stat().st_mode & 0o777 == 0o444


def test_a_move_deletes_all_files_except_those_it_left_out(cache: Cache, old: Path) -> None:
    (old / "manifests" / "app" / "bad").write_bytes(b"no manifest")
    found = cache.adopt(old, how="move")
    assert list_left_out(found) == [("manifest", "app:bad")]
    files = [str(path.relative_to(old)) for path in sorted(old.rglob("*")) if path.is_file()]
    assert files == ["index.json", "manifests/app/bad"]
    (old / "manifests" / "app" / "bad").unlink()
    again = cache.adopt(old, how="move")
    assert again.left_out == []
    assert [str(image.name) for image in again.images] == NAMES, "the images are still in index.json and stored here"
    assert [path.name for path in old.rglob("*") if path.is_file()] == []
    assert cache.adopt(old, how="move").images == []


def test_an_interrupted_move_resumes(cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adopt._Adopter, "_delete_adopted", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            cache.adopt(old, how="move")
    assert blob_path(old, FIRST.config).exists()
    found = cache.adopt(old, how="move")
    assert (found.blobs, found.left_out, len(found.images)) == (0, [], 3)
    assert [path for path in old.rglob("*") if path.is_file()] == []


def test_a_move_does_not_delete_a_blob_whose_stored_copy_is_damaged(cache: Cache, old: Path) -> None:
    cache.adopt(old)
    layer = FIRST.layers[0]
    path = cache.get_blob_path(make.digest_of(layer))
    path.chmod(0o600)
    path.write_bytes(b"x" * len(layer))
    cache.adopt(old, how="move")
    assert blob_path(old, layer).read_bytes() == layer
    path.write_bytes(layer)
    assert not blob_path(old, FIRST.config).exists()


def test_a_move_does_not_delete_a_blob_that_was_removed_meanwhile(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt._Adopter, "_leave_out_lost", lambda self: cache.remove_manifest("app:1"))
    cache.adopt(old, how="move")
    own = FIRST.layers[1]  # a layer of no other image
    assert blob_path(old, own).read_bytes() == own
    assert not blob_path(old, FIRST.layers[0]).exists()


def test_a_move_deletes_no_blob_of_this_cache_through_a_bind_mount(cache: Cache, old: Path) -> None:
    cache.adopt(old)
    shutil.rmtree(old / "blobs")
    before = read_tree(cache.directory / "blobs")
    with mounted(old / "blobs", "--bind", cache.directory / "blobs"):
        with pytest.raises(NotACache, match="is a folder of this cache, so nothing is moved: adopt it without --move"):
            cache.adopt(old, how="move")
        assert len(cache.adopt(old, how="copy").images) == len(IMAGES)
    assert read_tree(cache.directory / "blobs") == before


def test_a_move_leaves_other_names_of_a_blob_as_they_are(cache: Cache, old: Path, tmp_path: Path) -> None:
    layer = FIRST.layers[0]
    os.link(blob_path(old, layer), tmp_path / "mine")
    mode = (tmp_path / "mine").stat().st_mode
    cache.adopt(old, how="move")
    assert ((tmp_path / "mine").stat().st_mode, (tmp_path / "mine").stat().st_nlink) == (mode, 1)
    assert not blob_path(old, layer).exists()
    (tmp_path / "mine").write_bytes(b"changed later")
    assert cache.get_blob(make.digest_of(layer)) == layer


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_a_move_does_not_delete_the_target_of_a_link(cache: Cache, old: Path, tmp_path: Path, place: str) -> None:
    target = (old if place == "inside" else tmp_path) / "mine.json"
    (old / "index.json").rename(target)
    (old / "index.json").symlink_to(target)
    found = cache.adopt(old, how="move")
    assert len(found.images) == len(IMAGES)
    assert target.exists()
    assert not blob_path(old, FIRST.config).exists()


def test_a_move_does_not_delete_what_was_written_meanwhile(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, untouched = old / "manifests" / "app" / "1", old / "manifests" / "app" / "2"

    def write(_: object) -> None:
        for path in (changed, old / "index.json"):
            path.write_bytes(path.read_bytes() + b" ")

    monkeypatch.setattr(adopt._Adopter, "_leave_out_lost", write)
    cache.adopt(old, how="move")
    assert not untouched.exists()
    assert changed.read_bytes() == FIRST.manifest + b" "
    assert json.loads((old / "index.json").read_bytes())


@pytest.mark.parametrize("how", adopt.HOWS[:2])
def test_a_second_adoption_changes_nothing_and_reads_no_blob(
    cache: Cache, old: Path, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.adopt(old, how=how)
    before, rows = read_tree(cache.directory / "blobs"), stored_rows(cache.directory)
    images = cache.list_manifests()
    monkeypatch.setattr(adopt._Adopter, "_receive", lambda *_: pytest.fail("a blob was read"))
    found = cache.adopt(old, how=how)
    assert (found.blobs, found.bytes, found.left_out) == (0, 0, [])
    assert found.images == images == cache.list_manifests()
    assert (read_tree(cache.directory / "blobs"), stored_rows(cache.directory)) == (before, rows)


def test_files_that_the_index_does_not_name_are_adopted(cache: Cache, old: Path) -> None:
    make.write_index(old, {})
    blob_path(old, b"unreferenced").write_bytes(b"unreferenced")
    found = cache.adopt(old)
    assert (found.left_out, len(found.images), found.unused) == ([], 3, 1)
    assert cache.get_blob(make.digest_of(b"unreferenced")) == b"unreferenced"
    assert cache.collect_garbage().blobs == 1


def test_an_extra_blob_that_the_index_lists_for_an_image_is_attached_to_it(cache: Cache, old: Path) -> None:
    document = make.json_cache(old, IMAGES)
    signature = b"a signature"
    blob_path(old, signature).write_bytes(signature)
    listed = {**make.json_blob(signature), "media_type": "application/vnd.example.signature"}
    document["app/1"]["blobs"][listed["digest"]] = listed
    document["app/1"]["blobs"][make.digest_of(b"gone")] = make.json_blob(b"gone")
    make.write_index(old, document)
    found = cache.adopt(old)
    assert list_left_out(found) == [("missing", "app:1")]
    blob = cache.get_image_blobs("app:1")[-1]
    assert (blob.digest, blob.role, blob.media_type) == (listed["digest"], "other", "application/vnd.example.signature")
    assert cache.collect_garbage().blobs == 0


def test_children_of_an_image_index_are_found_among_blobs_and_manifests(cache: Cache, old: Path) -> None:
    arm, amd = make.image(8, architecture="arm64"), make.image(9)
    make.json_cache(old, {"app/amd": amd, f"app/{arm.digest}": arm})
    (old / "manifests" / "app" / "all").write_bytes(make.index(amd, arm))
    blob_path(old, amd.manifest).write_bytes(amd.manifest)
    found = cache.adopt(old)
    assert found.left_out == []
    assert {*amd.blobs, *arm.blobs} < {blob.digest for blob in cache.get_image_blobs("app:all")}
    assert cache.is_image_complete("app:all")
    assert cache.is_image_complete(f"app@{arm.digest}")


# The index


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "Unterminated|Expecting"),
        (lambda data: data + data[-200:], "Extra data"),
        (lambda data: b"", "Expecting value"),
        (lambda data: b"[" * 100_000, "recursion|overflow"),
        (lambda data: b'{"\xff": 1}', "decode"),
        (lambda data: b"[]", "not a JSON object"),
        (lambda data: None, "No such file"),
    ],
)
def test_a_damaged_index_is_reported_and_its_files_are_adopted(
    cache: Cache, old: Path, damage: Callable[[bytes], bytes | None], words: str
) -> None:
    data = damage((old / "index.json").read_bytes())
    (old / "index.json").unlink()
    if data is not None:
        (old / "index.json").write_bytes(data)
    found = cache.adopt(old)
    assert found.index_damage
    assert any(word in found.index_damage for word in words.split("|"))
    assert "\n" not in found.index_damage
    assert (found.left_out, [str(image.name) for image in found.images]) == ([], NAMES)


@pytest.mark.parametrize("writer", [".cache", "/gone/long/ago/.cache", "other", "../.cache"])
def test_paths_in_the_index_may_be_stale(cache: Cache, tmp_path: Path, writer: str) -> None:
    old = tmp_path / "renamed"
    make.json_cache(old, IMAGES, writer=writer)
    assert cache.adopt(old).left_out == []


@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_in_another_place_is_found_by_its_path_in_the_index(cache: Cache, old: Path, absolute: bool) -> None:
    document = make.json_cache(old, IMAGES)
    place = str(old) if absolute else old.name
    for data in FIRST.layers:
        (old / "blobs" / "elsewhere").mkdir(exist_ok=True)
        blob_path(old, data).rename(old / "blobs" / "elsewhere" / make.hex_of(data))
        document["app/1"]["blobs"][make.digest_of(data)]["path"] = f"{place}/blobs/elsewhere/{make.hex_of(data)}"
    (old / "manifests" / "app" / "1").rename(old / "manifest-of-app")
    document["app/1"]["manifest_path"] = f"{place}/manifest-of-app"
    make.write_index(old, document)
    found = cache.adopt(old)
    assert [item for item in found.left_out if item.name] == []
    assert_is_stored(cache, "app:1", FIRST)


@pytest.mark.parametrize("how", adopt.HOWS)
def test_nothing_outside_the_directory_is_read_linked_or_deleted(cache: Cache, old: Path, how: How) -> None:
    outside = old.parent / "outside"
    outside.mkdir()
    document = make.json_cache(old, IMAGES)
    for data in FIRST.layers:
        blob_path(old, data).rename(outside / make.hex_of(data))
    document["app/1"]["blobs"][make.digest_of(FIRST.layers[0])]["path"] = str(outside / make.hex_of(FIRST.layers[0]))
    document["app/1"]["blobs"][make.digest_of(FIRST.layers[1])]["path"] = "../outside/" + make.hex_of(FIRST.layers[1])
    (outside / "manifest").write_bytes(make.image(20).manifest)
    document["evil/1"] = {"manifest_path": str(outside / "manifest"), "blobs": {}}
    (old / "manifests" / "link").symlink_to(outside / "manifest")
    (old / "manifests" / "folder").symlink_to(outside)
    blob_path(old, b"linked").symlink_to(outside / make.hex_of(FIRST.layers[0]))
    make.write_index(old, document)
    before = read_tree(outside)
    found = cache.adopt(old, how=how)
    assert read_tree(outside) == before
    assert sorted(list_left_out(found), key=str) == sorted(
        [
            ("missing", "app:1"), ("missing", "app:1"), ("missing", "app:2"), ("missing", "evil:1"),
            ("name", "link"), ("stray", "folder"), ("stray", None),
        ],
        key=str,
    )  # fmt: skip
    assert not cache.is_image_complete("app:1")


@pytest.mark.parametrize(
    "entry",
    [
        None, 1, "text", [], {"repository": 1}, {"reference": None}, {"blobs": 7}, {"blobs": {"sha256:x": {}}},
        {"blobs": {make.digest_of(b"x"): "text"}}, {"manifest_path": 5}, {"manifest_path": "a\0b"},
        {"blobs": {make.digest_of(FIRST.config): {"path": ["x"], "media_type": {}, "is_config": "maybe"}}},
        {"repository": "UPPER", "reference": "1"}, {"repository": "../..", "reference": "1"},
    ],
)  # fmt: skip
def test_an_invalid_entry_does_not_prevent_the_adoption_of_others(cache: Cache, old: Path, entry: object) -> None:
    document: dict[str, Any] = make.json_cache(old, IMAGES)
    make.write_index(old, {**document, "odd/1": entry, "no-slash": entry, "": entry})
    found = cache.adopt(old)
    assert [str(image.name) for image in found.images] == NAMES
    assert {item.kind for item in found.left_out} <= {"name", "missing"}
    assert found.left_out


# Files that are left out


def test_a_blob_that_fails_its_digest_is_left_out_and_its_images_are_incomplete(cache: Cache, old: Path) -> None:
    shared = FIRST.layers[0]
    blob_path(old, shared).write_bytes(b"x" * len(shared))
    blob_path(old, b"unreferenced").write_bytes(b"altered")
    found = cache.adopt(old)
    assert list_left_out(found) == [("corrupt", "app:1"), ("corrupt", "app:2"), ("corrupt", None)]
    item = found.left_out[0]
    assert (item.digest, item.path) == (make.digest_of(shared), blob_path(old, shared))
    assert "has sha256:" in item.detail
    assert [image.complete for image in found.images] == [False, False, True]
    blob_path(old, shared).write_bytes(shared)
    assert list_left_out(cache.adopt(old)) == [("corrupt", None)], "the damaged blob was not replaced"
    assert_is_stored(cache, "app:1", FIRST)


def test_a_missing_blob_is_reported_unless_it_is_stored_already(cache: Cache, old: Path) -> None:
    blob_path(old, FIRST.layers[1]).unlink()
    blob_path(old, IMAGES["app/2"].layers[1]).unlink()
    cache.add_blob(IMAGES["app/2"].layers[1])
    found = cache.adopt(old)
    assert list_left_out(found) == [("missing", "app:1")]
    assert found.left_out[0].digest == make.digest_of(FIRST.layers[1])
    assert_is_stored(cache, "app:2", IMAGES["app/2"])


def test_a_name_of_another_image_here_is_not_changed(cache: Cache, old: Path) -> None:
    mine = make.image(30)
    cache.save_manifest("app:1", mine.manifest)
    found = cache.adopt(old)
    assert list_left_out(found) == [("exists", "app:1")]
    assert mine.digest in found.left_out[0].detail
    assert cache.get_manifest("app:1") == mine.manifest
    assert [str(image.name) for image in found.images] == NAMES[1:]
    assert not cache.has_blob(make.digest_of(FIRST.layers[1])), "a blob of the image was adopted"
    cache.tag("app:1", "mine:1")
    cache.remove_manifest("app:1")
    assert cache.adopt(old).left_out == []


def test_a_name_that_is_taken_during_the_adoption_is_not_changed(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, receive = make.image(30), adopt._Adopter._receive

    def take_name_and_receive(self: Any, *arguments: Any) -> None:
        with Cache.open(cache.directory) as other:
            other.save_manifest("app:1", mine.manifest)
        receive(self, *arguments)

    monkeypatch.setattr(adopt._Adopter, "_receive", take_name_and_receive)
    assert ("exists", "app:1") in list_left_out(cache.adopt(old))
    assert cache.get_manifest("app:1") == mine.manifest


@pytest.mark.parametrize(
    ("name", "data", "kind", "words"),
    [
        ("app/bad", b"{", "manifest", "not JSON"),
        ("app/bad", b"", "manifest", "not JSON"),
        ("app/bad", b"x" * (4 * 1024 * 1024 + 1), "manifest", "4194305 bytes"),
        ("app/bad", b'{"schemaVersion":1}', "manifest", "schemaVersion 2"),
        ("app/bad", b'{"schemaVersion":2,"config":{"digest":"sha256:../../etc","size":1}}', "manifest", "digest"),
        (f"app/{make.digest_of(b'other')}", FIRST.manifest, "corrupt", "should have digest"),
        ("UPPER/1", FIRST.manifest, "name", "lower case"),
        ("app/.hidden", FIRST.manifest, "name", "a tag has"),
        ("lonely", FIRST.manifest, "name", "repository"),
        ("app/new\nline", FIRST.manifest, "name", "a tag has"),
    ],
)
def test_an_invalid_or_unnamed_manifest_is_left_out(
    cache: Cache, old: Path, name: str, data: bytes, kind: str, words: str
) -> None:
    make.write(old, {f"manifests/{name}": data})
    found = cache.adopt(old)
    assert [item.kind for item in found.left_out] == [kind]
    assert words in found.left_out[0].detail
    assert "\n" not in found.left_out[0].detail
    assert found.left_out[0].path == old / "manifests" / name
    assert [str(image.name) for image in found.images] == NAMES


def test_a_manifest_that_declares_a_wrong_size_is_left_out(cache: Cache, old: Path) -> None:
    document = json.loads(FIRST.manifest)
    document["layers"][0]["size"] += 1
    (old / "manifests" / "app" / "wrong").write_text(json.dumps(document))
    found = cache.adopt(old)
    assert list_left_out(found) == [("manifest", "app:wrong")]
    assert [str(image.name) for image in found.images] == NAMES


def test_stray_files_among_the_blobs_are_reported(cache: Cache, old: Path) -> None:
    (old / "blobs" / "sha256" / "readme.txt").write_text("x")
    (old / "blobs" / "md5").mkdir()
    found = cache.adopt(old)
    assert list_left_out(found) == [("stray", None), ("stray", None)]


def test_a_fifo_does_not_block_the_adoption(cache: Cache, old: Path) -> None:
    os.mkfifo(old / "manifests" / "app" / "fifo")
    os.mkfifo(blob_path(old, b"fifo"))
    assert list_left_out(cache.adopt(old)) == [("unreadable", "app:fifo"), ("stray", None)]


def test_unreadable_files_are_reported(cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = {old / "manifests" / "app" / "2", blob_path(old, FIRST.layers[1]), old / "manifests" / "locked"}
    (old / "manifests" / "locked").mkdir()

    def refuse_locked(call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and Path(path) in locked:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *arguments, **options)

        return replacement

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse_locked(os.open))
        patch.setattr(os, "scandir", refuse_locked(os.scandir))
        found = cache.adopt(old)
    assert list_left_out(found) == [("unreadable", "app:1"), ("unreadable", "app:2"), ("unreadable", "locked")]
    assert all("Permission denied" in item.detail for item in found.left_out)


@pytest.mark.parametrize("what", ["nothing", "empty", "file", "cache", "itself", "layout"])
def test_a_directory_that_is_no_index_json_cache_is_refused(cache: Cache, tmp_path: Path, what: str) -> None:
    path = tmp_path / "it"
    if what == "itself":
        path.symlink_to(cache.directory)
    elif what == "layout":
        make.write(path, make.oci_files({"app:1": FIRST}))
    elif what == "cache":
        Cache.open(path).close()
    elif what == "file":
        path.write_text("x")
    elif what == "empty":
        path.mkdir()
    with pytest.raises(NotACache):
        cache.adopt(path)


def test_an_unknown_way_to_adopt_is_refused(cache: Cache, old: Path) -> None:
    with pytest.raises(CacheError, match="use one of copy, link, move"):
        cache.adopt(old, how="steal")  # type: ignore[arg-type]


# Concurrent and interrupted adoptions


def test_several_threads_may_adopt_at_once(directory: Path, old: Path) -> None:
    results: list[Adoption] = []

    def work() -> None:
        with Cache.open(directory) as cache:
            results.append(cache.adopt(old))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(len(result.images), result.left_out) for result in results] == [(3, [])] * 4
    check(directory)


def test_blobs_shared_with_an_image_that_is_removed_meanwhile_are_adopted(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt, "_BATCH", 1)
    save = adopt._Adopter._save

    def save_and_note(self: Any, connection: Any, part: Any) -> None:
        save(self, connection, part)
        if "app:1" in [str(image.name) for image in part]:
            later.append("app:1")

    later: list[str] = []
    removed: list[str] = []
    adopt_part = adopt._Adopter._adopt_part

    def adopt_and_remove(self: Any, *arguments: Any) -> None:
        adopt_part(self, *arguments)
        while later:
            removed.append(later.pop())
            cache.remove_manifest(removed[-1])

    monkeypatch.setattr(adopt._Adopter, "_save", save_and_note)
    monkeypatch.setattr(adopt._Adopter, "_adopt_part", adopt_and_remove)
    cache.adopt(old)
    assert removed == ["app:1"]
    assert_is_stored(cache, "app:2", IMAGES["app/2"])  # shares a layer with the removed image


def test_a_failed_adoption_keeps_complete_images_and_no_partial_blobs(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt, "_BATCH", 1)
    receive, adopt_part, first = adopt._Adopter._receive, adopt._Adopter._adopt_part, threading.Event()

    def adopt_and_signal(self: Any, part: Any, *arguments: Any) -> None:
        adopt_part(self, part, *arguments)
        if [str(image.name) for image in part] == ["app:1"]:
            first.set()

    def fail_full(self: Any, received: Any, digest: Any, advance: Any) -> None:
        if digest not in FIRST.blobs and first.wait(60):
            raise StorageError("no space left")
        receive(self, received, digest, advance)

    with monkeypatch.context() as patch:
        patch.setattr(adopt._Adopter, "_adopt_part", adopt_and_signal)
        patch.setattr(adopt._Adopter, "_receive", fail_full)
        with pytest.raises(StorageError, match="no space"):
            cache.adopt(old)
    assert cache.is_image_complete("app:1")
    assert files_of(cache.directory) == stored_rows(cache.directory)
    assert cache.adopt(old).left_out == []


def test_progress_ends_at_the_bytes_of_all_blobs(cache: Cache, old: Path) -> None:
    for _ in range(2):
        calls: list[tuple[int, int]] = []
        cache.adopt(old, progress=lambda done, total, calls=calls: calls.append((done, total)))  # type: ignore[misc]
        total = sum(path.stat().st_size for path in (old / "blobs" / "sha256").iterdir())
        assert calls[-1] == (total, total)


def test_a_blob_that_two_parts_read_at_once_counts_once(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt, "_BATCH", 1)
    receive, both = adopt._Adopter._receive, threading.Barrier(2, timeout=60)
    shared = make.digest_of(FIRST.layers[0])

    def meet_and_receive(self: Any, received: Any, digest: Any, advance: Any) -> None:
        if digest == shared:
            both.wait()
        receive(self, received, digest, advance)

    monkeypatch.setattr(adopt._Adopter, "_receive", meet_and_receive)
    calls: list[tuple[int, int]] = []
    found = cache.adopt(old, progress=lambda done, total: calls.append((done, total)))
    total = sum(path.stat().st_size for path in (old / "blobs" / "sha256").iterdir())
    assert calls[-1] == (total, total)
    assert (found.blobs, found.bytes) == (len(files_of(cache.directory)), sum(files_of(cache.directory).values()))


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("CACHEDB_FUZZ", "30")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_intact_files_are_adopted_whatever_other_files_are_damaged(tmp_path: Path, data: st.DataObject) -> None:
    place = tmp_path / "fuzz"
    shutil.rmtree(place, ignore_errors=True)
    old = place / ".cache"
    make.json_cache(old, IMAGES)
    files = sorted(path for path in old.rglob("*") if path.is_file())
    bad: set[Path] = set()
    for path in data.draw(st.lists(st.sampled_from(files), max_size=5, unique=True)):
        content = path.read_bytes()
        change = data.draw(st.sampled_from(["delete", "cut", "alter", "append"]))
        if change == "delete":
            path.unlink()
        else:
            at = data.draw(st.integers(0, len(content) - 1))
            altered = bytes([content[at] ^ data.draw(st.integers(1, 255))])
            path.write_bytes(
                {
                    "cut": content[:at],
                    "alter": content[:at] + altered + content[at + 1 :],
                    "append": content + altered,
                }[change]
            )
        bad.add(path)
    how = data.draw(st.sampled_from(adopt.HOWS))
    with Cache.open(place / "cache") as cache:
        cache.adopt(old, how=how)
        for key, name in zip(IMAGES, NAMES, strict=True):
            if old / "manifests" / key in bad:
                continue
            image = IMAGES[key]
            for blob in cache.get_image_blobs(name):
                if blob.position:
                    assert blob.stored == (blob_path(old, image.blobs[blob.digest]) not in bad)
    check(place / "cache")


# The command line


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_the_command_prints_what_was_left_out_and_exits_with_1(cachedb: Run, old: Path) -> None:
    done = cachedb("adopt", old)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "images: 3; new blobs: 10, 16.4 kB\n"
    again = cachedb("adopt", old, "--format", "json")
    found = json.loads(again.stdout)
    assert again.returncode == 0
    assert list(found) == ["images", "blobs", "bytes", "unused", "index_damage", "left_out", "size"]
    assert found["size"] == found["bytes"]
    assert found["images"] == json.loads(cachedb("ls", "--format", "json").stdout)
    assert cachedb("adopt", "-q", old).stdout.split() == NAMES

    blob_path(old, b"x").write_bytes(b"y")
    (old / "index.json").write_text("{")
    table = cachedb("adopt", old)
    assert table.returncode == 1
    lines = table.stdout.splitlines()
    assert lines[0].split()[:3] == ["LEFT", "OUT", "NAME"]
    assert lines[1].startswith(f"corrupt   -     {make.digest_of(b'x')}")
    assert lines[-1] == "images: 3; new blobs: 0, 0 B"
    assert table.stderr.startswith("index.json was not used: ")
    assert table.stderr.count("\n") == 1
    listed = cachedb("adopt", old, "--format", "json")
    assert listed.returncode == 1
    (item,) = json.loads(listed.stdout)["left_out"]
    assert item["path"] == str(blob_path(old, b"x"))
    assert (item["kind"], item["name"], item["digest"]) == ("corrupt", None, make.digest_of(b"x"))


def test_link_and_move_exclude_each_other(cachedb: Run, old: Path) -> None:
    assert cachedb("adopt", "--link", "--move", old).returncode == 2
    assert cachedb("adopt", old / "nowhere").returncode == 1


@pytest.mark.slow
def test_an_image_written_by_skopeo_keeps_its_digest(
    cachedb: Run, peer: Callable[[str], str], tmp_path: Path, directory: Path
) -> None:
    import subprocess

    skopeo = peer("skopeo")
    layout = Path(__file__).parents[2] / "examples" / "hello.oci.tar"
    plain = tmp_path / "dir"
    copy = [skopeo, "copy", "--quiet", f"oci-archive:{layout}", f"dir:{plain}"]
    subprocess.run(copy, check=True, capture_output=True)
    old = tmp_path / ".cache"
    make.write(old, {"manifests/hello/1": (plain / "manifest.json").read_bytes()})
    (old / "blobs" / "sha256").mkdir(parents=True)
    for path in plain.iterdir():
        if len(path.name) == 64:
            shutil.copy(path, old / "blobs" / "sha256" / path.name)
    make.write_index(old, {})
    assert cachedb("adopt", "--link", old).returncode == 0
    assert cachedb("export", "hello:1", tmp_path / "hello.tar").returncode == 0
    command = [skopeo, "inspect", "--format", "{{.Digest}}", f"oci-archive:{tmp_path / 'hello.tar'}"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert found == make.digest_of((plain / "manifest.json").read_bytes())


# Lifetimes


@pytest.mark.parametrize("state", ["complete", "incomplete", "without its manifest"])
def test_each_adoption_of_a_name_decides_anew_when_it_expires(cache: Cache, old: Path, state: str) -> None:
    if state == "incomplete":
        blob_path(old, FIRST.layers[1]).unlink()
    for ttl in (3600, 60, None):
        if state == "without its manifest" and ttl == 60:
            (old / "manifests" / "app" / "1").unlink()
        before = datetime.now(UTC)
        found = cache.adopt(old, ttl=ttl)
        assert [str(image.name) for image in found.images] == NAMES
        for image in found.images:
            assert image == cache.get_image(image.name)
            if ttl is None:
                assert image.expires_at is None
            else:
                assert image.expires_at is not None
                assert before <= image.expires_at - timedelta(seconds=ttl) <= datetime.now(UTC)


def test_a_name_that_is_another_image_or_becomes_one_meanwhile_keeps_its_lifetime(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_other(name: str) -> ImageInfo:
        other = make.image(7)
        for digest, data in other.blobs.items():
            cache.save_blob(digest, data)
        return cache.save_manifest(name, other.manifest)

    save_other("app:2")
    adopted = cache.adopt(old, ttl=3600)
    assert list_left_out(adopted) == [("exists", "app:2")]
    assert cache.get_image("app:2").expires_at is None
    assert cache.get_image("app:1").expires_at is not None
    real = adopt._Adopter._set_lifetimes

    def replace_first(self: adopt._Adopter, found: list[ImageInfo]) -> list[ImageInfo]:
        save_other("app:1")
        return real(self, found)

    monkeypatch.setattr(adopt._Adopter, "_set_lifetimes", replace_first)
    cache.adopt(old, ttl=60)
    assert cache.get_image("app:1").expires_at is None


def test_adopting_again_uses_no_image_without_lifetimes(cache: Cache, old: Path) -> None:
    first = cache.adopt(old)
    assert cache.adopt(old).images == first.images


def test_the_command_adopt_gives_a_lifetime(cachedb: Run, directory: Path, old: Path) -> None:
    before = datetime.now(UTC)
    assert cachedb("adopt", "--ttl", "6h", old).returncode == 0
    with Cache.open(directory) as opened:
        expiry = opened.get_image("app:1").expires_at
    assert expiry is not None
    assert before <= expiry - timedelta(hours=6) <= datetime.now(UTC)
