"""Run the command line; each command parses, calls one `Cache` method, and prints."""

from cachedb.cli.main import cli

__all__ = ["cli"]
