"""Read, compare and detect platforms, as containerd does (github.com/containerd/platforms)."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

__all__ = ["PLATFORM_PART", "choose_platform", "host_platform", "is_for", "join_platform", "platform_label"]


_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "i386": "386",
    "i686": "386",
    "aarch64": "arm64",
    "armhf": "arm/v7",
    "armel": "arm/v6",
    "armv7l": "arm/v7",
    "armv6l": "arm/v6",
}
_SYSTEMS = frozenset({"android", "darwin", "freebsd", "illumos", "linux", "netbsd", "openbsd", "solaris", "windows"})
_DEFAULT_VARIANTS = {"amd64": "v1", "arm": "v7", "arm64": "v8"}
_LEVEL = re.compile(r"v?(\d{1,2})(?:\.(\d{1,2}))?")
_ARM64_EXTRA = 5  # ARMv9.N has all that ARMv8.(N + 5) has
PLATFORM_PART = re.compile(r"[A-Za-z0-9._-]{0,64}")  # safe in messages and next to a name

T = TypeVar("T")


class _Platform(NamedTuple):
    os: str
    architecture: str
    variant: str  # "" if it is not given


def platform_label(fields: object) -> str | None:
    """Return ``os/architecture[/variant]`` from the fields of an index's platform or of a config."""
    if not isinstance(fields, dict):
        return None
    parts = [fields.get(key) or "" for key in ("os", "architecture", "variant")]
    if not all(isinstance(part, str) and PLATFORM_PART.fullmatch(part) for part in parts):
        return None
    return join_platform(*parts) or None


def join_platform(*parts: str | None) -> str:
    """Return ``os/architecture[/variant]`` without the parts that are unknown."""
    return "/".join(filter(None, parts))


def host_platform() -> str:
    """Return the host's platform, with Go's names for architectures, which images use."""
    machine = platform.machine().lower()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def is_for(label: str | None, wanted: str) -> bool:
    """Return whether an image of a platform can be used for the wanted one; see `choose_platform`."""
    return _rank(label, wanted) is not None


def choose_platform(choices: Iterable[tuple[T, str | None]], wanted: str) -> T | None:
    """Return the choice that fits the wanted platform best, the first of equals; None if none fits.

    A lower variant of the same architecture fits too, and the nearest one is best: ``linux/amd64/v2`` for
    ``linux/amd64/v3``. If ``wanted`` has no variant, a higher variant is better than none.

    Args:
        choices: pairs of a choice and its platform.
        wanted: ``os/architecture[/variant]``; an architecture alone is Linux's, an operating system alone means the
            host's architecture. Other names of an architecture, such as ``aarch64``, are understood.
    """
    ranked = [(rank, choice) for choice, label in choices if (rank := _rank(label, wanted)) is not None]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else None


def _rank(label: str | None, wanted: str) -> tuple[bool, tuple[int, int]] | None:
    """Return how far a platform is from the wanted one, for a comparison; None if it does not fit."""
    if label is None or "/" not in label:
        return None
    ours, asked = _normalize(label), _normalize(wanted if "/" in wanted else _complete(wanted))
    if ours is None or asked is None or ours[:2] != asked[:2]:
        return None
    if ours.variant == asked.variant:
        return False, (0, 0)
    ours_level, asked_level = _read_level(ours), _read_level(asked)
    if ours_level is None or asked_level is None:
        return None if asked.variant else (True, (0, 0))
    if _contains(asked, asked_level, ours_level):
        return False, (asked_level[0] - ours_level[0], asked_level[1] - ours_level[1])
    return None if asked.variant else (True, ours_level)


def _complete(wanted: str) -> str:
    """Return ``os/architecture`` for an operating system or an architecture alone."""
    return f"{wanted}/{host_platform().partition('/')[2]}" if wanted.lower() in _SYSTEMS else f"linux/{wanted}"


def _normalize(text: str) -> _Platform | None:
    """Return the parts of a platform with Go's names for them; None if the text has too many parts."""
    os, _, rest = text.lower().partition("/")
    given, _, variant = rest.partition("/")
    if "/" in variant:
        return None
    architecture, _, implied = _ARCHITECTURES.get(given, given).partition("/")
    if architecture in _DEFAULT_VARIANTS and variant.isdecimal():
        variant = f"v{variant}"
    return _Platform("darwin" if os == "macos" else os, architecture, variant or implied)


def _read_level(found: _Platform) -> tuple[int, int] | None:
    """Return the level of the instruction set that a variant names; None if variants have no order."""
    default = _DEFAULT_VARIANTS.get(found.architecture)
    match = _LEVEL.fullmatch(found.variant or default or "")
    return (int(match[1]), int(match[2] or 0)) if default and match else None


def _contains(asked: _Platform, level: tuple[int, int], lower: tuple[int, int]) -> bool:
    """Return whether the asked level of an instruction set has all that another one has."""
    if asked.architecture == "arm64" and (level[0], lower[0]) == (9, 8):
        return lower[1] <= level[1] + _ARM64_EXTRA
    return lower <= level if asked.architecture != "arm64" else lower[0] == level[0] and lower[1] <= level[1]
