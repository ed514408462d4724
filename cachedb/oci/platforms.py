"""Read, compare and detect platforms."""

from __future__ import annotations

import platform
import re

__all__ = ["PLATFORM_PART", "host_platform", "is_for", "platform_label"]


_ARCHITECTURES = {"x86_64": "amd64", "i686": "386", "aarch64": "arm64", "armv7l": "arm/v7", "armv6l": "arm/v6"}
PLATFORM_PART = re.compile(r"[A-Za-z0-9._-]{0,64}")  # safe in messages and next to a name


def platform_label(fields: object) -> str | None:
    """Return ``os/architecture[/variant]`` from the fields of an index's platform or of a config."""
    if not isinstance(fields, dict):
        return None
    parts = [fields.get(key) or "" for key in ("os", "architecture", "variant")]
    if not all(isinstance(part, str) and PLATFORM_PART.fullmatch(part) for part in parts):
        return None
    return "/".join(part for part in parts if part) or None


def host_platform() -> str:
    """Return the host's platform, with Go's names for architectures, which images use."""
    machine = platform.machine().lower()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def is_for(label: str | None, wanted: str) -> bool:
    """Return whether a platform is the wanted one; ``wanted`` may omit the variant, and arm64 implies v8."""
    return f"{label}/".startswith(f"{wanted.removesuffix('/v8')}/")
