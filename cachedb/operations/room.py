"""Make room for images automatically, if the policy of the cache has limits.

A pull makes room before the first byte. An import, a save or an adoption prunes when it has acknowledged its images.
Without a ``policy.toml``, all of this costs one look for that file.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from cachedb.content.last_used import Uses
from cachedb.disk import downloads, single_flight
from cachedb.disk.layout import POLICY_FILE
from cachedb.disk.waiting import LOG
from cachedb.errors import Busy, CacheError, NoRoom, ignore_os_errors, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.text import format_count, format_size
from cachedb.threads import at_low_priority

if TYPE_CHECKING:
    from cachedb.oci.names import Name
    from cachedb.operations.gauge import Gauge
    from cachedb.operations.plan import Plan
    from cachedb.operations.policy import Policy
    from cachedb.operations.prune import Pruned

__all__ = ["Room", "choose_auto_prune"]


_VARIABLE = "CACHEDB_AUTO_PRUNE"
_MEANINGS = {"": True, "1": True, "true": True, "yes": True, "on": True} | dict.fromkeys(
    ["0", "false", "no", "off"], False
)
_RETRY_SECONDS = 60.0  # until the next prune, after one that could not meet the limits


def choose_auto_prune() -> bool:
    """Return whether ``CACHEDB_AUTO_PRUNE`` allows automatic prunes; by default it does.

    Raises:
        CacheError: if the value is neither 1 nor 0, nor a word for one of them.
    """
    text = os.environ.get(_VARIABLE, "")
    meaning = _MEANINGS.get(text.strip().lower())
    if meaning is None:
        raise CacheError(f"{_VARIABLE} is {text!r}: give 1 or 0")
    return meaning


class Room:
    """The room for new images in a cache; safe for threads and forked children."""

    def __init__(self, database: Database, uses: Uses) -> None:
        """Prepare to make room; nothing is read yet.

        Args:
            database: of the cache.
            uses: the uses that are not in the index yet; a prune writes them first.

        Raises:
            CacheError: as `choose_auto_prune`.
        """
        self._database, self._uses = database, uses
        self._is_enabled = choose_auto_prune()
        self._policy_file = f"{database.directory}/{POLICY_FILE}"
        self._known: tuple[object, Policy | None] = (None, None)  # the identity of the file, and its policy
        self._gauge: Gauge | None = None
        self._retry_at = 0.0  # on the monotonic clock

    def make(self, name: Name, size: int) -> None:
        """Remove images so that a new image fits into the limits; call this before its first byte.

        If another process is pruning, this waits for it, then looks again. If the policy is invalid or a prune fails,
        this logs a warning.

        Args:
            name: of the image, for the error.
            size: bytes that the image will add.

        Raises:
            NoRoom: if the image cannot fit; then nothing is removed.
            Busy: if another process prunes for too long.
        """
        policy = self._find_policy()
        if policy is not None and size:
            try:
                self._make(policy, name, size)
            except (Busy, NoRoom):
                raise
            except CacheError as error:
                LOG.warning("cannot make room for %s: %s", name, error)

    def prepare(self, source: object = None) -> None:
        """Remove images if the disk is short; call this before bytes are stored. This never raises.

        Args:
            source: where the bytes come from; if it is the path of a file, its size is the room that is needed.
        """
        policy = self._find_policy()
        if policy is None or time.monotonic() < self._retry_at:
            return
        size = _measure_source(source)
        try:
            if self._find_gauge().is_disk_short(policy.limits, size):
                self._make(policy, None, size)
        except CacheError as error:
            self._warn(str(error))

    def keep_limits(self, names: Collection[Name] = ()) -> None:
        """Remove images until the cache is within its limits.

        This runs after images were acknowledged, so it raises nothing. If another process prunes, it returns at once:
        that process looks again when it is done.

        Args:
            names: the images that were acknowledged, which stay.
        """
        policy = self._find_policy()
        if policy is None or time.monotonic() < self._retry_at:
            return
        try:
            with os_errors("make a lock file"):
                self._keep_limits(policy, names)
        except CacheError as error:
            self._warn(str(error))

    def _find_policy(self) -> Policy | None:
        """Return the policy if it has limits; log a warning once if it is invalid."""
        if not self._is_enabled or self._database.read_only:
            return None
        identity: tuple[int, ...]
        try:
            found = os.stat(self._policy_file)
            identity = found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        except FileNotFoundError:
            return None
        except OSError:
            identity = ()  # the read below raises the error
        if identity != self._known[0]:
            self._known = identity, self._load_policy()
            self._retry_at = 0.0
        return self._known[1]

    def _load_policy(self) -> Policy | None:
        from cachedb.operations.policy_file import load_policy

        try:
            policy = load_policy(self._database.directory)
        except CacheError as error:
            LOG.warning("cannot prune automatically: %s", error)
            return None
        limits = policy.limits
        if limits.max_size is limits.min_free is None:
            return None
        # Even without `min-free`, the incoming bytes must fit on the disk.
        return policy._replace(limits=limits._replace(min_free=limits.min_free or 0))

    def _find_gauge(self) -> Gauge:
        from cachedb.operations.gauge import Gauge

        if self._gauge is None:
            self._gauge = Gauge(self._database)
        return self._gauge

    def _keep_limits(self, policy: Policy, names: Collection[Name]) -> None:
        from cachedb.operations.plan import explain_unmet
        from cachedb.operations.prune import CLAIM_KEY

        gauge, directory = self._find_gauge(), self._database.directory
        while gauge.may_be_short(policy.limits):
            with single_flight.try_claim(directory, CLAIM_KEY, is_working=lambda: True) as has_claim:
                if not has_claim:
                    return
                if is_short := gauge.is_short(policy.limits):
                    made = self._plan(policy, 0, names)
                    pruned = self._remove(made)
                    if made.unmet_size:
                        self._warn(explain_unmet(made.unmet_size, made.kept_sizes))
                        return
                    if not (pruned.images or pruned.skipped or pruned.garbage.blobs):
                        return
            # Look again without the claim: another process may have stored an image, and found the claim taken.
            if not is_short and not gauge.is_short(policy.limits):
                return

    def _make(self, policy: Policy, name: Name | None, size: int) -> None:
        from cachedb.operations.prune import claim

        gauge, directory = self._find_gauge(), self._database.directory

        def find() -> bool | None:
            return None if gauge.is_short(policy.limits, size) else True

        while True:
            with claim(self._database, find) as has_room:
                if has_room:
                    return
                made = self._plan(policy, size)
                if made.unmet_size:
                    raise _no_room_error(directory, policy, name, size, made)
                pruned = self._remove(made)
            if pruned.freed_size >= made.freed_size:
                return

    def _plan(self, policy: Policy, size: int, names: Collection[Name] = ()) -> Plan:
        """Plan what to remove: down to ``down-to`` if that is possible, else down to the limits."""
        from cachedb.operations.plan import make_plan

        self._uses.write()

        def plan(down_to: float) -> Plan:
            wanted = policy._replace(limits=policy.limits._replace(down_to=down_to))
            return self._database.reserve.run(
                lambda: make_plan(self._database, wanted, incoming_size=size, spared=names)
            )

        made = at_low_priority(lambda: plan(policy.limits.down_to))
        return at_low_priority(lambda: plan(1.0)) if made.unmet_size and policy.limits.down_to < 1 else made

    def _remove(self, made: Plan) -> Pruned:
        from cachedb.operations.prune import remove_planned

        # Keep the caller's priority here, because other processes wait for the write lock of a batch.
        pruned = remove_planned(self._database, made)
        count, size = len(pruned.images), pruned.freed_size + pruned.garbage.bytes
        if count or size:
            LOG.info("pruned %s, %s", format_count(count, "image"), format_size(size), extra={"pruned": True})
        return pruned

    def _warn(self, reason: str) -> None:
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        LOG.warning("cannot prune automatically: %s", reason)


def _measure_source(source: object) -> int:
    """Return the bytes of the file at a path; 0 for anything else."""
    if isinstance(source, Path):
        with ignore_os_errors():
            found = source.stat()
            return found.st_size if stat.S_ISREG(found.st_mode) else 0
    return 0


def _no_room_error(directory: Path, policy: Policy, name: Name | None, size: int, made: Plan) -> NoRoom:
    from cachedb.operations.plan import explain_unmet

    what, limit = f"{name or 'the import'} needs {format_size(size)}", policy.limits.max_size
    if limit is not None and size > limit:
        return NoRoom(f"{what}, more than max-size in {POLICY_FILE}: raise the limit")
    # A partial download that no process continues stays for a day. So a retry helps only if downloads are running.
    passing_size = sum(made.kept_sizes.get(kind, 0) for kind in ("partial downloads", "in use"))
    may_help = made.unmet_size <= passing_size and downloads.are_running(directory)
    advice = "; or retry when the other pulls, which are running now, have ended" if may_help else ""
    return NoRoom(f"{what}: {explain_unmet(made.unmet_size, made.kept_sizes)}{advice}")
