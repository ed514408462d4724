"""Platforms: what an image is for, and whether that is this host."""

from __future__ import annotations

import platform
import re

__all__ = ["PLATFORM_PART", "host_platform", "is_for", "platform_label"]


_ARCHITECTURES = {"x86_64": "amd64", "i686": "386", "aarch64": "arm64", "armv7l": "arm/v7", "armv6l": "arm/v6"}
PLATFORM_PART = re.compile(r"[A-Za-z0-9._-]{0,64}")  # it ends up in messages and beside a name


def platform_label(said: object) -> str | None:
    """Return ``os/architecture[/variant]`` of an index's platform, or of a config, which has the same fields."""
    if not isinstance(said, dict):
        return None
    parts = [said.get(key) or "" for key in ("os", "architecture", "variant")]
    if not all(isinstance(part, str) and PLATFORM_PART.fullmatch(part) for part in parts):
        return None
    return "/".join(part for part in parts if part) or None


def host_platform() -> str:
    """Return the host's platform in the words of images, which are Go's."""
    machine = platform.machine().lower()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def is_for(label: str | None, wanted: str) -> bool:
    """Say whether a platform is the one asked for; the variant may be left out, and v8 is arm64's own."""
    return f"{label}/".startswith(f"{wanted.removesuffix('/v8')}/")
