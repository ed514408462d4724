"""The operations of `Cache`, called through the library."""

from __future__ import annotations

import io
import json
import pickle
import sqlite3
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from cachedb import (
    Cache,
    CacheError,
    Collected,
    Digest,
    DigestMismatch,
    IncompleteImage,
    InvalidArchive,
    InvalidDigest,
    InvalidManifest,
    InvalidName,
    Name,
    NotACache,
    NotInCache,
)
from cachedb.disk import reader
from cachedb.oci.manifests import OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from tests.conftest import files_of, snapshot, stored_rows
from tests.support import make
from tests.support.make import save


def test_an_image_is_saved_and_read_back(cache: Cache) -> None:
    made = make.image(1, 2, compression="gzip")
    save(cache, "team/app:1", made)
    (image,) = cache.list_manifests()
    assert str(image.name) == "team/app:1"
    assert (image.repository, image.reference, image.digest) == ("team/app", "1", made.digest)
    assert (image.media_type, image.complete) == (OCI_MANIFEST, True)
    assert image.size == sum(len(data) for data in made.blobs.values())
    assert cache.get_manifest("team/app:1") == made.manifest
    found = cache.get_image_blobs("team/app:1")
    assert [blob.role for blob in found] == ["manifest", "config", "layer", "layer"]
    assert [blob.position for blob in found] == [0, 1, 2, 3]
    assert [blob.compressed for blob in found] == [False, False, True, True]
    assert [blob.is_config for blob in found] == [False, True, False, False]
    for blob in found:
        assert blob.stored
        assert blob.path is not None
        assert blob.path.read_bytes() == cache.get_blob(blob.digest) == made.blobs[blob.digest]
        assert blob.size == len(made.blobs[blob.digest]) == cache.get_blob_size(blob.digest)


def test_a_manifest_associates_blobs_that_are_not_stored_yet(cache: Cache) -> None:
    made = make.image(1)
    assert not cache.save_manifest("app", made.manifest).complete
    assert not cache.is_image_complete("app")
    missing = [blob for blob in cache.get_image_blobs("app") if not blob.stored]
    assert [blob.role for blob in missing] == ["config", "layer"]
    assert all(blob.path is None for blob in missing)
    assert not cache.has_blob(missing[0].digest)
    for digest, data in made.blobs.items():
        cache.save_blob(digest, data)
    assert cache.is_image_complete("app")


def test_saving_a_name_again_moves_it_and_frees_the_old_image(cache: Cache, directory: Path) -> None:
    old, new = make.image(1, 2), make.image(2, 3)
    save(cache, "app:1", old)
    before = cache.get_image("app:1")
    save(cache, "app:1", new)
    after = cache.get_image("app:1")
    assert (after.digest, len(cache.list_manifests())) == (new.digest, 1)
    assert after.added_at > before.added_at
    gone = {digest: len(data) for digest, data in old.blobs.items() if digest not in new.blobs}
    assert cache.collect_garbage() == Collected(len(gone), sum(gone.values()))
    assert files_of(directory) == stored_rows(directory) == {d: len(data) for d, data in new.blobs.items()}


def test_saving_the_same_manifest_again_changes_only_the_time_of_use(cache: Cache) -> None:
    made = make.image(1)
    save(cache, "app:1", made)
    before = cache.get_image("app:1")
    save(cache, "app:1", made)
    assert cache.get_image("app:1")._replace(last_used_at=before.last_used_at) == before


def test_a_shared_blob_stays_until_its_last_image_is_removed(cache: Cache, directory: Path) -> None:
    one, two = make.image(1, 2), make.image(1, 3)
    save(cache, "one", one)
    save(cache, "two", two)
    assert len(files_of(directory)) == len({**one.blobs, **two.blobs}) == 7
    own = {digest: len(data) for digest, data in one.blobs.items() if digest not in two.blobs}
    assert cache.remove_manifest("one", dry_run=True) == Collected(len(own), sum(own.values()))
    assert cache.remove_manifest("one") == Collected(len(own), sum(own.values()))
    assert files_of(directory) == stored_rows(directory) == {d: len(data) for d, data in two.blobs.items()}
    cache.remove_manifest("two")
    assert files_of(directory) == stored_rows(directory) == {}
    assert cache.get_stats().total_size == 0


