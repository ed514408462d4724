"""Read a plan from a file, which may have been written or changed by anybody."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from cachedb.errors import CacheError, InvalidPolicy
from cachedb.oci.digests import parse_digest
from cachedb.oci.names import Name
from cachedb.operations.plan import PlannedImage
from cachedb.text import printable, shorten

__all__ = ["parse_plan"]


_ADVICE = "write a plan with `cachedb prune --plan FILE`"
_RULE_LIMIT = 100  # characters


def parse_plan(text: str, source: str) -> list[PlannedImage]:
    """Return the images of a plan in JSON, in the order of removal; unknown fields are ignored.

    Args:
        text: what `cachedb prune --plan` has written.
        source: the name of the file, for errors.

    Raises:
        InvalidPolicy: if it is not a plan.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidPolicy(f"{source} is not a plan, because it is not JSON ({error}): {_ADVICE}") from None
    entries = document.get("images") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise InvalidPolicy(f"{source} is not a plan, because it has no list of images: {_ADVICE}")
    images: dict[Name, PlannedImage] = {}
    for number, entry in enumerate(entries):
        try:
            image = _parse_image(entry)
            if image.name in images:
                raise ValueError(f"{image.name} is listed twice")
        except (CacheError, ValueError) as error:
            raise InvalidPolicy(
                f"{source} is not a plan, because images[{number}] is wrong ({error}): {_ADVICE}"
            ) from None
        images[image.name] = image
    return list(images.values())


def _parse_image(entry: object) -> PlannedImage:
    if not isinstance(entry, dict):
        raise ValueError(f"{shorten(entry)} is not an object")
    rule = _get(entry, "rule", str)
    if len(rule) > _RULE_LIMIT or rule != printable(rule):
        raise ValueError(f"rule is {shorten(rule)}")
    return PlannedImage(
        Name.parse(_get(entry, "name", str)),
        parse_digest(_get(entry, "digest", str)),
        _parse_time(_get(entry, "last_used_at", str)),
        _parse_size(entry, "size"),
        _parse_size(entry, "freed_size"),
        _parse_size(entry, "total_freed_size"),
        rule,
    )


def _get(entry: dict[str, Any], key: str, kind: type) -> Any:  # noqa: ANN401 - of the kind
    value = entry.get(key)
    if type(value) is not kind:
        raise ValueError(f"{key} is {shorten(value)}")
    return value


def _parse_size(entry: dict[str, Any], key: str) -> int:
    size: int = _get(entry, key, int)
    if not 0 <= size < 1 << 63:
        raise ValueError(f"{key} is {shorten(size)}")
    return size


def _parse_time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is not None:
            return time.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"last_used_at is {shorten(text)}, and not a time with a time zone")
