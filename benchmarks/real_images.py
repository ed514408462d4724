"""Make images to measure with, from the machine's files and random bytes, in every format."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from benchmarks.measure import delete_paths, print_note, run, run_in_child
from cachedb.transports.archive.formats import Format

NAME = "benchmarks.example.org/real:1"
TAG = "1"  # its name in a layout, because peers accept only tags there


class RealImage(NamedTuple):
    """One image in three formats."""

    docker_archive: Path  # with uncompressed layers
    oci_archive: Path  # written by skopeo with compressed layers; without skopeo, written by cachedb
    layout: Path


def prepare_image(place: Path, size: int, archive: Path | None = None) -> RealImage:
    """Make an image of ``size`` bytes in four layers, or convert the image of an archive."""
    image = RealImage(place / "docker.tar", place / "oci.tar", place / "layout")
    if archive:
        print_note(f"preparing the image of {archive}")
        run_in_child(_convert, archive, {"docker-archive": image.docker_archive}, place / "converting")
    else:
        print_note(f"preparing a docker-archive of {size / 1e6:.0f} MB")
        write_docker_archive(image.docker_archive, NAME, [size // 4] * 4)
    if shutil.which("skopeo"):
        print_note("making its other formats with skopeo")
        copy = ["skopeo", "--insecure-policy", "copy", "-q"]
        run(*copy, f"docker-archive:{image.docker_archive}", f"oci:{image.layout}:{TAG}")
        run(*copy, f"oci:{image.layout}:{TAG}", f"oci-archive:{image.oci_archive}:{TAG}")
    else:
        print_note("making its other formats with cachedb")
        forms = {"oci-archive": image.oci_archive, "oci-dir": image.layout}
        run_in_child(_convert, image.docker_archive, forms, place / "converting")  # type: ignore[arg-type]
    return image


def _convert(archive: Path, forms: dict[Format, Path], place: Path) -> None:
    from cachedb import Cache

    with Cache.open(place) as cache:
        cache.cache_from_tar(archive, NAME)
        for form, path in forms.items():
            cache.export(NAME, path, format=form)
    delete_paths(place)


def write_docker_archive(path: Path, name: str, sizes: list[int], *, seed: int = 0) -> None:
    """Write a docker-archive with layers of about these sizes in bytes.

    The last layer has random bytes, the others have files from /usr. Another seed gives other content.
    """
    found = _files_of_usr(skipped=seed * 500)
    layers = []
    with tarfile.open(path, "w") as tar:
        for number, size in enumerate(sizes):
            layer = path.with_name(f"{path.name}.layer")
            with layer.open("wb") as file:
                _write_layer(file, found if number < len(sizes) - 1 else iter(()), size, seed * 100 + number)
            with layer.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            tar.add(layer, f"{digest}/layer.tar")
            layer.unlink()
            layers.append(digest)
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in layers]},
            "history": [{"created_by": f"layer {number}"} for number in range(len(layers))],
        }
        config_name = _add(tar, json.dumps(config).encode())
        manifest = [{"Config": config_name, "RepoTags": [name], "Layers": [f"{one}/layer.tar" for one in layers]}]
        _add(tar, json.dumps(manifest).encode(), "manifest.json")


def _add(tar: tarfile.TarFile, data: bytes, name: str = "") -> str:
    info = tarfile.TarInfo(name or f"{hashlib.sha256(data).hexdigest()}.json")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return info.name


def _files_of_usr(skipped: int) -> Iterator[Path]:
    for folder, folders, names in os.walk("/usr"):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
                continue
            if skipped:
                skipped -= 1
            else:
                yield path


def _write_layer(file: IO[bytes], found: Iterator[Path], size: int, seed: int) -> None:
    """Write a tar of ``size`` bytes from files; add random bytes if there are too few files."""
    chosen = random.Random(seed)
    with tarfile.open(fileobj=file, mode="w") as tar:
        for path in found:
            if tar.offset >= size:
                return
            if path.stat().st_size < size:
                tar.add(path, str(path).lstrip("/"), recursive=False)
        number = 0
        while (rest := size - tar.offset) > 0:
            _add(tar, chosen.randbytes(min(rest, 2**24)), f"random-{number}")
            number += 1