def test_a_dry_run_for_several_images_counts_the_blobs_that_only_they_use(cache: Cache, directory: Path) -> None:
    one, two = make.image(1, 2), make.image(1, 3)
    save(cache, "one", one)
    save(cache, "two", two)
    before = snapshot(directory)
    both = {**one.blobs, **two.blobs}
    assert cache.remove_manifest("one", "two", dry_run=True) == Collected(7, sum(map(len, both.values())))
    assert snapshot(directory) == before


def test_removing_several_images_removes_all_or_none(cache: Cache) -> None:
    save(cache, "one", make.image(1))
    with pytest.raises(NotInCache, match="nope:latest"):
        cache.remove_manifest("one", "nope")
    assert cache.is_image_complete("one")


def test_a_tag_is_a_second_name_for_the_same_image(cache: Cache) -> None:
    save(cache, "app:1", make.image(1))
    save(cache, "app:stable", make.image(2))
    image = cache.tag("app:1", "app:stable")
    assert image.digest == cache.get_image("app:1").digest
    assert [b.digest for b in cache.get_image_blobs("app:stable")] == [b.digest for b in cache.get_image_blobs("app:1")]
    cache.remove_manifest("app:1")
    assert cache.is_image_complete("app:stable")
    assert cache.tag("app:stable", "app:stable").complete
    with pytest.raises(NotInCache):
        cache.tag("nope", "other")


def test_a_name_with_a_digest_must_match_the_manifest_and_finds_a_tagged_image(cache: Cache) -> None:
    made = make.image(1)
    save(cache, "app:1", made)
    assert cache.get_image(f"app@{made.digest}").reference == "1"
    with pytest.raises(NotInCache):
        cache.get_image(f"other@{made.digest}")
    with pytest.raises(NotInCache):
        cache.remove_manifest(f"app@{made.digest}")
    assert cache.save_manifest(f"app@{made.digest}", made.manifest).reference == made.digest
    sha512 = make.digest_of(made.manifest, "sha512")
    assert cache.save_manifest(f"app@{sha512}", made.manifest).digest == sha512
    with pytest.raises(InvalidName):
        cache.save_manifest("app@sha256:" + "0" * 64, made.manifest)
    with pytest.raises(InvalidName):
        cache.tag("app:1", "app@sha256:" + "0" * 64)


def test_an_index_is_associated_with_its_childrens_blobs_even_if_they_come_later(cache: Cache) -> None:
    one, two = make.image(1, 2), make.image(1, 3, architecture="arm64")
    save(cache, "one", one)
    index = make.index(one, two)
    image = cache.save_manifest("multi", index)
    assert (image.media_type, image.complete) == (OCI_INDEX, False)
    assert [b.role for b in cache.get_image_blobs("multi")] == [
        "index", "manifest", "config", "layer", "layer", "manifest",
    ]  # fmt: skip
    for digest, data in two.blobs.items():
        assert not cache.is_image_complete("multi")
        cache.save_blob(digest, data)
    assert cache.is_image_complete("multi")
    roles = [b.role for b in cache.get_image_blobs("multi")]
    assert roles == ["index", *["manifest", "config", "layer", "layer"] * 2]
    closure = {make.digest_of(index): index, **one.blobs, **two.blobs}
    assert cache.get_image("multi").size == sum(map(len, closure.values()))
    cache.remove_manifest("one")
    assert cache.is_image_complete("multi")


def test_a_layer_at_two_positions_counts_once(cache: Cache) -> None:
    made = make.image(1, 1)
    save(cache, "app", made)
    blobs = cache.get_image_blobs("app")
    assert [blob.role for blob in blobs] == ["manifest", "config", "layer", "layer"]
    assert blobs[2].digest == blobs[3].digest
    assert cache.get_image("app").size == sum(map(len, made.blobs.values()))


def test_an_attached_blob_lives_as_long_as_its_image(cache: Cache) -> None:
    made = make.image(1)
    save(cache, "app", made)
    digest = cache.add_blob(b'{"spdxVersion": "SPDX-2.3"}')
    cache.associate_blob_with_image("app", digest, role="other", media_type="application/spdx+json")
    cache.associate_blob_with_image("app", digest)
    attached = cache.get_image_blobs("app")[-1]
    assert (attached.digest, attached.role, attached.media_type) == (digest, "other", "application/spdx+json")
    assert cache.collect_garbage() == Collected(0, 0)
    save(cache, "app", made)
    assert cache.get_image_blobs("app")[-1].digest == digest
    cache.remove_manifest("app")
    assert not cache.has_blob(digest)


