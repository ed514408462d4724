"""Build small images and archives for the tests: real formats, a few kB, the same bytes every time."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cachedb.oci.manifests import (
    DOCKER_CONFIG,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
)

if TYPE_CHECKING:
    from cachedb import Cache
    from cachedb.oci.manifests import Role

REF_NAME = "org.opencontainers.image.ref.name"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def hex_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def random_bytes(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def tar_of(files: dict[str, bytes]) -> bytes:
    """Return a tar with these files, in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def layer(seed: int, size: int = 1000) -> bytes:
    """Return an uncompressed layer with one file of random content."""
    return tar_of({f"file-{seed}": random_bytes(size, seed)})


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def zstd_compressed(data: bytes) -> bytes:
    import sys

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.compress(data)


def descriptor(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data), **more}


class ImageContent(NamedTuple):
    """An image: the bytes of its manifest, its config, and its layers as they are stored."""

    manifest: bytes
    config: bytes
    layers: list[bytes]

    @property
    def digest(self) -> str:
        return digest_of(self.manifest)

    @property
    def blobs(self) -> dict[str, bytes]:
        return {digest_of(data): data for data in (self.manifest, self.config, *self.layers)}


def image(*seeds: int, compression: str = "", architecture: str = "amd64", size: int = 1000) -> ImageContent:
    """Return an OCI image with a layer for each seed; the same seed gives the same layer."""
    plain = [layer(seed, size) for seed in seeds]
    compress = {"": lambda data: data, "gzip": gzipped, "zstd": zstd_compressed}[compression]
    layers = [compress(data) for data in plain]
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(data) for data in plain]},
            "history": [{"created": "2026-01-01T00:00:00Z", "created_by": f"layer {seed}"} for seed in seeds],
        }
    ).encode()
    kind = OCI_LAYER + (f"+{compression}" if compression else "")
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(config, OCI_CONFIG),
            "layers": [descriptor(data, kind) for data in layers],
        }
    ).encode()
    return ImageContent(manifest, config, layers)


def full_config(*seeds: int, **more: Any) -> dict[str, Any]:
    """Return a config with all values that the index copies, and a layer for each seed."""
    layers = [digest_of(layer(seed)) for seed in seeds]
    return {
        "architecture": "arm",
        "variant": "v7",
        "os": "linux",
        "created": "2026-02-03T04:05:06.789012345Z",
        "author": "A. Author <a@example.org>",
        "config": {"Labels": {"version": "1", "empty": ""}},
        "rootfs": {"type": "layers", "diff_ids": layers},
        "history": [
            *({"created_by": f"RUN make {seed}"} for seed in seeds),
            {"created_by": "CMD /bin/sh", "empty_layer": True},
        ],
        **more,
    }


def image_of(config: dict[str, Any] | bytes, *seeds: int, kind: str = OCI_CONFIG) -> ImageContent:
    """Return an OCI image with this config and a layer for each seed."""
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    layers = [layer(seed) for seed in seeds]
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(data, kind),
        "layers": [descriptor(one, OCI_LAYER) for one in layers],
    }
    return ImageContent(json.dumps(manifest).encode(), data, layers)


def with_docker_types(made: ImageContent) -> ImageContent:
    """Return an image with Docker's media types (image manifest version 2, schema 2) instead of OCI's."""
    document = json.loads(made.manifest)
    document["mediaType"], document["config"]["mediaType"] = DOCKER_MANIFEST, DOCKER_CONFIG
    for entry in document["layers"]:
        entry["mediaType"] = entry["mediaType"].replace(OCI_LAYER, DOCKER_LAYER).replace("+", ".")
    return made._replace(manifest=json.dumps(document).encode())


def docker_list(index: bytes) -> bytes:
    """Return an index over images with Docker's media types as a manifest list."""
    document = json.loads(index)
    document["mediaType"] = DOCKER_LIST
    for entry in document["manifests"]:
        entry["mediaType"] = DOCKER_MANIFEST
    return json.dumps(document).encode()


def artifact(
    kind: str,
    *,
    config: bytes = b"{}",
    config_type: str = EMPTY_TYPE,
    content: bytes = b"content",
    subject: bytes | None = None,
) -> ImageContent:
    """Return an artifact, such as a Helm chart or a signature.

    Args:
        kind: its ``artifactType``; an empty text leaves the field out.
        config: the bytes of its config.
        config_type: the media type of its config.
        content: its only layer.
        subject: the manifest that it refers to.
    """
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        **({"artifactType": kind} if kind else {}),
        "config": descriptor(config, config_type),
        "layers": [descriptor(content, "application/octet-stream")],
        **({"subject": descriptor(subject, json.loads(subject)["mediaType"])} if subject is not None else {}),
    }
    return ImageContent(json.dumps(document).encode(), config, [content])


