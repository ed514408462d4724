"""Adoption of a cache whose index is one `index.json`: what is good comes, and the rest is told."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachedb import Adoption, Cache, CacheError, NotACache, StorageError
from cachedb.oci.manifests import OCI_MANIFEST
from cachedb.operations import adopt
from cachedb.operations.adopt import How
from tests.conftest import Run, files_of, stored_rows
from tests.operations.test_pull import assert_is_here
from tests.support import make
from tests.support.promises import check

IMAGES = {
    "app/1": make.image(1, 2, compression="gzip"),
    "app/2": make.image(1, 3, compression="gzip"),
    "registry.example.org:5000/team/deep/er/app/latest": make.image(4),
}
NAMES = ["app:1", "app:2", "registry.example.org:5000/team/deep/er/app:latest"]
FIRST = IMAGES["app/1"]


@pytest.fixture
def cache(directory: Path) -> Iterator[Cache]:
    """A cache that keeps its promises, whatever a test did to it."""
    with Cache.open(directory) as opened:
        yield opened
    check(directory)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "work" / ".cache"
    make.json_cache(path, IMAGES)
    return path


def blob_of(old: Path, data: bytes) -> Path:
    return old / "blobs" / "sha256" / make.hex_of(data)


def tree(path: Path) -> dict[str, tuple[bytes | None, int]]:
    """All files and folders below a path, with their content and mode."""
    return {
        str(found.relative_to(path)): (found.read_bytes() if found.is_file() else None, found.lstat().st_mode)
        for found in sorted(path.rglob("*"))
    }


def told(adoption: Adoption) -> list[tuple[str, str | None]]:
    return [(item.kind, item.name) for item in adoption.left_out]


# What is good


@pytest.mark.parametrize("how", adopt.HOWS)
def test_all_images_come_with_their_names_and_blobs(cache: Cache, old: Path, how: How) -> None:
    before = tree(old)
    found = cache.adopt(old, how=how)
    assert [str(image.name) for image in found.images] == NAMES
    assert all(image.complete for image in found.images)
    assert (found.left_out, found.index_damage, found.unused) == ([], None, 0)
    everything = {digest: data for image in IMAGES.values() for digest, data in image.blobs.items()}
    assert (found.blobs, found.bytes) == (len(everything), sum(map(len, everything.values())))
    for name, image in zip(NAMES, IMAGES.values(), strict=True):
        assert_is_here(cache, name, image)
    if how != "move":
        assert tree(old) == before


def test_media_types_and_roles_are_those_of_the_manifest(cache: Cache, old: Path) -> None:
    cache.adopt(old)
    assert [(blob.role, blob.media_type) for blob in cache.get_image_blobs("app:1")] == [
        ("manifest", OCI_MANIFEST),
        ("config", "application/vnd.oci.image.config.v1+json"),
        *[("layer", "application/vnd.oci.image.layer.v1.tar+gzip")] * 2,
    ]
    image = cache.get_image("app:1")
    assert (image.os, image.architecture) == ("linux", "amd64")


def test_blobs_are_linked_where_that_is_asked_for_and_manifests_never_are(cache: Cache, old: Path) -> None:
    cache.adopt(old, how="link")
    for data in (FIRST.config, *FIRST.layers):
        assert cache.get_blob_path(make.digest_of(data)).samefile(blob_of(old, data))
    assert not cache.get_blob_path(FIRST.digest).samefile(old / "manifests" / "app" / "1")
    (old / "manifests" / "app" / "1").write_bytes(b"the old cache moves a tag")


@pytest.mark.parametrize("how", ["link", "move"])
def test_what_cannot_be_linked_is_copied(cache: Cache, old: Path, how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    link, refused = os.link, set()

    def across(source: Path, target: Path, **options: Any) -> None:
        if Path(source).is_relative_to(old):
            refused.add(Path(source))
            raise OSError(18, "Invalid cross-device link")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", across)
    found = cache.adopt(old, how=how)
    assert blob_of(old, FIRST.config) in refused
    assert not found.left_out
    assert_is_here(cache, "app:1", FIRST)
    if how == "link":
        assert not cache.get_blob_path(make.digest_of(FIRST.config)).samefile(blob_of(old, FIRST.config))


def test_a_file_that_is_replaced_while_it_is_linked_is_left_out(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, victim = os.link, blob_of(old, FIRST.layers[1])

    def replaced(source: Path, target: Path, **options: Any) -> None:
        if Path(source) == victim:
            victim.unlink()
            victim.write_bytes(b"something else")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", replaced)
    found = cache.adopt(old, how="link")
    assert told(found) == [("unreadable", "app:1")]


def test_what_is_moved_can_be_written_to_by_nobody(cache: Cache, old: Path) -> None:
    assert blob_of(old, FIRST.config).stat().st_mode & 0o222
    cache.adopt(old, how="move")
    for digest in FIRST.blobs:
        assert cache.get_blob_path(digest).stat().st_mode & 0o777 == 0o444


def test_a_move_leaves_nothing_but_what_was_left_out(cache: Cache, old: Path) -> None:
    (old / "manifests" / "app" / "bad").write_bytes(b"no manifest")
    found = cache.adopt(old, how="move")
    assert told(found) == [("manifest", "app:bad")]
    files = [str(path.relative_to(old)) for path in sorted(old.rglob("*")) if path.is_file()]
    assert files == ["index.json", "manifests/app/bad"]
    (old / "manifests" / "app" / "bad").unlink()
    again = cache.adopt(old, how="move")
    assert again.left_out == []
    assert [str(image.name) for image in again.images] == NAMES, "the index still names them, and they are here"
    assert [path.name for path in old.rglob("*") if path.is_file()] == []
    assert cache.adopt(old, how="move").images == []


def test_a_move_goes_on_where_it_was_cut_off(cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(adopt._Adopter, "_delete_adopted", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            cache.adopt(old, how="move")
    assert blob_of(old, FIRST.config).exists()
    found = cache.adopt(old, how="move")
    assert (found.blobs, found.left_out, len(found.images)) == (0, [], 3)
    assert [path for path in old.rglob("*") if path.is_file()] == []


def test_a_move_takes_nothing_away_of_which_the_copy_here_is_bad(cache: Cache, old: Path) -> None:
    cache.adopt(old)
    layer = FIRST.layers[0]
    path = cache.get_blob_path(make.digest_of(layer))
    path.chmod(0o600)
    path.write_bytes(b"x" * len(layer))
    cache.adopt(old, how="move")
    assert blob_of(old, layer).read_bytes() == layer
    path.write_bytes(layer)
    assert not blob_of(old, FIRST.config).exists()


def test_a_move_takes_nothing_away_that_is_not_here_any_more(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt._Adopter, "_leave_out_lost", lambda self: cache.remove_manifest("app:1"))
    cache.adopt(old, how="move")
    own = FIRST.layers[1]  # which no other image has
    assert blob_of(old, own).read_bytes() == own
    assert not blob_of(old, FIRST.layers[0]).exists()


@pytest.mark.parametrize("how", adopt.HOWS[:2])
def test_doing_it_again_changes_nothing_and_reads_no_blob(
    cache: Cache, old: Path, how: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.adopt(old, how=how)
    before, rows = tree(cache.directory / "blobs"), stored_rows(cache.directory)
    images = cache.list_manifests()
    monkeypatch.setattr(adopt._Adopter, "_receive", lambda *_: pytest.fail("a blob was read"))
    found = cache.adopt(old, how=how)
    assert (found.blobs, found.bytes, found.left_out) == (0, 0, [])
    assert found.images == images == cache.list_manifests()
    assert (tree(cache.directory / "blobs"), stored_rows(cache.directory)) == (before, rows)


def test_what_the_index_does_not_know_is_adopted(cache: Cache, old: Path) -> None:
    make.write_index(old, {})
    blob_of(old, b"nobody's").write_bytes(b"nobody's")
    found = cache.adopt(old)
    assert (found.left_out, len(found.images), found.unused) == ([], 3, 1)
    assert cache.get_blob(make.digest_of(b"nobody's")) == b"nobody's"
    assert cache.collect_garbage().blobs == 1


def test_a_blob_that_the_index_has_for_an_image_is_attached_to_it(cache: Cache, old: Path) -> None:
    document = make.json_cache(old, IMAGES)
    signature = b"a signature"
    blob_of(old, signature).write_bytes(signature)
    said = {**make.json_blob(signature), "media_type": "application/vnd.example.signature"}
    document["app/1"]["blobs"][said["digest"]] = said
    document["app/1"]["blobs"][make.digest_of(b"gone")] = make.json_blob(b"gone")
    make.write_index(old, document)
    found = cache.adopt(old)
    assert told(found) == [("missing", "app:1")]
    blob = cache.get_image_blobs("app:1")[-1]
    assert (blob.digest, blob.role, blob.media_type) == (said["digest"], "other", "application/vnd.example.signature")
    assert cache.collect_garbage().blobs == 0


def test_an_index_of_platforms_finds_its_children_among_blobs_and_manifests(cache: Cache, old: Path) -> None:
    arm, amd = make.image(8, architecture="arm64"), make.image(9)
    make.json_cache(old, {"app/amd": amd, f"app/{arm.digest}": arm})
    (old / "manifests" / "app" / "all").write_bytes(make.index(amd, arm))
    blob_of(old, amd.manifest).write_bytes(amd.manifest)
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
        (lambda data: b"[" * 100_000, "recursion"),
        (lambda data: b'{"\xff": 1}', "decode"),
        (lambda data: b"[]", "not a JSON object"),
        (lambda data: None, "No such file"),
    ],
)
def test_a_damaged_index_is_told_and_the_files_are_enough(
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
def test_what_is_not_where_it_should_be_is_looked_for_where_the_index_says(
    cache: Cache, old: Path, absolute: bool
) -> None:
    document = make.json_cache(old, IMAGES)
    place = str(old) if absolute else old.name
    for data in FIRST.layers:
        (old / "blobs" / "elsewhere").mkdir(exist_ok=True)
        blob_of(old, data).rename(old / "blobs" / "elsewhere" / make.hex_of(data))
        document["app/1"]["blobs"][make.digest_of(data)]["path"] = f"{place}/blobs/elsewhere/{make.hex_of(data)}"
    (old / "manifests" / "app" / "1").rename(old / "manifest-of-app")
    document["app/1"]["manifest_path"] = f"{place}/manifest-of-app"
    make.write_index(old, document)
    found = cache.adopt(old)
    assert [item for item in found.left_out if item.name] == []
    assert_is_here(cache, "app:1", FIRST)


@pytest.mark.parametrize("how", adopt.HOWS)
def test_nothing_outside_the_directory_is_read_linked_or_deleted(cache: Cache, old: Path, how: How) -> None:
    outside = old.parent / "outside"
    outside.mkdir()
    document = make.json_cache(old, IMAGES)
    for data in FIRST.layers:
        blob_of(old, data).rename(outside / make.hex_of(data))
    document["app/1"]["blobs"][make.digest_of(FIRST.layers[0])]["path"] = str(outside / make.hex_of(FIRST.layers[0]))
    document["app/1"]["blobs"][make.digest_of(FIRST.layers[1])]["path"] = "../outside/" + make.hex_of(FIRST.layers[1])
    (outside / "manifest").write_bytes(make.image(20).manifest)
    document["evil/1"] = {"manifest_path": str(outside / "manifest"), "blobs": {}}
    (old / "manifests" / "link").symlink_to(outside / "manifest")
    (old / "manifests" / "folder").symlink_to(outside)
    blob_of(old, b"linked").symlink_to(outside / make.hex_of(FIRST.layers[0]))
    make.write_index(old, document)
    before = tree(outside)
    found = cache.adopt(old, how=how)
    assert tree(outside) == before
    assert sorted(told(found), key=str) == sorted(
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
def test_an_odd_entry_costs_nothing_else(cache: Cache, old: Path, entry: object) -> None:
    document: dict[str, Any] = make.json_cache(old, IMAGES)
    make.write_index(old, {**document, "odd/1": entry, "no-slash": entry, "": entry})
    found = cache.adopt(old)
    assert [str(image.name) for image in found.images] == NAMES
    assert {item.kind for item in found.left_out} <= {"name", "missing"}
    assert found.left_out


# What is left out


def test_a_blob_that_fails_its_digest_is_left_out_and_its_images_are_incomplete(cache: Cache, old: Path) -> None:
    shared = FIRST.layers[0]
    blob_of(old, shared).write_bytes(b"x" * len(shared))
    blob_of(old, b"nobody's").write_bytes(b"nobody's, and altered")
    found = cache.adopt(old)
    assert told(found) == [("corrupt", "app:1"), ("corrupt", "app:2"), ("corrupt", None)]
    item = found.left_out[0]
    assert (item.digest, item.path) == (make.digest_of(shared), blob_of(old, shared))
    assert "has sha256:" in item.detail
    assert [image.complete for image in found.images] == [False, False, True]
    blob_of(old, shared).write_bytes(shared)
    assert told(cache.adopt(old)) == [("corrupt", None)], "it heals"
    assert_is_here(cache, "app:1", FIRST)


def test_an_absent_blob_is_named_unless_it_is_here(cache: Cache, old: Path) -> None:
    blob_of(old, FIRST.layers[1]).unlink()
    blob_of(old, IMAGES["app/2"].layers[1]).unlink()
    cache.add_blob(IMAGES["app/2"].layers[1])
    found = cache.adopt(old)
    assert told(found) == [("missing", "app:1")]
    assert found.left_out[0].digest == make.digest_of(FIRST.layers[1])
    assert_is_here(cache, "app:2", IMAGES["app/2"])


def test_a_name_that_is_another_images_here_is_not_touched(cache: Cache, old: Path) -> None:
    mine = make.image(30)
    cache.save_manifest("app:1", mine.manifest)
    found = cache.adopt(old)
    assert told(found) == [("exists", "app:1")]
    assert mine.digest in found.left_out[0].detail
    assert cache.get_manifest("app:1") == mine.manifest
    assert [str(image.name) for image in found.images] == NAMES[1:]
    assert not cache.has_blob(make.digest_of(FIRST.layers[1])), "nothing of it is brought"
    cache.tag("app:1", "mine:1")
    cache.remove_manifest("app:1")
    assert cache.adopt(old).left_out == []


def test_a_name_that_is_taken_meanwhile_is_not_touched(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, receive = make.image(30), adopt._Adopter._receive

    def taken(self: Any, *arguments: Any) -> None:
        with Cache.open(cache.directory) as other:
            other.save_manifest("app:1", mine.manifest)
        receive(self, *arguments)

    monkeypatch.setattr(adopt._Adopter, "_receive", taken)
    assert ("exists", "app:1") in told(cache.adopt(old))
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
def test_a_manifest_that_is_none_or_has_no_name_is_left_out(
    cache: Cache, old: Path, name: str, data: bytes, kind: str, words: str
) -> None:
    make.write(old, {f"manifests/{name}": data})
    found = cache.adopt(old)
    assert [item.kind for item in found.left_out] == [kind]
    assert words in found.left_out[0].detail
    assert "\n" not in found.left_out[0].detail
    assert found.left_out[0].path == old / "manifests" / name
    assert [str(image.name) for image in found.images] == NAMES


def test_a_manifest_that_lies_about_a_size_is_left_out(cache: Cache, old: Path) -> None:
    document = json.loads(FIRST.manifest)
    document["layers"][0]["size"] += 1
    (old / "manifests" / "app" / "lie").write_text(json.dumps(document))
    found = cache.adopt(old)
    assert told(found) == [("manifest", "app:lie")]
    assert [str(image.name) for image in found.images] == NAMES


def test_what_is_no_blob_is_told(cache: Cache, old: Path) -> None:
    (old / "blobs" / "sha256" / "readme.txt").write_text("x")
    (old / "blobs" / "md5").mkdir()
    found = cache.adopt(old)
    assert told(found) == [("stray", None), ("stray", None)]


def test_a_fifo_holds_nobody_up(cache: Cache, old: Path) -> None:
    os.mkfifo(old / "manifests" / "app" / "fifo")
    os.mkfifo(blob_of(old, b"fifo"))
    assert told(cache.adopt(old)) == [("unreadable", "app:fifo"), ("stray", None)]


def test_what_cannot_be_read_is_told(cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = {old / "manifests" / "app" / "2", blob_of(old, FIRST.layers[1]), old / "manifests" / "locked"}
    (old / "manifests" / "locked").mkdir()

    def refused(call: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(path: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(path, int) and Path(path) in locked:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *arguments, **options)

        return replacement

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused(os.open))
        patch.setattr(os, "scandir", refused(os.scandir))
        found = cache.adopt(old)
    assert told(found) == [("unreadable", "app:1"), ("unreadable", "app:2"), ("unreadable", "locked")]
    assert all("Permission denied" in item.detail for item in found.left_out)


@pytest.mark.parametrize("what", ["nothing", "empty", "file", "cache", "itself", "layout"])
def test_what_is_no_such_cache_is_refused(cache: Cache, tmp_path: Path, what: str) -> None:
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


def test_a_way_that_is_none_is_refused(cache: Cache, old: Path) -> None:
    with pytest.raises(CacheError, match="use one of copy, link, move"):
        cache.adopt(old, how="steal")  # type: ignore[arg-type]


# Beside others, and cut off


def test_two_adopt_at_once(directory: Path, old: Path) -> None:
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


def test_what_is_removed_and_collected_meanwhile_comes_again(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt, "_BATCH", 1)
    save = adopt._Adopter._save

    def saved(self: Any, connection: Any, part: Any) -> None:
        save(self, connection, part)
        if "app:1" in [str(image.name) for image in part]:
            later.append("app:1")

    later: list[str] = []
    removed: list[str] = []
    bring = adopt._Adopter._adopt_part

    def bring_and_remove(self: Any, *arguments: Any) -> None:
        bring(self, *arguments)
        while later:
            removed.append(later.pop())
            cache.remove_manifest(removed[-1])

    monkeypatch.setattr(adopt._Adopter, "_save", saved)
    monkeypatch.setattr(adopt._Adopter, "_adopt_part", bring_and_remove)
    cache.adopt(old)
    assert removed == ["app:1"]
    assert_is_here(cache, "app:2", IMAGES["app/2"])  # which shares a layer with the one that was removed


def test_a_failure_leaves_what_was_done_and_nothing_half_done(
    cache: Cache, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt, "_BATCH", 1)
    receive, bring, first = adopt._Adopter._receive, adopt._Adopter._adopt_part, threading.Event()

    def brought(self: Any, part: Any, *arguments: Any) -> None:
        bring(self, part, *arguments)
        if [str(image.name) for image in part] == ["app:1"]:
            first.set()

    def full(self: Any, received: Any, digest: Any, advance: Any) -> None:
        if digest not in FIRST.blobs and first.wait(60):
            raise StorageError("no space left")
        receive(self, received, digest, advance)

    with monkeypatch.context() as patch:
        patch.setattr(adopt._Adopter, "_adopt_part", brought)
        patch.setattr(adopt._Adopter, "_receive", full)
        with pytest.raises(StorageError, match="no space"):
            cache.adopt(old)
    assert cache.is_image_complete("app:1")
    assert files_of(cache.directory) == stored_rows(cache.directory)
    assert cache.adopt(old).left_out == []


def test_progress_comes_to_the_bytes_of_all_blobs(cache: Cache, old: Path) -> None:
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

    def meet(self: Any, received: Any, digest: Any, advance: Any) -> None:
        if digest == shared:
            both.wait()
        receive(self, received, digest, advance)

    monkeypatch.setattr(adopt._Adopter, "_receive", meet)
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
def test_whatever_is_damaged_what_is_good_comes(tmp_path: Path, data: st.DataObject) -> None:
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
                    assert blob.stored == (blob_of(old, image.blobs[blob.digest]) not in bad)
    check(place / "cache")


# The command line


def test_the_command_line_tells_what_was_left_out_and_says_so_by_its_exit_code(cachedb: Run, old: Path) -> None:
    done = cachedb("adopt", old)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "images: 3; new blobs: 10, 16.4 kB\n"
    again = cachedb("adopt", old, "--format", "json")
    found = json.loads(again.stdout)
    assert again.returncode == 0
    assert list(found) == ["images", "blobs", "bytes", "unused", "index_damage", "left_out"]
    assert found["images"] == json.loads(cachedb("ls", "--format", "json").stdout)
    assert cachedb("adopt", "-q", old).stdout.split() == NAMES

    blob_of(old, b"x").write_bytes(b"y")
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
    assert item["path"] == str(blob_of(old, b"x"))
    assert (item["kind"], item["name"], item["digest"]) == ("corrupt", None, make.digest_of(b"x"))


def test_ways_exclude_each_other(cachedb: Run, old: Path) -> None:
    assert cachedb("adopt", "--link", "--move", old).returncode == 2
    assert cachedb("adopt", old / "nowhere").returncode == 1


def test_a_real_image_comes_through_whole(
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
