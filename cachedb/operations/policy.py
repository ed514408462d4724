"""The policy of a cache: which images to keep, which to remove, and the limits of its size.

It is the file ``policy.toml`` in the cache directory, so every process applies the same policy.
"""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple, TypeVar

from cachedb.disk.layout import POLICY_FILE
from cachedb.errors import CacheError, InvalidPolicy, InvalidQuery
from cachedb.index.filters import parse_label
from cachedb.index.patterns import is_pattern
from cachedb.index.sqlite.database import Database
from cachedb.index.sqlite.query import run_query
from cachedb.oci.names import Name, parse_repository
from cachedb.oci.platforms import PLATFORM_PART
from cachedb.text import parse_duration, parse_size, shorten

__all__ = [
    "EXPRESSION",
    "QUERY_SECONDS",
    "Keep",
    "Limits",
    "Policy",
    "Remove",
    "check_policy",
    "format_policy",
    "parse_disk_size",
    "parse_free_space",
    "parse_name_or_pattern",
    "parse_percentage",
    "parse_policy",
]


EXPRESSION: Final = "re:"
"""The prefix that marks a regular expression in a list of names."""

QUERY_SECONDS = 60.0
"""The longest time that a query of a rule may take."""

_LEAST_PLAIN_BYTES = 1_000_000  # a smaller limit must have a unit


T = TypeVar("T")


class Keep(NamedTuple):
    """A rule that keeps images: those that fulfil all of its conditions."""

    names: tuple[str, ...] = ()  # patterns, or ``re:EXPRESSION`` to search in the name; one of them must match
    repository: str | None = None  # a pattern
    labels: tuple[tuple[str, str | None], ...] = ()  # keys with their values; None allows any value
    platform: str | None = None  # os/architecture[/variant]
    newest: int | None = None  # images of each repository, by the time when their names came here
    used_within: float | None = None  # seconds since the last use, at most
    added_within: float | None = None  # seconds since the name came here, at most
    sql: str | None = None  # a query; its first column has names


class Remove(NamedTuple):
    """A rule that removes images: those that fulfil all of its conditions."""

    names: tuple[str, ...] = ()  # as for `Keep`
    repository: str | None = None  # a pattern
    labels: tuple[tuple[str, str | None], ...] = ()  # as for `Keep`
    platform: str | None = None  # os/architecture[/variant]
    unused_for: float | None = None  # seconds since the last use, at least
    added_before: float | None = None  # seconds since the name came here, at least
    incomplete: bool | None = None  # True: lacks a blob; False: lacks none
    keep_newest: int | None = None  # images of each repository that stay, among those that fulfil the other conditions
    sql: str | None = None  # a query; its first column has names


class Limits(NamedTuple):
    """Limits of the size of a cache."""

    max_size: int | None = None  # bytes of all files of the cache, as `df` counts them
    min_free: int | float | None = None  # int: bytes; float: fraction of the file system
    down_to: float = 1.0  # fraction of ``max_size`` at which a prune stops

    def choose_free_size(self, size: int) -> int:
        """Return the bytes that must be free on a file system of a size in bytes; 0 without ``min_free``."""
        wanted = self.min_free or 0
        return wanted if isinstance(wanted, int) else int(wanted * size)


class Policy(NamedTuple):
    """What to keep, what to remove, and the limits; a keep always wins."""

    limits: Limits = Limits()
    keep: tuple[Keep, ...] = ()
    remove: tuple[Remove, ...] = ()

    @property
    def keeps_recent(self) -> bool:
        """Whether images that were used a moment ago stay, because no rule says ``used-within``."""
        return all(rule.used_within is None for rule in self.keep)


# Parsing


def parse_policy(text: str, source: str = POLICY_FILE) -> Policy:
    """Parse a policy in TOML; its queries are not checked.

    Args:
        text: the policy.
        source: the name of the file, for errors.

    Raises:
        InvalidPolicy: if the text is not TOML, or has an unknown key, a wrong value, or a rule without conditions.
    """
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise InvalidPolicy(f"{source}: it is nested too deeply: write a flat policy") from None
    except ValueError as error:
        raise _explain_syntax(text, source, error) from None
    try:
        return _parse_document(document)
    except _Mistake as mistake:
        raise _locate(text, source, mistake) from None


