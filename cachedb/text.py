"""Format sizes, times, digests and untrusted text for people."""

from __future__ import annotations

import re
from datetime import UTC, datetime

__all__ = [
    "format_age",
    "format_count",
    "format_size",
    "parse_duration",
    "parse_size",
    "printable",
    "shorten",
    "shorten_digest",
    "truncate",
]


_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,3})?) ?(?:([kmgtp])(i?))?b?", re.IGNORECASE)


def format_count(number: int, noun: str) -> str:
    """Return a number without separators, with its noun in the singular or plural."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_size(size: float) -> str:
    """Format a size in bytes as Docker does, in powers of 1000: ``1.23 MB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"


def parse_size(text: str) -> int | None:
    """Parse a size into bytes: ``500MB`` in powers of 1000, ``64GiB`` of 1024; None if invalid."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    power = " kmgtp".index((found[2] or " ").lower())
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def parse_duration(text: str) -> int | None:
    """Parse a duration such as 90s, 30m, 2h, 7d, 1w or 1h30m into seconds; None if invalid."""
    if not re.fullmatch(r"([0-9]{1,9}[smhdw])+", text):
        return None
    return sum(int(count) * _SECONDS[unit] for count, unit in re.findall(r"([0-9]+)([smhdw])", text))


def format_age(time: datetime) -> str:
    """Format how long ago a time was: ``3 days ago``."""
    seconds = max(0, (datetime.now(UTC) - time).total_seconds())
    for unit, length in (("year", 31_557_600), ("month", 2_629_800), ("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def truncate(text: str, length: int = 60) -> str:
    """Shorten a text to ``length`` characters, with … at the end if it was cut."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def shorten_digest(digest: str) -> str:
    """Return a digest with only its first twelve digits."""
    algorithm, _, encoded = digest.partition(":")
    return f"{algorithm}:{encoded[:12]}"


def printable(text: str) -> str:
    """Escape the control characters of untrusted text, which could move a terminal's cursor or end a line."""
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shorten(value: object) -> str:
    """Quote an untrusted value for an error message, on one line and at most 100 characters."""
    if isinstance(value, (dict, list)):  # the repr of a deep one may exceed the recursion limit
        return "{...}" if isinstance(value, dict) else "[...]"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text) - 2} characters)"