def test_attaching_needs_an_image_a_stored_blob_and_a_valid_role_and_media_type(cache: Cache) -> None:
    made = make.image(1)
    cache.save_manifest("app", made.manifest)
    digest = cache.add_blob(b"x")
    with pytest.raises(NotInCache):
        cache.associate_blob_with_image("nope", digest)
    with pytest.raises(NotInCache):
        cache.associate_blob_with_image("app", make.digest_of(made.config))
    with pytest.raises(InvalidManifest):
        cache.associate_blob_with_image("app", digest, role="leyer")  # type: ignore[arg-type]
    with pytest.raises(InvalidManifest):
        cache.associate_blob_with_image("app", digest, media_type="no type")


@pytest.mark.parametrize("kind", ["bytes", "file", "reader", "path"])
def test_a_blob_is_added_from_bytes_a_file_or_a_path(cache: Cache, tmp_path: Path, kind: str) -> None:
    data = make.random_bytes(3_000_000, 1)
    path = tmp_path / "data"
    path.write_bytes(data)

    class Reader:
        def __init__(self) -> None:
            self.read = io.BytesIO(data).read

    source = {"bytes": data, "file": io.BytesIO(data), "reader": Reader(), "path": path}[kind]
    assert cache.add_blob(source) == make.digest_of(data)  # type: ignore[arg-type]
    assert cache.get_blob(make.hex_of(data)) == data
    with cache.open_blob(make.hex_of(data)) as file:
        assert file.read() == data
    assert cache.get_blob_path(make.hex_of(data)).read_bytes() == data


def test_sha512_is_stored_beside_sha256(cache: Cache, directory: Path) -> None:
    digest = cache.add_blob(b"content", algorithm="sha512")
    assert digest == make.digest_of(b"content", "sha512")
    assert cache.save_blob(digest, b"content") == digest
    assert cache.get_blob_path(digest) == directory / "blobs" / "sha512" / digest.partition(":")[2]
    with pytest.raises(CacheError, match="md5"):
        cache.add_blob(b"content", algorithm="md5")  # type: ignore[arg-type]


def test_content_is_verified_even_if_the_blob_is_stored_already(cache: Cache, directory: Path) -> None:
    good = cache.add_blob(b"good")
    with pytest.raises(DigestMismatch):
        cache.save_blob(good, b"bad!")
    with pytest.raises(DigestMismatch):
        cache.save_blob("sha256:" + "0" * 64, b"bad!")
    assert files_of(directory) == {good: 4}
    cache.close()
    with Cache.open(directory) as again:
        assert again.collect_garbage() == Collected(1, 4)


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../../etc", "md5:" + "0" * 32, "A" * 64, "0" * 63 + "\n"])
def test_every_method_refuses_an_invalid_digest(cache: Cache, digest: str) -> None:
    for method in (cache.has_blob, cache.get_blob, cache.open_blob, cache.get_blob_path, cache.get_blob_size):
        with pytest.raises(InvalidDigest):
            method(digest)
    with pytest.raises(InvalidDigest):
        cache.save_blob(digest, b"")


def test_an_absent_image_or_blob_raises_not_in_cache(cache: Cache) -> None:
    absent = "sha256:" + "0" * 64
    assert not cache.has_blob(absent)
    for method in (cache.get_blob, cache.open_blob, cache.get_blob_path, cache.get_blob_size):
        with pytest.raises(NotInCache):
            method(absent)
    for lookup in (cache.get_manifest, cache.get_image, cache.get_image_blobs, cache.remove_manifest):
        with pytest.raises(NotInCache):
            lookup("nope")
    assert not cache.is_image_complete("nope")
    with pytest.raises(NotInCache):
        cache.export("nope", io.BytesIO())
    with pytest.raises(NotInCache), cache.hold("nope"):
        pass
    with pytest.raises(NotInCache), cache.hold(absent):
        pass


def test_the_error_for_an_absent_short_name_suggests_the_long_one(cache: Cache) -> None:
    save(cache, "docker.io/library/app:1", make.image(1))
    with pytest.raises(NotInCache, match=r"^app:1 is not in the cache: did you mean docker.io/library/app:1\?$"):
        cache.get_image("app:1")


def test_an_image_of_one_platform_is_exported_only_for_that_platform(cache: Cache, tmp_path: Path) -> None:
    save(cache, "app", make.image(1, architecture="arm64"))
    for platform in ("linux/arm64", "linux/arm64/v8"):
        cache.export("app", tmp_path / "out.tar", platform=platform)
    for platform in ("linux/amd64", "linux/arm", "windows/arm64", "x\ny"):
        with pytest.raises(NotInCache, match="linux/arm64") as caught:
            cache.export("app", tmp_path / "out.tar", platform=platform)
        assert "\n" not in str(caught.value)


