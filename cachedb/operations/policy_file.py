"""Read and write the file ``policy.toml`` of a cache."""

from __future__ import annotations

import os
from pathlib import Path

from cachedb.disk.durable import atomic_file, remove_leftovers
from cachedb.disk.folders import Folders, apply_folder_mode
from cachedb.disk.layout import POLICY_FILE
from cachedb.disk.regular import open_regular
from cachedb.disk.writer import write_all
from cachedb.errors import InvalidPolicy, os_errors
from cachedb.index.sqlite.database import Database
from cachedb.operations.policy import Policy, check_policy, parse_policy

__all__ = ["install_policy", "load_policy", "read_policy"]


_MAX_BYTES = 64 * 1024  # of a policy; a larger file is refused


def load_policy(directory: Path) -> Policy:
    """Return the policy of a cache; an empty one if there is no ``policy.toml``.

    Raises:
        InvalidPolicy: if it is invalid.
        StorageError: if it cannot be read, or is not a regular file.
    """
    text = read_policy(directory)
    return Policy() if text is None else parse_policy(text)


def read_policy(directory: Path) -> str | None:
    """Return the text of a cache's policy; None if there is none.

    Raises:
        InvalidPolicy: if the file is larger than a policy, or not UTF-8.
        StorageError: if it cannot be read, or is not a regular file.
    """
    with os_errors("read the policy"):
        try:
            with open(directory / POLICY_FILE, "rb", opener=open_regular) as file:
                data = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return None
    if len(data) > _MAX_BYTES:
        raise InvalidPolicy(f"{POLICY_FILE} has over {_MAX_BYTES} bytes: shorten it")
    try:
        return data.decode("utf-8-sig")  # skip an editor's byte order mark
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidPolicy(f"{POLICY_FILE}, line {line}: it is not UTF-8: save it in UTF-8", line=line) from None


def install_policy(database: Database, text: str) -> Policy:
    """Check a policy, and make it that of the cache, durably.

    Raises:
        InvalidPolicy: if it is invalid; the policy of the cache then stays.
        StorageError: if it cannot be written.
    """
    policy, data = check_policy(database, text), text.encode()
    if len(data) > _MAX_BYTES:
        raise InvalidPolicy(f"the policy has over {_MAX_BYTES} bytes: shorten it")
    # A full disk is a reason to change the policy, so the reserve has room for it.
    database.reserve.run(lambda: _write_policy(database.folders, data))
    return policy


def _write_policy(folders: Folders, data: bytes) -> None:
    with os_errors("write the policy"):
        folders.check()
        remove_leftovers(folders.directory)
        with atomic_file(folders.directory / POLICY_FILE) as file:
            write_all(file, data)
            apply_folder_mode(file.fileno(), folders.status)
        os.fsync(folders.root)
