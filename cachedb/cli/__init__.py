"""The command line: parse, call one `Cache` method, print."""
