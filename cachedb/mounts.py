"""The file system that a directory is on, and whether a cache can live there."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["file_system", "refuse_shared"]

_MOUNTS = Path("/proc/self/mountinfo")
_SHARED = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|kafs|ncpfs|coda|ceph|lustre|gfs2?|ocfs2|gpfs|beegfs|orangefs|pvfs2|vboxsf|prl_fs"
    r"|fuse\.(sshfs|s3fs|goofys|gcsfuse|rclone|glusterfs|ceph|ceph-fuse|curlftpfs|davfs|moosefs|mfs|juicefs|vmhgfs-fuse)"
    r"|vmhgfs|davfs"
)


def file_system(directory: Path) -> str | None:
    """Return the type of the file system that a directory is on, as the kernel calls it, or None."""
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
            found, longest = right.split(" ")[0], len(point)
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
