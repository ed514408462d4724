"""Run ``cachedb`` or ``python -m cachedb``; on an interrupt at any time, print one line."""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line."""
    try:
        from cachedb.cli.main import main as run

        run()
    except KeyboardInterrupt:
        if sys.stderr:  # None if closed
            print("cachedb: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
