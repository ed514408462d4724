"""Test under which names the images of an archive are imported, and which of them."""

from __future__ import annotations

import io
import json

import pytest

from cachedb import Cache
from cachedb.errors import CacheError, DigestMismatch, InvalidArchive, InvalidName, NameInUse
from cachedb.oci.manifests import OCI_MANIFEST, load_json
from cachedb.transports.archive import docker
from tests.support import make
from tests.support.make import digest_of, hex_of, tar_of
from tests.transports.archive.test_layout import import_files, layout_of, named

ONE, TWO = make.image(1), make.image(2)


def two_tags() -> dict[str, bytes]:
    """Return a layout with two bare tags, as umoci and `skopeo copy ... oci:layout:1.0` write it."""
    return make.oci_files({"1.0": ONE, "1.1": TWO})


def docker_29(*, with_second_name: bool = False) -> dict[str, bytes]:
    """Return what `docker save app:1 ID` writes: two images in manifest.json, one of them in index.json."""
    annotations = {"io.containerd.image.name": "docker.io/library/app:1", make.REF_NAME: "1"}
    files = layout_of(
        make.descriptor(ONE.manifest, OCI_MANIFEST, annotations=annotations),
        blobs=[*ONE.blobs.values(), TWO.config, *TWO.layers],
    )
    entries = [
        {
            "Config": f"blobs/sha256/{hex_of(made.config)}",
            "RepoTags": tags,
            "Layers": [f"blobs/sha256/{hex_of(layer)}" for layer in made.layers],
        }
        for made, tags in ((ONE, ["app:1"]), (TWO, ["other:2"] if with_second_name else None))
    ]
    return {**files, "manifest.json": json.dumps(entries).encode()}


# Unnamed images


