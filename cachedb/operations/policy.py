"""The policy of a cache: which images to keep, which to remove, and the limits of its size."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Keep", "Limits", "Policy", "Remove"]


class Keep(NamedTuple):
    """A rule that keeps images: those that fulfil all of its conditions."""

    names: tuple[str, ...] = ()  # patterns, or ``re:EXPRESSION``, which is searched in the name; one of them matches
    repository: str | None = None  # a pattern
    labels: tuple[tuple[str, str | None], ...] = ()  # keys with their values; None allows any value
    platform: str | None = None  # os/architecture[/variant]
    newest: int | None = None  # so many images of each repository, by the time when their names came here
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
    newest: int | None = None  # keep so many of each repository among those that fulfil the other conditions
    sql: str | None = None  # a query; its first column has names


class Limits(NamedTuple):
    """Limits of the size of a cache."""

    max_size: int | None = None  # bytes of all files of the cache, as `df` counts them
    min_free: int | float | None = None  # int: bytes; float: fraction of the file system
    down_to: float = 1.0  # fraction of ``max_size`` at which an eviction stops


class Policy(NamedTuple):
    """What to keep, what to remove, and the limits; a keep always wins."""

    limits: Limits = Limits()
    keep: tuple[Keep, ...] = ()
    remove: tuple[Remove, ...] = ()
