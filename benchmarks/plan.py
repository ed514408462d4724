"""What a run measures with: where it works, how often and how much, and the image that its sections share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.measure import empty
from benchmarks.real_images import RealImage, prepare


@dataclass
class Plan:
    """The scale of a run."""

    place: Path
    quick: bool
    rounds: int
    images: int  # of the largest cache
    archive: Path | None = None

    @property
    def bytes(self) -> int:
        """How large the image is."""
        return 50_000_000 if self.quick else 1_000_000_000

    @property
    def operations(self) -> int:
        """How often a short operation is done, of which the median and the 99th percentile are told."""
        return 50 if self.quick else 200

    @cached_property
    def image(self) -> RealImage:
        """The image, made when the first section asks for it."""
        return prepare(self.folder("image"), self.bytes, self.archive)

    def folder(self, name: str) -> Path:
        """Return a new folder to work in."""
        path = self.place / name
        empty(path)
        path.mkdir()
        return path
