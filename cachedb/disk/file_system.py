"""The file system that a directory is on, and whether a cache can live there."""

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

__all__ = ["file_system", "refuse_shared", "refuse_unable"]


_MOUNTS = Path("/proc/self/mountinfo")
_SHARED = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|kafs|ncpfs|coda|ceph|lustre|gfs2?|ocfs2|gpfs|beegfs|orangefs|pvfs2|vboxsf|prl_fs"
    r"|fuse\.(sshfs|s3fs|goofys|gcsfuse|rclone|glusterfs|ceph|ceph-fuse|curlftpfs|davfs|moosefs|mfs|juicefs|vmhgfs-fuse)"
    r"|vmhgfs|davfs"
    # Between a virtual machine and its host, as Docker Desktop and WSL have it.
    r"|virtiofs|fakeowner|drvfs|fuse\.(osxfs|grpcfuse)"
    # Clusters.
    r"|wekafs|panfs|fhgfs|beegfs_nodev|mmfs|cvfs|acfs|scoutfs|quobyte"
    r"|fuse\.(quobyte|daos|seaweedfs|lizardfs|cephfs|alluxio-fuse|goosefs-fuse|jindofs-fuse|cvmfs2?|fuse_dfs)"
    # Buckets and servers.
    r"|fuse\.(blobfuse2?|mountpoint-s3|geesefs|ossfs2?|davfs2|smbnetfs|gvfsd-fuse|kio-fuse|onedriver|drivefs)"
)
_PAGE = mmap.PAGESIZE


def file_system(directory: Path) -> str | None:
    """Return the type of the file system that a directory is on, as the kernel calls it, or None.

    A FUSE program that gives no type of its own is told by its source: ``fuse mountpoint-s3`` is
    ``fuse.mountpoint-s3``, and ``fuse mfs#master:9421`` is ``fuse.mfs``.
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
        # Of two at one place, the later one covers the earlier.
        if inside and len(point) >= longest:
            kind, source = (*right.split(" "), "")[:2]
            subtype = source.partition("#")[0]
            named = kind == "fuse" and _SHARED.fullmatch(f"fuse.{subtype}")
            found, longest = f"fuse.{subtype}" if named else kind, len(point)
    return found


def refuse_shared(directory: Path) -> str | None:
    """Return why a cache must not be in a directory: a file system that hosts share; None where it may be.

    The processes of one host share SQLite's WAL through memory, and find each other's locks in one kernel. On another
    host neither is so: two hosts would write over one another (https://sqlite.org/wal.html, "Overview").
    """
    kind = file_system(directory)
    if kind is None or not _SHARED.fullmatch(kind):
        return None
    return (
        f"{str(directory)!r} is on {kind}, which other hosts may mount too, and SQLite's WAL is for the processes of "
        "one host: name a directory on a local disk, with --dir or CACHEDB_DIR"
    )


def refuse_unable(directory: Path) -> None:
    """Raise if the file system of a new cache's directory cannot do what a cache needs.

    This tells more than a name does: a FUSE program may pass locks on or not, as it is configured.

    Raises:
        StorageError: if a lock does not keep two out, memory is not shared, or hard links or renames do not work.
        OSError: if no file can be made there.
    """
    if inability := _find_inability(directory):
        kind = file_system(directory) or "a file system"
        raise StorageError(
            f"{str(directory)!r} is on {kind}, where {inability}: "
            "name a directory on a local disk, with --dir or CACHEDB_DIR"
        )


def _find_inability(directory: Path) -> str | None:
    """Return what a cache needs and files in a directory cannot do, or None if they can do all of it."""
    # The names look like those of SQLite: whoever makes the same cache beside us takes them for the index's.
    name = f"{directory}/index.db-test-{secrets.token_hex(6)}"
    path, second = f"{name}.test", f"{name}-2.test"
    with ExitStack() as stack:
        for name in (path, second):
            stack.callback(_remove, name)
        ours = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, ours)
        # Written, and not only extended: a full disk is an error here, and a signal where memory is written to.
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
    return "two can hold one lock (flock)"


def _find_posix_lock_fault(ours: int, other: int) -> str | None:
    try:
        fcntl.lockf(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return f"files cannot be locked (fcntl): {error.strerror}"
    # A process does not lock itself out. The lock of an open file has another owner, as another process's has.
    try:
        lock_bytes(other, fcntl.F_WRLCK, 0, 0)
    except OSError:
        return None  # refused; or a kernel that does not know such locks, which tells nothing
    return "two can hold one lock (fcntl)"


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
        os.link(path, second)
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
    return None if os.path.exists(path) and not os.path.lexists(second) else "a renamed file keeps its name"
