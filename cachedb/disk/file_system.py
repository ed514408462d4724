"""Find the file system of a directory, and check whether it can hold a cache."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
from contextlib import ExitStack, suppress
from pathlib import Path

from cachedb.disk.byte_locks import lock_bytes
from cachedb.errors import StorageError

__all__ = ["check_features", "explain_shared", "find_file_system_type"]


_MOUNTS = Path("/proc/self/mountinfo")
_SHARED = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|kafs|ncpfs|coda|ceph|lustre|gfs2?|ocfs2|gpfs|beegfs|orangefs|pvfs2|vboxsf|prl_fs"
    r"|fuse\.(sshfs|s3fs|goofys|gcsfuse|rclone|glusterfs|ceph|ceph-fuse|curlftpfs|davfs|moosefs|mfs|juicefs|vmhgfs-fuse)"
    r"|vmhgfs|davfs"
    # Shared between a virtual machine and its host, as by Docker Desktop and WSL.
    r"|virtiofs|fakeowner|drvfs|fuse\.(osxfs|grpcfuse)"
    # Of clusters.
    r"|wekafs|panfs|fhgfs|beegfs_nodev|mmfs|cvfs|acfs|scoutfs|quobyte"
    r"|fuse\.(quobyte|daos|seaweedfs|lizardfs|cephfs|alluxio-fuse|goosefs-fuse|jindofs-fuse|cvmfs2?|fuse_dfs)"
    # Of object stores and file servers.
    r"|fuse\.(blobfuse2?|mountpoint-s3|geesefs|ossfs2?|davfs2|smbnetfs|gvfsd-fuse|kio-fuse|onedriver|drivefs)"
)
_PAGE = mmap.PAGESIZE


def find_file_system_type(directory: Path) -> str | None:
    """Return the kernel's name for the type of a directory's file system, or None if it is unknown.

    A FUSE program may have no type of its own. Then its source names it, if it is a shared one: ``fuse mountpoint-s3``
    becomes ``fuse.mountpoint-s3``, and ``fuse mfs#master:9421`` becomes ``fuse.mfs``.
    """
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    path = os.path.realpath(directory)
    found, longest = None, -1
    for mount in mounts:
        # proc_pid_mountinfo(5): ID parent device root MOUNT-POINT options [tags] - TYPE source options
        left, divided, right = mount.partition(" - ")
        fields = left.split(" ")
        if not divided or len(fields) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), fields[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # If two file systems are mounted on one point, the later one hides the earlier.
        if inside and len(point) >= longest:
            kind, source = (*right.split(" "), "")[:2]
            subtype = source.partition("#")[0]
            named = kind == "fuse" and _SHARED.fullmatch(f"fuse.{subtype}")
            found, longest = f"fuse.{subtype}" if named else kind, len(point)
    return found


def explain_shared(directory: Path) -> str | None:
    """Return the error text for a directory on a file system that hosts share; None for other ones.

    The processes of one host share SQLite's WAL through memory, and one kernel keeps their locks. Two hosts share
    neither, so they would overwrite each other's data (https://sqlite.org/wal.html, "Overview").
    """
    kind = find_file_system_type(directory)
    if kind is None or not _SHARED.fullmatch(kind):
        return None
    return (
        f"{str(directory)!r} is on {kind}, which other hosts may mount too, but SQLite's WAL works only on one host: "
        "name a directory on a local disk, with --dir or CACHEDB_DIR"
    )


def check_features(directory: Path) -> None:
    """Raise if the file system of a new cache's directory lacks a feature that a cache needs.

    A test tells more than the type does: the configuration of a FUSE program decides whether it supports locks.

    Raises:
        StorageError: if locks, shared memory, hard links or renames do not work.
        OSError: if no file can be made in the directory.
    """
    if fault := _find_fault(directory):
        kind = find_file_system_type(directory) or "a file system"
        raise StorageError(
            f"{str(directory)!r} is on {kind}, where {fault}: "
            "name a directory on a local disk, with --dir or CACHEDB_DIR"
        )


def _find_fault(directory: Path) -> str | None:
    """Return the first feature a cache needs that does not work in a directory, or None if all work."""
    # Another process may be creating this cache. It accepts these files, because their names look like SQLite's.
    name = f"{directory}/index.db-test-{secrets.token_hex(6)}"
    path, second = f"{name}.test", f"{name}-2.test"
    with ExitStack() as stack:
        for name in (path, second):
            stack.callback(_remove, name)
        ours = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, ours)
        # Write the page instead of extending the file: on a full disk a write to memory would raise a signal.
        os.pwrite(ours, bytes(_PAGE), 0)
        other = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, other)
        return (
            _find_flock_fault(ours, other)
            or _find_posix_lock_fault(ours, other)
            or _find_mmap_fault(ours, other)
            or _find_name_fault(path, second)
        )


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _find_flock_fault(ours: int, other: int) -> str | None:
    try:
        fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        return f"files cannot be locked (flock): {error.strerror}"
    return "two processes can hold one lock (flock)"


def _find_posix_lock_fault(ours: int, other: int) -> str | None:
    try:
        fcntl.lockf(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"files cannot be locked (fcntl): {error.strerror}"
    # A POSIX lock does not conflict within its process. The lock of an open file conflicts, as another process's does.
    try:
        lock_bytes(other, fcntl.F_WRLCK, 0, 0)
    except OSError:
        return None  # refused as it should be, or not supported by the kernel
    return "two processes can hold one lock (fcntl)"


def _find_mmap_fault(ours: int, other: int) -> str | None:
    try:
        with mmap.mmap(ours, _PAGE) as first, mmap.mmap(other, _PAGE) as second:
            first[:5] = b"first"
            shared = second[:5] == b"first" and os.pread(other, 5, 0) == b"first"
            os.pwrite(other, b"other", 0)
            return None if shared and first[:5] == b"other" else "processes do not share memory (mmap)"
    except OSError as error:
        return f"processes cannot share memory (mmap): {error.strerror}"


def _find_name_fault(path: str, second: str) -> str | None:
    try:
        os.link(path, second, follow_symlinks=False)
        linked = os.path.samefile(path, second)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return f"there are no hard links: {error.strerror}"
    if not linked:
        return "a hard link is another file"
    os.unlink(path)
    try:
        os.rename(second, path)
    except OSError as error:
        return f"files cannot be renamed: {error.strerror}"
    return None if os.path.exists(path) and not os.path.lexists(second) else "a renamed file keeps its old name"
