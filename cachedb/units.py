"""Sizes and times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

__all__ = ["ago", "human"]


def human(size: float) -> str:
    """Return a size in bytes as Docker prints it, in powers of 1000: ``1.23 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def ago(time: datetime) -> str:
    """Return how long ago a time was: ``3 days ago``."""
    seconds = max(0, (datetime.now(UTC) - time).total_seconds())
    for unit, length in (("year", 31_557_600), ("month", 2_629_800), ("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
