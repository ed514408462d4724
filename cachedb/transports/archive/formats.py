"""The formats that an image can be exported to; here, so that the command line need not import what writes them."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["FORMATS", "Format"]

Format = Literal["docker", "docker-archive", "oci-archive", "oci-dir"]
FORMATS: Final[tuple[Format, ...]] = ("docker", "docker-archive", "oci-archive", "oci-dir")
"""The first, the default, is an OCI archive that `docker load` takes too."""
