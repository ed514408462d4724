"""Archives of `docker save`, rebuilt, because CI has no Docker Engine; other tools read the same from them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from cachedb import Cache
from cachedb.oci.manifests import OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from tests.peers.test_archives import Tools, inspect_digest, list_parts
from tests.support import make
from tests.support.make import ImageContent, descriptor, digest_of, hex_of

BASE, APP = make.image(1), make.image(1, 2)  # the engine's own store has uncompressed layers
AMD = make.image(1, 2, compression="gzip")
ARM = make.image(1, 3, compression="gzip", architecture="arm64")
ATTESTED_AMD, ATTESTED_ARM = (
    make.artifact("", config_type="application/vnd.oci.image.config.v1+json", content=content)
    for content in (b"the provenance of amd64", b"the provenance of arm64")
)


def list_digests(cache: Cache, name: str) -> set[str]:
    return {blob.digest for blob in cache.get_image_blobs(name)}


def as_json(document: object) -> bytes:
    return json.dumps(document).encode()


def write_archive(path: Path, files: dict[str, bytes | str]) -> Path:
    """Write a tar with its folders, as the engine does; a text instead of bytes is the target of a symbolic link."""
    with tarfile.open(path, "w") as tar:
        folders = {str(folder) for name in files for folder in Path(name).parents} - {"."}
        for name in sorted([*folders, *files]):
            member = tarfile.TarInfo(name)
            content = files.get(name, b"")
            if name in folders:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(content, str):
                member.type, member.linkname, content = tarfile.SYMTYPE, content, b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode() if isinstance(content, str) else content))
    return path


def save_24(path: Path, images: dict[str, ImageContent]) -> Path:
    """Write what `docker save` of Docker Engine 24 writes: a folder for each layer, and no manifests of OCI.

    A layer that another image has at another place is a link to that image's file.
    """
    files: dict[str, bytes | str] = {}
    entries, repositories = [], dict[str, dict[str, str]]()
    paths: dict[bytes, str] = {}
    for name, made in images.items():
        listed = []
        for number, layer in enumerate(made.layers):
            folder = hex_of(f"{name} {number}".encode())
            listed.append(f"{folder}/layer.tar")
            files[f"{folder}/VERSION"] = b"1.0"
            files[f"{folder}/json"] = as_json({"id": folder, "os": "linux"})
            files[listed[-1]] = f"../{paths[layer]}" if layer in paths else layer
            paths.setdefault(layer, listed[-1])
        files[f"{hex_of(made.config)}.json"] = made.config
        entries.append({"Config": f"{hex_of(made.config)}.json", "RepoTags": [name], "Layers": listed})
        repository, _, tag = name.rpartition(":")
        repositories.setdefault(repository, {})[tag] = Path(listed[-1]).parts[0]
    files |= {"manifest.json": as_json(entries), "repositories": as_json(repositories)}
    return write_archive(path, files)


def save_25(path: Path, name: str, made: ImageContent) -> Path:
    """Write what Docker Engine 25 and later write from their classic store: a layout with both tables."""
    files = list_files(name, descriptor(made.manifest, OCI_MANIFEST), made)
    files["repositories"] = as_json({name.partition(":")[0]: {name.partition(":")[2]: hex_of(made.layers[-1])}})
    sources = {digest_of(data): descriptor(data, OCI_LAYER) for data in made.layers}
    return write_archive(path, files | write_table(name, made, LayerSources=sources))


def save_29(path: Path, name: str) -> tuple[Path, bytes]:
    """Write what Docker Engine 29 writes from containerd's store: the whole index, and the platform that it pulled.

    Returns:
        The path, and the index.
    """
    platforms = [{"os": "linux", "architecture": arch} for arch in ("amd64", "arm64")]
    attested = {"vnd.docker.reference.type": "attestation-manifest"}
    index = as_json(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                descriptor(AMD.manifest, OCI_MANIFEST, platform=platforms[0]),
                descriptor(ARM.manifest, OCI_MANIFEST, platform=platforms[1]),
                *(
                    descriptor(
                        made.manifest,
                        OCI_MANIFEST,
                        annotations=attested | {"vnd.docker.reference.digest": subject.digest},
                        platform={"architecture": "unknown", "os": "unknown"},
                    )
                    for made, subject in ((ATTESTED_AMD, AMD), (ATTESTED_ARM, ARM))
                ),
            ],
        }
    )
    files = list_files(name, descriptor(index, OCI_INDEX), AMD, ATTESTED_AMD)
    files[f"blobs/sha256/{hex_of(index)}"] = index
    return write_archive(path, files | write_table(name, AMD)), index


def list_files(name: str, root: dict[str, Any], *images: ImageContent) -> dict[str, bytes | str]:
    """Return the files of a layout whose index.json lists one image under the names that the engine gives it."""
    root["annotations"] = {"io.containerd.image.name": f"docker.io/library/{name}", make.REF_NAME: name.split(":")[1]}
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [root]}
    return {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": as_json(index),
        **{f"blobs/sha256/{hex_of(data)}": data for made in images for data in made.blobs.values()},
    }


def write_table(name: str, made: ImageContent, **more: object) -> dict[str, bytes | str]:
    """Return manifest.json with one image of a layout."""
    config, *layers = (f"blobs/sha256/{hex_of(data)}" for data in (made.config, *made.layers))
    return {"manifest.json": as_json([{"Config": config, "RepoTags": [name], "Layers": layers, **more}])}


def test_an_archive_of_docker_24_is_imported_with_its_configs_and_layers(
    cache: Cache, tools: Tools, tmp_path: Path
) -> None:
    images = {"app:1": BASE, "app:2": APP}
    archive = save_24(tmp_path / "24.tar", images)
    assert sorted(str(image.name) for image in cache.cache_from_tar(archive)) == [*images]
    for name, made in images.items():
        expected = digest_of(made.config), [*map(digest_of, made.layers)]
        assert list_parts(cache.get_manifest(name)) == expected
        assert list_parts(tools("skopeo", "inspect", "--raw", f"docker-archive:{archive}:{name}")) == expected


def test_an_archive_of_docker_25_is_imported_with_its_digest(cache: Cache, tools: Tools, tmp_path: Path) -> None:
    archive = save_25(tmp_path / "25.tar", "app:1", APP)
    (image,) = cache.cache_from_tar(archive)
    assert (str(image.name), image.digest) == ("app:1", APP.digest)
    assert inspect_digest(tools, f"oci-archive:{archive}") == APP.digest
    cache.export("app:1", tmp_path / "ours.tar")
    for path in (archive, tmp_path / "ours.tar"):
        raw = tools("skopeo", "inspect", "--raw", f"docker-archive:{path}:app:1")
        assert list_parts(raw) == (digest_of(APP.config), [*map(digest_of, APP.layers)])


def test_an_archive_of_docker_29_is_imported_with_the_platform_that_it_has(
    cache: Cache, tools: Tools, tmp_path: Path
) -> None:
    archive, index = save_29(tmp_path / "29.tar", "app:1")
    (image,) = cache.cache_from_tar(archive)
    assert (str(image.name), image.digest, image.complete) == ("app:1", digest_of(index), True)
    assert list_digests(cache, "app:1") == {digest_of(index), *AMD.blobs, *ATTESTED_AMD.blobs}
    platforms = {child.platform: child.complete for child in cache.get_platforms("app:1")}
    assert (platforms["linux/amd64"], platforms["linux/arm64"]) == (True, False)
    assert digest_of(tools("skopeo", "inspect", "--raw", f"oci-archive:{archive}").encode()) == image.digest
    cache.export("app:1", tmp_path / "ours.tar", platform="linux/amd64")
    assert inspect_digest(tools, f"oci-archive:{tmp_path}/ours.tar") == AMD.digest
