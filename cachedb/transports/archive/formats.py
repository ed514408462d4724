"""List the export formats, so that the command line need not import the code that writes them."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["FOLDER_FORMATS", "FORMATS", "MANIFEST_FORMATS", "Format"]

Format = Literal["docker", "docker-archive", "oci-archive", "oci-dir", "dir"]
FORMATS: Final[tuple[Format, ...]] = ("docker", "docker-archive", "oci-archive", "oci-dir", "dir")
"""The first is the default: an OCI archive that `docker load` accepts too."""

FOLDER_FORMATS: Final[tuple[Format, ...]] = ("oci-dir", "dir")
"""The formats of a folder; the others are archives."""

MANIFEST_FORMATS: Final[tuple[Format, ...]] = ("docker-archive", "dir")
"""The formats that hold one image manifest, so neither an index nor referrers."""