def test_named_images_are_imported_and_unnamed_ones_reported(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    assert import_files(cache, make.docker_files({"app:1": ONE, "": TWO})) == ["app:1"]
    assert (
        f"not imported, because they have no name: sha256:{hex_of(TWO.config)[:12]}: give --repository" in caplog.text
    )
    caplog.clear()
    assert import_files(cache, make.oci_files({"app:1": ONE, "": TWO})) == ["app:1"]
    assert f"not imported, because they have no name: {TWO.digest[:19]}: give --repository" in caplog.text


@pytest.mark.parametrize("make_files", [make.oci_files, make.docker_files])
def test_unnamed_images_are_named_by_digest_in_a_repository(cache: Cache, make_files: object) -> None:
    assert callable(make_files)
    names = import_files(cache, make_files({"": ONE, "app:1": TWO}), repository="team/app")
    assert sorted(names) == ["app:1", f"team/app@{cache.get_image(names[0]).digest}"]


def test_several_images_without_a_name_are_refused_with_what_to_do(cache: Cache) -> None:
    files = layout_of(
        *(make.descriptor(made.manifest, OCI_MANIFEST) for made in (ONE, TWO)),
        blobs=[*ONE.blobs.values(), *TWO.blobs.values()],
    )
    with pytest.raises(
        InvalidArchive, match=f"2 images in the archive have no name: .*{ONE.digest[:19]}, {TWO.digest[:19]}"
    ):
        import_files(cache, files)


@pytest.mark.parametrize("tag", ["", "<none>:<none>"])
def test_an_empty_repo_tag_is_no_name(cache: Cache, tag: str) -> None:
    files = make.docker_files({"x": ONE})
    entries = json.loads(files["manifest.json"])
    entries[0]["RepoTags"] = [tag]
    files["manifest.json"] = json.dumps(entries).encode()
    with pytest.raises(InvalidArchive, match="the image in the archive has no name"):
        import_files(cache, files)
    assert import_files(cache, files, "app:1") == ["app:1"]


# manifest.json beside index.json


def test_an_image_that_only_manifest_json_lists_is_imported(cache: Cache) -> None:
    assert import_files(cache, docker_29(with_second_name=True)) == ["app:1", "other:2"]
    assert cache.get_image("app:1").digest == ONE.digest
    assert [blob.digest for blob in cache.get_image_blobs("other:2")][1:] == [
        digest_of(TWO.config),
        *map(digest_of, TWO.layers),
    ]


def test_a_config_that_many_entries_name_is_parsed_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make.docker_files({"app:0": ONE})
    (entry,) = json.loads(files["manifest.json"])
    entries = [{**entry, "RepoTags": [f"app:{number}"]} for number in range(100)]
    parsed = list[str]()

    def load(data: bytes, what: str, error: type[CacheError]) -> object:
        parsed.append(what)
        return load_json(data, what, error)

    monkeypatch.setattr(docker, "load_json", load)
    names = import_files(cache, {**files, "manifest.json": json.dumps(entries).encode()})
    assert (len(names), len(parsed)) == (100, 1)


def test_an_unnamed_image_that_only_manifest_json_lists_is_reported(
    cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    assert import_files(cache, docker_29()) == ["app:1"]
    assert f"no name: sha256:{hex_of(TWO.config)[:12]}" in caplog.text
    assert len(import_files(cache, docker_29(), repository="team/app")) == 2


@pytest.mark.parametrize(
    "index", [None, {"schemaVersion": 2, "manifests": None}, {"schemaVersion": 2, "manifests": []}]
)
def test_manifest_json_is_read_if_index_json_is_empty(cache: Cache, index: object) -> None:
    files = {**make.docker_files({"app:1": ONE}), "index.json": json.dumps(index).encode()}
    assert import_files(cache, files) == ["app:1"]


def test_names_of_both_tables_are_imported(cache: Cache) -> None:
    files = docker_29()
    files |= layout_of(
        *(named(ONE.manifest, name) for name in ("docker.io/library/app:1", "registry.example.com/app:2")), blobs=[]
    )
    assert import_files(cache, files) == ["app:1", "registry.example.com/app:2"]


@pytest.mark.parametrize("extra", [[], ["other:1"]])
def test_a_name_that_manifest_json_gives_to_several_images_is_not_lost(cache: Cache, extra: list[str]) -> None:
    second = json.dumps({**json.loads(ONE.manifest), "annotations": {"n": "2"}}).encode()
    entry = {
        "Config": f"blobs/sha256/{hex_of(ONE.config)}",
        "RepoTags": ["app:1", "app:2", *extra],
        "Layers": [f"blobs/sha256/{hex_of(layer)}" for layer in ONE.layers],
    }
    entries = [named(ONE.manifest, "app:1"), named(second, "docker.io/library/app:2")]
    files = layout_of(*entries, blobs=[*ONE.blobs.values(), second]) | {"manifest.json": json.dumps([entry]).encode()}
    if extra:
        with pytest.raises(InvalidArchive, match="the name 'other:1' to several images"):
            import_files(cache, files)
        assert import_files(cache, files, "other:1", select=ONE.digest) == ["other:1"]
    else:
        assert import_files(cache, files) == ["app:1", "app:2"]


def test_an_index_json_beside_a_manifest_in_manifest_json_is_refused(cache: Cache) -> None:
    files = make.oci_files({"app:1": ONE}) | {
        "version": b"Directory Transport Version: 1.1\n",
        "manifest.json": TWO.manifest,
        **{hex_of(data): data for data in (TWO.config, *TWO.layers)},
    }
    with pytest.raises(InvalidArchive, match="is not a list of images"):
        import_files(cache, files, "app:1")


# Tags without a repository


def test_bare_tags_are_put_into_the_repository_given(cache: Cache) -> None:
    assert import_files(cache, two_tags(), repository="team/app") == ["team/app:1.0", "team/app:1.1"]
    assert import_files(cache, make.oci_files({"app:1": ONE}), repository="team/app") == ["app:1"]


def test_a_bare_tag_never_replaces_another_image(cache: Cache) -> None:
    assert import_files(cache, make.oci_files({"latest": ONE})) == ["latest:latest"]
    assert import_files(cache, make.oci_files({"latest": ONE})) == ["latest:latest"]
    with pytest.raises(NameInUse, match="the tag 'latest' without a repository, and latest:latest is another image"):
        import_files(cache, make.oci_files({"latest": TWO}))
    assert cache.get_image("latest:latest").digest == ONE.digest
    assert import_files(cache, make.oci_files({"latest": TWO}), repository="two") == ["two:latest"]


def test_a_bare_tag_beside_a_name_replaces_no_other_image(cache: Cache) -> None:
    import_files(cache, make.oci_files({"latest": ONE}))
    files = layout_of(*(named(TWO.manifest, name) for name in ("app:1", "latest")), blobs=list(TWO.blobs.values()))
    with pytest.raises(NameInUse, match="the tag 'latest' without a repository"):
        import_files(cache, files)
    assert import_files(cache, files, repository="app") == ["app:1", "app:latest"]


def test_bare_tags_may_be_joined_by_commas(cache: Cache) -> None:
    files = make.oci_files({"1.0,1.1": ONE})
    assert import_files(cache, files, repository="team/app") == ["team/app:1.0", "team/app:1.1"]


def test_an_empty_tag_is_no_name(cache: Cache) -> None:
    files = layout_of(named(ONE.manifest, ""), blobs=list(ONE.blobs.values()))
    assert import_files(cache, files, "app:1") == ["app:1"]
    with pytest.raises(InvalidArchive, match="the image in the archive has no name"):
        import_files(cache, files)


@pytest.mark.parametrize("repository", ["", "Team", "app:1", "app@sha256"])
def test_an_invalid_repository_is_refused(cache: Cache, repository: str) -> None:
    with pytest.raises(InvalidName):
        import_files(cache, two_tags(), repository=repository)


def test_a_name_and_a_repository_are_not_both_accepted(cache: Cache) -> None:
    with pytest.raises(CacheError, match="a name and a repository were given: give one of them"):
        import_files(cache, make.oci_files({"1": ONE}), "app:1", repository="app")


# Names of other forms


def test_the_digest_after_a_tag_is_left_out_of_the_name(cache: Cache) -> None:
    assert import_files(cache, make.oci_files({f"docker.io/library/app:1@{ONE.digest}": ONE})) == [
        "docker.io/library/app:1"
    ]


def test_several_names_may_be_joined_by_commas(cache: Cache) -> None:
    assert import_files(cache, make.oci_files({"team/app:1,team/app:2": ONE})) == ["team/app:1", "team/app:2"]


def test_an_invalid_name_beside_a_valid_one_is_reported(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """`regctl image export ocidir://app:1` writes such a name to index.json, and a valid one to manifest.json."""
    entries = [named(ONE.manifest, name) for name in ("ocidir://app:1", "localhost/app:1")]
    assert import_files(cache, layout_of(*entries, blobs=list(ONE.blobs.values()))) == ["localhost/app:1"]
    assert "not imported: a name in the archive is invalid: 'ocidir://app:1' is not a name" in caplog.text


# Selection


@pytest.mark.parametrize(
    "select", ["app:2", "docker.io/library/app:2", TWO.digest, TWO.digest[:19], TWO.digest[7:19], digest_of(TWO.config)]
)
def test_one_image_is_selected_by_name_or_digest(cache: Cache, select: str) -> None:
    files = make.oci_files({"app:1": ONE, "app:2": TWO})
    assert import_files(cache, files, select=select) == ["app:2"]
    assert import_files(cache, files, "other:1", select=select) == ["other:1"]
    assert cache.get_image("other:1").digest == TWO.digest


def test_an_image_is_selected_by_its_tag_if_no_other_has_it(cache: Cache) -> None:
    files = make.oci_files({"app:1": ONE, "app:2": TWO})
    assert import_files(cache, files, select="2") == ["app:2"]
    with pytest.raises(
        InvalidArchive, match="2 names in the archive have the tag '2': select one of 'app:2', 'other:2'"
    ):
        import_files(cache, make.oci_files({"app:2": ONE, "other:2": TWO}), select="2")
    with pytest.raises(InvalidArchive, match="has no image '3'"):
        import_files(cache, files, select="3")


def test_an_image_of_a_docker_archive_is_selected_by_its_id(cache: Cache) -> None:
    files = make.docker_files({"": ONE})
    entries = json.loads(files["manifest.json"]) + json.loads(make.docker_files({"": TWO})["manifest.json"])
    files |= {**make.docker_files({"": TWO}), "manifest.json": json.dumps(entries).encode()}
    assert import_files(cache, files, "app:2", select=hex_of(TWO.config)[:12]) == ["app:2"]
    assert digest_of(TWO.config) in [blob.digest for blob in cache.get_image_blobs("app:2")]


def test_an_image_that_is_selected_by_one_of_its_names_gets_only_this_one(cache: Cache) -> None:
    files = layout_of(*(named(ONE.manifest, name) for name in ("app:1", "app:2")), blobs=list(ONE.blobs.values()))
    assert import_files(cache, files, select="app:2") == ["app:2"]


def test_one_of_several_platform_manifests_can_be_selected(cache: Cache) -> None:
    arm = make.image(3, architecture="arm64")
    files = layout_of(
        *(make.descriptor(made.manifest, OCI_MANIFEST) for made in (ONE, arm)),
        blobs=[*ONE.blobs.values(), *arm.blobs.values()],
    )
    assert import_files(cache, files, "app:1", select=arm.digest) == ["app:1"]
    assert cache.get_image("app:1").digest == arm.digest


def test_a_name_of_several_images_selects_none(cache: Cache) -> None:
    files = layout_of(
        *(named(made.manifest, "app:1") for made in (ONE, TWO, ONE)), blobs=[*ONE.blobs.values(), *TWO.blobs.values()]
    )
    with pytest.raises(InvalidArchive, match=f"2 images .* have the name 'app:1': .* digest: {ONE.digest[:19]}, "):
        import_files(cache, files, select="app:1")
    assert import_files(cache, files, select=TWO.digest) == ["app:1"]
    assert cache.get_image("app:1").digest == TWO.digest


@pytest.mark.parametrize("select", ["app:3", "sha256:" + "0" * 64, TWO.digest[7:18], ""])
def test_a_selection_that_matches_no_image_is_refused(cache: Cache, select: str) -> None:
    with pytest.raises(InvalidArchive, match=f"has no image {select!r}: select one of 'app:1', 'app:2'"):
        import_files(cache, make.oci_files({"app:1": ONE, "app:2": TWO}), select=select)


# Replaced names


def test_a_replaced_name_is_reported_or_refused(cache: Cache) -> None:
    import_files(cache, make.oci_files({"app:1": ONE}))
    with pytest.raises(NameInUse, match="app:1 names another image in the cache"):
        import_files(cache, make.oci_files({"app:1": TWO, "app:2": TWO}), replace=False)
    assert [str(image.name) for image in cache.list_manifests()] == ["app:1"]
    import_files(cache, make.oci_files({"app:1": ONE}), replace=False)
    for replaced in (ONE.digest, None):
        (image,) = cache.cache_from_tar(io.BytesIO(make.tar_of(make.oci_files({"app:1": TWO}))))
        assert image.replaced == replaced


def test_a_digest_in_manifest_json_names_another_manifest(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    """A docker-archive has no manifest, so its image gets another digest."""
    by_digest = "app@sha256:" + "0" * 64
    files = make.docker_files({by_digest: make.image(1)})
    (imported,) = cache.cache_from_tar(io.BytesIO(tar_of(files)))
    assert imported.name == f"app@{imported.digest}"
    assert f"the archive lacks the manifest of {by_digest}" in caplog.text
    (entry,) = json.loads(files["manifest.json"])
    files["manifest.json"] = json.dumps([entry | {"RepoTags": [by_digest, "app:1"]}]).encode()
    assert [image.name for image in cache.cache_from_tar(io.BytesIO(tar_of(files)))] == ["app:1"]


def test_an_image_is_selected_although_others_are_damaged(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    files = make.oci_files({"app:1": ONE, "app:2": TWO})
    files[f"blobs/sha256/{hex_of(TWO.manifest)}"] = b"{}"
    with pytest.raises(DigestMismatch):
        import_files(cache, files)
    assert import_files(cache, files, select="app:1") == ["app:1"]
    assert "not imported: 'app:2': manifest sha256:" in caplog.text
    for select in ("app:2", "2", TWO.digest):
        with pytest.raises(DigestMismatch, match=TWO.digest):
            import_files(cache, files, select=select)


def test_an_image_of_a_docker_archive_is_selected_although_others_are_incomplete(cache: Cache) -> None:
    files = make.docker_files({"app:1": ONE, "app:2": TWO})
    del files[f"{hex_of(TWO.config)}.json"]
    assert import_files(cache, files, select="app:1") == ["app:1"]
    for select in ("app:2", "2"):
        with pytest.raises(InvalidArchive, match="but is not in the archive"):
            import_files(cache, files, select=select)
    with pytest.raises(InvalidArchive, match="but is not in the archive"):
        import_files(cache, files)


def test_a_manifest_in_an_index_is_selected_by_its_digest(cache: Cache) -> None:
    index = make.index(ONE, TWO)
    files = make.oci_files({"one": ONE, "two": TWO}, {"app:1": index})
    assert import_files(cache, files, "two:1", select=TWO.digest) == ["two:1"]
    assert cache.get_image("two:1").digest == TWO.digest
    assert import_files(cache, files, select=TWO.digest[:19], repository="two") == [f"two@{TWO.digest}"]
    with pytest.raises(InvalidArchive, match="has no name"):
        import_files(cache, files, select=TWO.digest)
    with pytest.raises(InvalidArchive, match="has no image"):
        import_files(cache, files, select="sha256:" + "0" * 64)
