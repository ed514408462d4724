"""Tell a missing file from one that cannot be looked at.

`Path.exists` returns False for both since Python 3.14. A cache without permission would look like a lost one.
"""

from __future__ import annotations

import errno
import os

__all__ = ["exists"]


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether a path leads to a file or a folder.

    Raises:
        OSError: if that cannot be told, for example without permission for a folder.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
    return True