class _Mistake(Exception):
    """What is wrong at a place of a policy."""

    def __init__(self, what: str, *path: str | int) -> None:
        super().__init__(what)
        self.path = path  # keys and positions that lead to the place


def _locate(text: str, source: str, mistake: _Mistake) -> InvalidPolicy:
    line = _find_line(text, mistake.path)
    return InvalidPolicy(f"{source}, line {line}: {mistake}", line=line)


def _explain_syntax(text: str, source: str, error: ValueError) -> InvalidPolicy:
    what = str(error)
    found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", what)
    line, column = (int(found[1]), f" in column {found[2]}") if found and found[1] else (text.count("\n") + 1, "")
    what = what[: found.start()] if found else what
    return InvalidPolicy(f"{source}, line {line}: invalid TOML{column}: {what[:1].lower()}{what[1:]}", line=line)


def _find_line(text: str, path: tuple[str | int, ...]) -> int:
    """Return the first line of the statement that sets the value at a path.

    A document that is cut off after that statement has the value, and one that is cut off before it has not. So this
    needs no grammar of TOML.
    """
    lines = text.replace("\r\n", "\n").split("\n")

    def has_value(count: int) -> bool:
        for end in range(count, len(lines) + 1):
            try:
                value: Any = tomllib.loads("\n".join(lines[:end]))
            except ValueError:
                continue  # the statement continues on the next line
            for part in path:
                is_there = part < len(value) if isinstance(part, int) else part in value
                if not is_there:
                    return False
                value = value[part]
            return True
        return True

    return bisect_left(range(1, len(lines)), True, key=has_value) + 1


def _parse_document(document: dict[str, Any]) -> Policy:
    for key in document:
        if key not in ("limits", "keep", "remove"):
            raise _Mistake(f"unknown table {shorten(key)}: use limits, keep or remove", key)
    limits = document.get("limits", {})
    if not isinstance(limits, dict):
        raise _Mistake("limits is not a table: write [limits]", "limits")
    parsed = Limits(**_parse_table(limits, _LIMIT_KEYS, "limits"))
    if "down-to" in limits and parsed.max_size is None:
        raise _Mistake("down-to is a part of max-size, which is missing: add max-size", "limits", "down-to")
    keep = tuple(Keep(**values) for values in _parse_rules(document, "keep", _KEEP_KEYS))
    remove = tuple(Remove(**values) for values in _parse_rules(document, "remove", _REMOVE_KEYS))
    return Policy(parsed, keep, remove)


def _parse_rules(document: dict[str, Any], kind: str, keys: Mapping[str, _Parser]) -> Iterator[dict[str, Any]]:
    tables = document.get(kind, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise _Mistake(f"{kind} is not a list of tables: write [[{kind}]]", kind)
    for number, table in enumerate(tables):
        if not table:
            raise _Mistake(f"the rule has no condition: use {_list_keys(keys)}", kind, number)
        yield _parse_table(table, keys, kind, number)


def _parse_table(table: dict[str, Any], keys: Mapping[str, _Parser], *path: str | int) -> dict[str, Any]:
    """Return the values of a table, by the field names of `Limits`, `Keep` or `Remove`."""
    found = {}
    for key, value in table.items():
        name = _OLD_SPELLINGS.get((path[0], key), key)
        if name not in keys:
            raise _Mistake(f"unknown key {shorten(key)}: use {_list_keys(keys)}", *path, key)
        if name != key and name in table:
            raise _Mistake(f"{key} is another spelling of {name}: give one of them", *path, key)
        try:
            found["labels" if name == "label" else name.replace("-", "_")] = keys[name](value)
        except (CacheError, ValueError) as error:
            raise _Mistake(f"{key}: {error}", *path, key) from None
    return found


def _list_keys(keys: Mapping[str, _Parser]) -> str:
    *names, last = keys
    return f"{', '.join(names)} or {last}"


# Values: each function raises `ValueError` or `CacheError` for a wrong one.

_Parser = Callable[[object], object]


def _parse_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{shorten(value)} is not a text: write one in quotes")
    return value


def _parse_texts(value: object) -> list[str]:
    """Return the texts of a list; one text is a list, too."""
    if isinstance(value, list) and not value:
        raise ValueError("the list is empty: write at least one text, or leave the key out")
    return [_parse_text(text) for text in value] if isinstance(value, list) else [_parse_text(value)]


def parse_disk_size(value: object) -> int:
    """Parse a size such as ``200GB`` into bytes.

    Raises:
        ValueError: if it is not one, or a small number without a unit.
    """
    size = parse_size(value) if isinstance(value, str) else None
    if size is None:
        raise ValueError(f'{shorten(value)} is not a size: write one as in "200GB" or "64GiB"')
    _check_unit(value, '"{}GB"')
    return size


def _check_unit(value: object, examples: str) -> None:
    """Raise if a size is a small number without a unit, because people forget units.

    A larger number may be plain bytes that a program wrote.
    """
    number = str(value).strip()
    if re.fullmatch(r"[0-9.]+", number) and 0 < float(number) < _LEAST_PLAIN_BYTES:
        raise ValueError(f'{number!r} has no unit: write {examples.format(number)}, or "{number}B" for bytes')


def _find_fraction(text: object) -> float | None:
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,3})?)%", text) if isinstance(text, str) else None
    return float(found[1]) / 100 if found and float(found[1]) <= 100 else None


