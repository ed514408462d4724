"""List the processes that use a cache, from its lock files, without locking or changing anything."""

from __future__ import annotations

import os
import pwd
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from cachedb.content.session import list_sessions_with_locks, lock_path
from cachedb.disk import lock_holders, locks, single_flight, turns
from cachedb.disk.existence import exists
from cachedb.disk.lock_holders import Process
from cachedb.disk.regular import open_regular
from cachedb.errors import os_errors

__all__ = ["Activity", "SessionInfo", "list_sessions"]


_KINDS = {"blob ": "download", "pull ": "pull"}  # the kind of activity, by the prefix of a claim's key


class Activity(NamedTuple):
    """Something a process is doing or waiting for."""

    kind: str  # write, wait, download, pull or produce
    name: str  # the digest or name that is downloaded, pulled or produced
    since: datetime  # UTC


class SessionInfo(NamedTuple):
    """A process that uses the cache, or one of its sessions; its first session has all its activities."""

    id: str | None  # None for a process without a session
    pid: int | None  # None for a process of an older release, or outside our PID namespace
    user: str | None
    command: str | None
    started_at: datetime  # UTC: when the session or the first activity began
    doing: list[Activity]


def list_sessions(directory: Path) -> list[SessionInfo]:
    """Return the processes that have a session or an activity, oldest first.

    Args:
        directory: the cache directory; if it has no ``locks/``, the result is empty.
    """
    if not exists(directory / "locks"):
        return []
    with os_errors("read the locks"):
        live_sessions = _list_live_sessions(directory)
        rest = _list_activities(directory)
    found = []
    for process, session, since in live_sessions:
        own = [activity for owner, activity in rest if process is not None and owner == process]
        rest = [(owner, activity) for owner, activity in rest if process is None or owner != process]
        found.append(_make_info(session, process, since, own))
    without_session: dict[Process | None, list[Activity]] = {}
    for owner, activity in rest:
        without_session.setdefault(owner, []).append(activity)
    for owner, activities in without_session.items():
        found.append(_make_info(None, owner, min(activity.since for activity in activities), activities))
    return sorted(found, key=lambda info: info.started_at)


def _list_live_sessions(directory: Path) -> list[tuple[Process | None, str, datetime]]:
    """Return the process, the id and the start of each live session."""
    found = []
    for session in sorted(list_sessions_with_locks(directory)):
        path = lock_path(directory, session)
        with suppress(FileNotFoundError):
            since = _to_utc(path.stat().st_mtime)
            if locks.is_held(path):
                found.append((_read_owner(path), session, since))
    return found


def _read_owner(path: Path) -> Process | None:
    file = open_regular(path, os.O_RDONLY)
    try:
        record = lock_holders.read_record(file)
    finally:
        os.close(file)
    return record and record[0]


def _list_activities(directory: Path) -> list[tuple[Process | None, Activity]]:
    """Return the current activities, each with its process."""
    found: list[tuple[Process | None, Activity]] = []
    lock = directory / "locks" / "write.lock"
    with suppress(FileNotFoundError):
        since = lock.stat().st_mtime
        if locks.is_held(lock):
            found.append((locks.find_holder_at(lock), Activity("write", "", _to_utc(since))))
    for waiter in turns.find_waiters(lock):
        found.append((waiter.process, Activity("wait", "for the write lock", _to_utc(waiter.since))))
    for claim in single_flight.list_claims(directory):
        kind = next((kind for prefix, kind in _KINDS.items() if claim.key.startswith(prefix)), "produce")
        name = claim.key if kind == "produce" else claim.key.partition(" ")[2]
        found.append((claim.process, Activity(kind, name, _to_utc(claim.since))))
    return found


def _make_info(session: str | None, process: Process | None, since: datetime, doing: list[Activity]) -> SessionInfo:
    if process is None:
        pid = session.partition("-")[0] if session else ""
        return SessionInfo(session, int(pid) if pid.isdecimal() else None, None, None, since, doing)
    user = str(process.uid)
    with suppress(KeyError):
        user = pwd.getpwuid(process.uid).pw_name
    process = process.with_our_pid()
    return SessionInfo(session, process.pid if process.has_our_pids else None, user, process.command, since, doing)


def _to_utc(seconds: float) -> datetime:
    with suppress(OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(seconds, UTC)
    return datetime.fromtimestamp(time.time(), UTC)