def test_held_blobs_outlive_their_image_until_the_block_ends(cache: Cache, directory: Path) -> None:
    made = make.image(1)
    save(cache, "app", made)
    extra = cache.add_blob(b"extra")
    with Cache.open(directory) as other:
        with cache.hold("app", extra):
            assert other.remove_manifest("app") == Collected(0, 0)
            other.collect_garbage()
            assert all(cache.get_blob(digest) == data for digest, data in made.blobs.items())
        assert other.collect_garbage().blobs == len(made.blobs)
    assert cache.has_blob(extra), "the session that added it must keep it"


def test_an_open_stream_outlives_its_blob(cache: Cache, directory: Path) -> None:
    save(cache, "app", make.image(1))
    config = next(blob for blob in cache.get_image_blobs("app") if blob.is_config)
    with cache.open_blob(config.digest) as file:
        cache.remove_manifest("app")
        assert files_of(directory) == {}
        assert json.loads(file.read())["architecture"] == "amd64"


def test_an_added_blob_is_kept_until_the_cache_is_closed(directory: Path) -> None:
    with Cache.open(directory) as cache, Cache.open(directory) as other:
        digest = cache.add_blob(b"waiting for its image")
        assert other.collect_garbage() == Collected(0, 0)
        assert cache.has_blob(digest)
    with Cache.open(directory) as again:
        assert again.collect_garbage() == Collected(1, 21)


def test_a_missing_blob_of_an_image_needs_no_lease_once_it_is_stored(cache: Cache, directory: Path) -> None:
    made = make.image(1)
    cache.save_manifest("app", made.manifest)
    cache.save_blob(make.digest_of(made.config), made.config)
    cache.add_blob(made.layers[0])
    assert cache.is_image_complete("app")
    cache.remove_manifest("app")
    assert files_of(directory) == {}, "no lease of this session may keep it"


def test_an_import_replaces_missing_and_truncated_files(cache: Cache, tmp_path: Path) -> None:
    made = make.image(1)
    archive = make.write(tmp_path / "a.tar", make.oci_files({"app": made}))
    cache.cache_from_tar(archive)
    config, layer = (cache.get_blob_path(make.digest_of(data)) for data in (made.config, made.layers[0]))
    config.unlink()
    layer.chmod(0o644)
    layer.write_bytes(b"cut")
    cache.cache_from_tar(archive)
    assert (config.read_bytes(), layer.read_bytes()) == (made.config, made.layers[0])


