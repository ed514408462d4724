"""Unpack the Python in the Go module github.com/kluctl/go-embed-python, which is the one that uv installs.

Usage: python3 .ci/unpack_python.py MODULE FOLDER
"""

from __future__ import annotations

import gzip
import json
import platform
import sys
from pathlib import Path

_IS_FOLDER = 1 << 31  # Go's fs.ModeDir
_SYSTEMS = {"x86_64": "linux-amd64", "aarch64": "linux-arm64"}


def unpack(module: Path, folder: Path) -> None:
    """Write the files of a Python for this kind of machine into a folder."""
    packed = module / "python" / "internal" / "data" / _SYSTEMS[platform.machine()]
    for entry in json.loads((packed / "files.json").read_text())["files"]:
        path, source = folder / entry["name"], packed / entry["name"]
        if entry["perm"] & _IS_FOLDER:
            path.mkdir(parents=True)
        elif target := entry.get("symlink"):
            path.symlink_to(target)
        else:
            zipped = source.with_name(f"{source.name}.gz")
            path.write_bytes(gzip.decompress(zipped.read_bytes()) if zipped.is_file() else source.read_bytes())
            path.chmod(entry["perm"] & 0o777)


unpack(Path(sys.argv[1]), Path(sys.argv[2]))
