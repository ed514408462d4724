"""Parse image configs: https://github.com/opencontainers/image-spec/blob/main/config.md"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import compress
from typing import Any, Final, NamedTuple

from cachedb.errors import InvalidDigest, InvalidManifest
from cachedb.oci.digests import Digest, parse_digest
from cachedb.oci.manifests import load_json
from cachedb.oci.platforms import PLATFORM_PART

__all__ = [
    "CONFIG_LIMIT",
    "ImageConfig",
    "parse_config",
]


CONFIG_LIMIT: Final = 256 * 1024
"""The most characters kept of a config's labels (keys and values), and the most kept of its commands.

Labels and commands are kept in the config's order. One that exceeds the rest of the limit is left out.
"""
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,20})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)  # RFC 3339, 5.6
_INVALID_TEXT = re.compile("[\0\ud800-\udfff]")  # SQL text ends at a NUL, and a lone surrogate is not valid UTF-8


class ImageConfig(NamedTuple):
    """The valid fields of an image config (image specification, config.md)."""

    architecture: str | None
    os: str | None
    variant: str | None
    created: datetime | None  # UTC
    author: str | None
    labels: dict[str, str]
    layers: list[tuple[Digest | None, str | None]]  # each layer's diff id, and the command that created it


def parse_config(data: bytes, text_limit: int) -> ImageConfig:
    """Parse an image config, leaving out invalid fields and text beyond `CONFIG_LIMIT`.

    Args:
        data: the config's bytes.
        text_limit: a text with more characters is left out.

    Raises:
        InvalidManifest: if the config is not a JSON object.
    """
    document = load_json(data, "the config")
    if not isinstance(document, dict):
        raise InvalidManifest("the config is not a JSON object")

    def text(value: object, limit: int = text_limit) -> str | None:
        if not isinstance(value, str) or not 0 < len(value) <= limit or _INVALID_TEXT.search(value):
            return None
        return value

    def platform_part(key: str) -> str | None:
        value = document.get(key)
        return value if isinstance(value, str) and value and PLATFORM_PART.fullmatch(value) else None

    labels = [
        (key, value)
        for key, value in _as_object(_as_object(document.get("config")).get("Labels")).items()
        if text(key) and (value == "" or text(value)) and isinstance(value, str)
    ]
    diff_ids = [_parse_diff_id(value) for value in _as_list(_as_object(document.get("rootfs")).get("diff_ids"))]
    history = [_as_object(entry) for entry in _as_list(document.get("history"))]
    commands = [text(entry.get("created_by")) for entry in history if entry.get("empty_layer") is not True]
    if len(commands) != len(diff_ids):
        commands = [None] * len(diff_ids)  # commands cannot be matched to layers
    fitting = _fitting(len(command or "") for command in commands)
    commands = [command if fits else None for command, fits in zip(commands, fitting, strict=True)]
    return ImageConfig(
        architecture=platform_part("architecture"),
        os=platform_part("os"),
        variant=platform_part("variant"),
        created=_parse_time(document.get("created")),
        author=text(document.get("author")),
        labels=dict(compress(labels, _fitting(len(key) + len(value) for key, value in labels))),
        layers=list(zip(diff_ids, commands, strict=True)),
    )


def _fitting(lengths: Iterable[int]) -> Iterator[bool]:
    """Yield for each length whether it still fits into `CONFIG_LIMIT` after the earlier ones that fit."""
    left = CONFIG_LIMIT
    for length in lengths:
        yield length <= left
        if length <= left:
            left -= length


def _as_object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _parse_diff_id(value: object) -> Digest | None:
    try:
        return parse_digest(value)  # type: ignore[arg-type]
    except InvalidDigest:
        return None


def _parse_time(value: object) -> datetime | None:
    """Parse an RFC 3339 time into UTC; return None for an invalid time, and for Go's zero time in year 1."""
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        return None
    try:
        time = datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time if time.year > 1 else None
