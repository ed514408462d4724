"""The command line: parse, call one `Cache` method, print."""

from cachedb.cli.main import cli

__all__ = ["cli"]