def index(*children: ImageContent, platforms: list[dict[str, str]] | None = None) -> bytes:
    """Return an index over images."""
    platforms = platforms or [{"os": "linux", "architecture": arch} for arch in ("amd64", "arm64", "s390x")]
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_INDEX,
            "manifests": [
                descriptor(child.manifest, OCI_MANIFEST, platform=platform)
                for child, platform in zip(children, platforms, strict=False)
            ],
        }
    ).encode()


def docker_files(images: dict[str, ImageContent]) -> dict[str, bytes]:
    """Return the files of a docker-archive by path; an image with an empty name gets no tag."""
    files: dict[str, bytes] = {}
    entries = []
    for name, made in images.items():
        paths = []
        for data in made.layers:
            paths.append(f"{hex_of(data)}/layer.tar")
            files[paths[-1]] = data
        config = f"{hex_of(made.config)}.json"
        files[config] = made.config
        entries.append({"Config": config, "RepoTags": [name] if name else None, "Layers": paths})
    return {**files, "manifest.json": json.dumps(entries).encode()}


def oci_files(images: dict[str, ImageContent], roots: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """Return the files of an OCI image layout by path.

    Args:
        images: by name. Without ``roots``, each gets an entry in index.json; an empty name gives an entry without one.
        roots: indexes by name, which get the entries instead; their children are in ``images``.
    """
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}
    entries = []
    for made in images.values():
        for digest, data in made.blobs.items():
            files[f"blobs/{digest.replace(':', '/')}"] = data
    for name, made in images.items():
        if roots is None:
            annotations = {REF_NAME: name} if name else {}
            entries.append(descriptor(made.manifest, OCI_MANIFEST, annotations=annotations))
    for name, data in (roots or {}).items():
        files[f"blobs/sha256/{hex_of(data)}"] = data
        entries.append(descriptor(data, OCI_INDEX, annotations={REF_NAME: name}))
    files["index.json"] = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    return files


def save(cache: Cache, name: str, image: ImageContent) -> None:
    """Save an image in a cache under a name."""
    for digest, data in image.blobs.items():
        cache.save_blob(digest, data)
    cache.save_manifest(name, image.manifest)


def attach(cache: Cache, name: str, *artifacts: ImageContent) -> None:
    """Save artifacts in a cache and attach them to an image, as `pull --referrers` does."""
    for made in artifacts:
        for digest, data in made.blobs.items():
            cache.save_blob(digest, data)
            role: Role = "manifest" if data == made.manifest else "other"
            media_type = OCI_MANIFEST if role == "manifest" else "application/octet-stream"
            cache.associate_blob_with_image(name, digest, role=role, media_type=media_type)


def save_index(
    cache: Cache, name: str, *children: ImageContent, platforms: list[dict[str, str]] | None = None
) -> bytes:
    """Save images and an index over them in a cache; return the index."""
    for child in children:
        for digest, data in child.blobs.items():
            cache.save_blob(digest, data)
    manifest = index(*children, platforms=platforms)
    cache.save_manifest(name, manifest)
    return manifest


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file and return its path."""
    path.write_bytes(data)
    return path


def write(path: Path, files: dict[str, bytes]) -> Path:
    """Write files as a tar, or as a folder if the path has no suffix; return the path."""
    if path.suffix:
        path.write_bytes(tar_of(files))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def json_cache(path: Path, images: dict[str, ImageContent], *, writer: str = ".cache") -> dict[str, dict[str, Any]]:
    """Write a cache whose index is one ``index.json``, and return that index.

    Args:
        path: its directory.
        images: by ``repository/reference``, as in the keys of the index.
        writer: the directory that the index has in its paths.
    """
    document: dict[str, dict[str, Any]] = {}
    for name, made in images.items():
        repository, _, reference = name.rpartition("/")
        files = {f"blobs/sha256/{hex_of(data)}": data for data in (made.config, *made.layers)}
        write(path, {**files, f"manifests/{name}": made.manifest})
        document[name] = {
            "repository": repository,
            "reference": reference,
            "manifest_path": f"{writer}/manifests/{name}",
            "config_digest": digest_of(made.config),
            "blobs": {digest_of(data): json_blob(data, made, writer) for data in (made.config, *made.layers)},
        }
    write_index(path, document)
    return document


def json_blob(data: bytes, made: ImageContent | None = None, writer: str = ".cache") -> dict[str, Any]:
    """Return a blob's entry in an ``index.json``."""
    return {
        "digest": digest_of(data),
        "size": len(data),
        "path": f"{writer}/blobs/sha256/{hex_of(data)}",
        "is_config": bool(made and data == made.config),
        "compressed": bool(made and data != made.config),
        "media_type": "",
    }


def write_index(path: Path, document: object) -> None:
    (path / "index.json").write_text(json.dumps(document, indent=2))
