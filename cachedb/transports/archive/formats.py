"""List the export formats, so that the command line need not import the code that writes them."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["FORMATS", "Format"]

Format = Literal["docker", "docker-archive", "oci-archive", "oci-dir"]
FORMATS: Final[tuple[Format, ...]] = ("docker", "docker-archive", "oci-archive", "oci-dir")
"""The first is the default: an OCI archive that `docker load` accepts too."""