def parse_percentage(value: object) -> float:
    """Parse a percentage such as ``90%`` into a fraction, which is above 0 and at most 1.

    Raises:
        ValueError: if it is not one.
    """
    fraction = _find_fraction(value)
    if not fraction:
        raise ValueError(f'{shorten(value)} is not a percentage: write one as in "90%"')
    return fraction


def parse_free_space(value: object) -> int | float:
    """Parse a percentage into a fraction, or a size such as ``20GB`` into bytes.

    Raises:
        ValueError: if it is neither, or a small number without a unit.
    """
    fraction = _find_fraction(value)
    size = parse_size(value) if isinstance(value, str) and fraction is None else fraction
    if size is None:
        raise ValueError(f'{shorten(value)} is neither a percentage nor a size: write one as in "15%" or "20GB"')
    if fraction is None:
        _check_unit(value, '"{0}%" or "{0}GB"' if size <= 100 else '"{}GB"')
    return size


def _parse_seconds(value: object) -> int:
    seconds = parse_duration(value) if isinstance(value, str) else None
    if seconds is None:
        raise ValueError(f'{shorten(value)} is not a duration: write one as in "7d" or "1h30m"')
    return seconds


def _parse_count(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{shorten(value)} is not a number of images: write 1 or more, without quotes")
    return value


def _parse_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{shorten(value)} is neither true nor false: write one of them, without quotes")
    return value


def _parse_names(value: object) -> tuple[str, ...]:
    return tuple(map(parse_name_or_pattern, _parse_texts(value)))


def parse_name_or_pattern(text: str) -> str:
    """Return a pattern or ``re:EXPRESSION`` unchanged, and any other text as a whole name.

    Raises:
        ValueError: if a pattern or an expression is invalid.
        InvalidName: if another text is not a name.
    """
    if text.startswith(EXPRESSION):
        try:
            re.compile(text.removeprefix(EXPRESSION))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{shorten(text)} is not a regular expression: {error}") from None
        return text
    return _check_pattern(text) if is_pattern(text) else str(Name.parse(text))


def _parse_repository(value: object) -> str:
    text = _parse_text(value)
    return _check_pattern(text) if is_pattern(text) else parse_repository(text)


def _check_pattern(text: str) -> str:
    if "[" in re.sub(r"\[[!^]?\]?[^]]*\]", "", text):
        raise ValueError(f"{shorten(text)} is not a pattern: close each [ with a ]")
    return text


def _parse_labels(value: object) -> tuple[tuple[str, str | None], ...]:
    return tuple(map(parse_label, _parse_texts(value)))


def _parse_platform(value: object) -> str:
    text = _parse_text(value)
    parts = text.split("/")
    if len(parts) > 3 or not all(part and PLATFORM_PART.fullmatch(part) for part in parts):
        raise ValueError(f'{shorten(text)} is not a platform: write it as in "linux/arm64"')
    return text


_LIMIT_KEYS: Final[Mapping[str, _Parser]] = {
    "max-size": parse_disk_size,
    "min-free": parse_free_space,
    "down-to": parse_percentage,
}
_COMMON_KEYS: Final[Mapping[str, _Parser]] = {
    "names": _parse_names,
    "repository": _parse_repository,
    "label": _parse_labels,
    "platform": _parse_platform,
    "sql": _parse_text,
}
_KEEP_KEYS: Final = {
    **_COMMON_KEYS,
    "newest": _parse_count,
    "used-within": _parse_seconds,
    "added-within": _parse_seconds,
}
_REMOVE_KEYS: Final = {
    **_COMMON_KEYS,
    "keep-newest": _parse_count,
    "unused-for": _parse_seconds,
    "added-before": _parse_seconds,
    "incomplete": _parse_flag,
}
_OLD_SPELLINGS: Final[Mapping[tuple[str | int, str], str]] = {("remove", "newest"): "keep-newest"}


# Formatting


def format_policy(policy: Policy) -> str:
    """Return a policy in TOML, as `parse_policy` reads it."""
    tables = [_format_table("[limits]", policy.limits, Limits())] if policy.limits != Limits() else []
    tables += [_format_table("[[keep]]", rule, Keep()) for rule in policy.keep]
    tables += [_format_table("[[remove]]", rule, Remove()) for rule in policy.remove]
    return "\n".join(tables)


def _format_table(heading: str, table: Limits | Keep | Remove, default: Limits | Keep | Remove) -> str:
    lines = [
        f"{'label' if field == 'labels' else field.replace('_', '-')} = {_format_value(field, value)}\n"
        for field, value in table._asdict().items()
        if value != getattr(default, field)
    ]
    return "".join([f"{heading}\n", *lines])


def _format_value(field: str, value: Any) -> str:  # noqa: ANN401 - the type depends on the field
    if isinstance(value, bool) or field in ("newest", "keep_newest"):
        return str(value).lower()
    if field == "labels":
        value = tuple(key if wanted is None else f"{key}={wanted}" for key, wanted in value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_quote, value))}]"
    if field == "down_to" or (field == "min_free" and isinstance(value, float)):
        return _quote(f"{value * 100:.6g}%")
    if isinstance(value, str):
        return _quote(value)
    return _quote(_format_bytes(value) if field in ("max_size", "min_free") else _format_seconds(value))


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _format_bytes(size: int) -> str:
    """Return the shortest text that means exactly this size."""
    units = [("B", 1), *((f"{unit}B", 1000**power) for power, unit in enumerate("kMGTP", 1))]
    units += [(f"{unit}iB", 1024**power) for power, unit in enumerate("KMGTP", 1)]
    texts = (f"{size // factor}{unit}" for unit, factor in units if size % factor == 0)
    return min(texts, key=len)


def _format_seconds(seconds: float) -> str:
    parts, rest = [], int(seconds)
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        parts += [f"{count}{unit}"] if count else []
    return "".join(parts) or "0s"


# Checking


def check_policy(database: Database, text: str, source: str = POLICY_FILE) -> Policy:
    """Parse a policy, and run each of its queries up to the first row.

    Args:
        database: the index for the queries.
        text: as for `parse_policy`.
        source: as for `parse_policy`.

    Raises:
        InvalidPolicy: as `parse_policy` does, or if a query is invalid.
        CacheError: if a query takes over a minute.
    """
    policy = parse_policy(text, source)
    queries = [("keep", number, rule.sql) for number, rule in enumerate(policy.keep)]
    queries += [("remove", number, rule.sql) for number, rule in enumerate(policy.remove)]
    for kind, number, query in queries:
        if query is not None:
            try:
                with run_query(database, query, timeout=QUERY_SECONDS, stream=True):
                    pass
            except InvalidQuery as error:
                raise _locate(text, source, _Mistake(f"sql: {error}", kind, number, "sql")) from None
    return policy