def test_an_interrupted_import_leaves_a_record_for_the_next_open_to_clean_up(directory: Path, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "a.tar", make.oci_files({"app": make.image(1)}))
    with pytest.MonkeyPatch.context() as patch, Cache.open(directory) as cache:

        def interrupt(*_arguments: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("cachedb.operations.import_archive.save_image", interrupt)
        patch.setattr("cachedb.content.publish.retract", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.cache_from_tar(archive)
    Cache.open(directory).close()
    assert files_of(directory) == stored_rows(directory) == {}


def test_the_next_open_cleans_up_after_a_killed_removal(directory: Path) -> None:
    with Cache.open(directory) as cache:
        save(cache, "app", make.image(1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cachedb.content.collect.empty_trash", lambda _database: [])
            cache.remove_manifest("app")
        assert len(files_of(directory)) == 3
    Cache.open(directory).close()
    assert files_of(directory) == {}


def test_a_manifest_whose_name_moves_while_it_is_read_is_the_new_one(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make.image(1), make.image(2)
    save(cache, "app", old)
    opened = reader.open_blob

    def move_and_open(directory: Path, digest: Digest) -> BinaryIO:
        if digest == old.digest and cache.get_image("app").digest == old.digest:
            save(cache, "app", new)
            cache.collect_garbage()
        return opened(directory, digest)

    monkeypatch.setattr("cachedb.disk.reader.open_blob", move_and_open)
    assert cache.get_manifest("app") == new.manifest


def test_a_damaged_manifest_is_not_returned(cache: Cache) -> None:
    made = make.image(1)
    save(cache, "app:1", made)
    path = cache.get_blob_path(make.digest_of(made.manifest))
    path.chmod(0o644)
    path.write_bytes(made.manifest.replace(b"schemaVersion", b"SchemaVersion"))
    with pytest.raises(DigestMismatch, match="is damaged"):
        cache.get_manifest("app:1")


def test_a_late_child_that_is_not_a_manifest_does_not_hide_its_siblings(cache: Cache) -> None:
    good, bad = make.image(1), make.ImageContent(b"no manifest", b"", [])
    cache.save_manifest("multi", make.index(bad, good))
    cache.add_blob(bad.manifest)
    cache.add_blob(good.manifest)
    assert [blob.role for blob in cache.get_image_blobs("multi")] == [
        "index", "manifest", "manifest", "config", "layer",
    ]  # fmt: skip


def test_an_empty_directory_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotACache):
        Cache.open("")
    assert list(tmp_path.iterdir()) == []


def test_a_blob_stored_twice_for_two_images_keeps_its_lease_for_the_second(cache: Cache, directory: Path) -> None:
    one, two = make.image(1, 5), make.image(1, 6)
    for made in (one, two):
        for digest, data in made.blobs.items():
            cache.save_blob(digest, data)
    cache.save_manifest("one", one.manifest)
    with Cache.open(directory) as other:
        other.remove_manifest("one")
        other.collect_garbage()
    assert cache.save_manifest("two", two.manifest).complete


@pytest.mark.slow
def test_many_threads_share_one_cache(cache: Cache, directory: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            save(cache, f"app:{number}", make.image(0, number % 4))
            assert cache.is_image_complete(f"app:{number}")
            if number % 2:
                cache.remove_manifest(f"app:{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    cache.collect_garbage()
    assert len(cache.list_manifests()) == 10
    assert all(image.complete for image in cache.list_manifests())
    assert files_of(directory) == stored_rows(directory)


def test_stats_count_images_blobs_bytes_and_reclaimable_blobs(cache: Cache, directory: Path) -> None:
    one, two = make.image(1, 2), make.image(2, 3)
    save(cache, "one", one)
    save(cache, "two", two)
    cache.save_manifest("part", make.image(4).manifest)
    cache.tag("two", "one")
    stats = cache.get_stats()
    assert (stats.manifest_count, stats.incomplete_count) == (3, 1)
    assert stats.reclaimable_blobs > 0
    assert cache.list_names() == [image.name for image in cache.list_manifests()]
    assert stats.blob_count == len(files_of(directory))
    assert stats.total_size == sum(files_of(directory).values())
    dry = cache.collect_garbage(dry_run=True)
    assert dry == Collected(stats.reclaimable_blobs, stats.reclaimable_size)
    assert dry.blobs == 3, "manifest, config and first layer of the first image"
    assert cache.collect_garbage() == dry


def test_a_manifest_with_a_wrong_size_of_a_stored_blob_is_refused(cache: Cache, directory: Path) -> None:
    made = make.image(1)
    save(cache, "app", made)
    wrong = json.loads(made.manifest)
    wrong["layers"][0]["size"] += 1
    before = snapshot(directory)
    with pytest.raises(InvalidManifest, match=r"the manifest declares \d+ bytes for sha256:\w+, but the blob has \d+$"):
        cache.save_manifest("wrong", json.dumps(wrong).encode())
    after = snapshot(directory)
    assert after == before


def test_a_wrong_size_in_a_manifest_does_not_keep_the_true_blob_out(cache: Cache) -> None:
    made = make.image(1)
    wrong = json.loads(made.manifest)
    wrong["layers"][0]["size"] += 1
    cache.save_manifest("wrong", json.dumps(wrong).encode())
    save(cache, "app", made)
    assert cache.is_image_complete("app")


@pytest.mark.parametrize(
    "manifest",
    [b"", b"null", b"[]", b"{}", b"{", b'{"schemaVersion": 1}', b"[" * 100_000, b'{"schemaVersion": 2, "config": {}}'],
)
def test_an_invalid_manifest_is_not_saved(cache: Cache, directory: Path, manifest: bytes) -> None:
    with pytest.raises(InvalidManifest) as caught:
        cache.save_manifest("app", manifest)
    assert "\n" not in str(caught.value)
    assert cache.list_manifests() == []
    assert files_of(directory) == {}


def test_a_manifest_is_not_saved_with_another_media_type(cache: Cache) -> None:
    made = make.image(1)
    with pytest.raises(InvalidManifest):
        cache.save_manifest("app", made.manifest, OCI_INDEX)
    with pytest.raises(InvalidManifest):
        cache.save_manifest("app", made.manifest, OCI_LAYER)


def test_an_import_returns_all_images_of_the_archive(cache: Cache, tmp_path: Path) -> None:
    images = {"app:1": make.image(1, 2), "app:2": make.image(1, 3)}
    found = cache.cache_from_tar(make.write(tmp_path / "a.tar", make.docker_files(images)))
    assert [str(image.name) for image in found] == ["app:1", "app:2"]
    assert found == cache.list_manifests()
    assert all(image.complete for image in found)


def test_an_import_reports_its_progress_to_the_last_byte(cache: Cache, tmp_path: Path) -> None:
    made = make.image(1, 2, size=3_000_000)
    calls: list[tuple[int, int]] = []
    source = make.write(tmp_path / "a.tar", make.oci_files({"app:1": made}))
    cache.cache_from_tar(source, progress=lambda done, total: calls.append((done, total)))
    size = sum(map(len, made.blobs.values()))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (size, size)
    calls.clear()
    cache.export("app:1", tmp_path / "b.tar", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (size, size)


def test_a_name_can_be_given_to_an_archive_of_one_image_only(cache: Cache, tmp_path: Path, directory: Path) -> None:
    one = make.write(tmp_path / "one.tar", make.docker_files({"app:1": make.image(1)}))
    two = make.write(tmp_path / "two.tar", make.docker_files({"app:1": make.image(1), "app:2": make.image(2)}))
    nameless = make.write(tmp_path / "nameless.tar", make.docker_files({"": make.image(1)}))
    before = snapshot(directory)
    with pytest.raises(InvalidArchive, match="2 images"):
        cache.cache_from_tar(two, "mine")
    with pytest.raises(InvalidArchive, match="cachedb import SOURCE NAME"):
        cache.cache_from_tar(nameless)
    with pytest.raises(InvalidName):
        cache.cache_from_tar(one, "No Name")
    cache.close()
    assert snapshot(directory) == before
    with Cache.open(directory) as again:
        assert [str(image.name) for image in again.cache_from_tar(one, Name("mine", "3"))] == ["mine:3"]
        assert [str(image.name) for image in again.cache_from_tar(nameless, "other")] == ["other:latest"]


def test_an_incomplete_image_is_not_exported(cache: Cache, tmp_path: Path) -> None:
    made = make.image(1)
    cache.save_manifest("app", made.manifest)
    with pytest.raises(IncompleteImage, match=make.digest_of(made.config)):
        cache.export("app", tmp_path / "out.tar")
    assert list(tmp_path.glob("*.tar*")) == []


def test_invalid_export_options_are_refused(cache: Cache, tmp_path: Path) -> None:
    save(cache, "app", make.image(1))
    for options in ({"format": "zip"}, {"link": True}):
        with pytest.raises(CacheError):
            cache.export("app", tmp_path / "out", **options)
    with pytest.raises(CacheError):
        cache.export("app", io.BytesIO(), format="oci-dir")


def test_removing_an_image_scans_no_other_images(cache: Cache, directory: Path) -> None:
    save(cache, "app", make.image(1))
    connection = sqlite3.connect(directory / "index.db")
    plan = connection.execute(
        "EXPLAIN QUERY PLAN DELETE FROM blobs WHERE NOT EXISTS (SELECT 1 FROM image_blobs WHERE blob_id = blobs.id)"
        " AND NOT EXISTS (SELECT 1 FROM leases WHERE leases.digest = blobs.digest) AND blobs.id IN (1, 2)"
    ).fetchall()
    connection.close()
    assert not [row for row in plan if row[3].startswith("SCAN")]


def test_add_blob_refuses_a_str(cache: Cache) -> None:
    with pytest.raises(TypeError, match="data is a str: give bytes, or a Path to a file"):
        cache.add_blob("hello")  # type: ignore[arg-type]


def test_not_in_cache_has_the_name_of_the_absent_image_or_blob(cache: Cache) -> None:
    with pytest.raises(NotInCache) as missing:
        cache.get_image("none:1")
    assert missing.value.name == "none:1"
    with pytest.raises(NotInCache) as gone:
        cache.get_blob_size(make.digest_of(b"gone"))
    assert gone.value.name == make.digest_of(b"gone")
    assert pickle.loads(pickle.dumps(missing.value)).name == "none:1"


def test_the_repr_of_a_cache_has_its_directory_and_whether_it_is_closed(directory: Path) -> None:
    with Cache.open(directory) as opened:
        assert repr(opened) == f"<Cache {str(directory)!r}>"
    assert repr(opened) == f"<Cache {str(directory)!r}, closed>"
