"""The plan of a run: its folder, its scale, and the image that the sections share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.measure import delete_paths
from benchmarks.real_images import RealImage, prepare_image


@dataclass
class Plan:
    """The scale of a run."""

    place: Path
    quick: bool
    rounds: int
    images: int  # in the largest cache
    archive: Path | None = None

    @property
    def bytes(self) -> int:
        """The size of the image."""
        return 50_000_000 if self.quick else 1_000_000_000

    @property
    def operations(self) -> int:
        """The number of calls of a short operation, for its median and 99th percentile."""
        return 50 if self.quick else 200

    @cached_property
    def image(self) -> RealImage:
        """The image; the first section that needs it makes it."""
        return prepare_image(self.folder("image"), self.bytes, self.archive)

    def folder(self, name: str) -> Path:
        """Return a new, empty folder."""
        path = self.place / name
        delete_paths(path)
        path.mkdir()
        return path
