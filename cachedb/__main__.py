"""``python -m cachedb``."""

from cachedb.cli import main

main()
