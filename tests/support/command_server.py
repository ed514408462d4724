"""Run commands and scripts in forks of a server that has imported cachedb: ten times as fast as a new interpreter.

A test of the interpreter's start, of its exit or of imports starts one instead.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Any, Final, NamedTuple, NoReturn

import cachedb
import cachedb.__main__
from tests.support import new_index
from tests.support.processes import open_process

SUPPORTED: Final = {"text", "capture_output", "timeout", "input", "env", "cwd", "stdin"}
"""The options of `subprocess.run` that the server supports."""

_START_VARIABLES: Final = ("PYTHON", "LANG", "LC_", "LD_", "MALLOC")
"""Prefixes of the environment variables that an interpreter reads when it starts."""

# What a command imports besides the package.
_IMPORTS: Final = (
    "alembic.command",
    "alembic.migration",
    "click.shell_completion",
    "difflib",
    "jinja2",
    "platformdirs",
)


class CommandServer:
    """A server process that forks for each command."""

    def __init__(self, checkout: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cachedb-server-")
        self._path = str(Path(self._folder.name) / "socket")
        self._environment = dict(os.environ)
        self._state = _inherited_state()
        code = "import sys; from tests.support.command_server import serve; serve(sys.argv[1])"
        # The server ends when this process ends, because that closes its stdin.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, self._path], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """Kill the server; commands that are running continue."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def write_program(self, path: Path) -> None:
        """Write a program that shells can run as `cachedb`. Its folder and environment are those of its process."""
        client = [sys.executable, "-I", "-S", str(Path(__file__).with_name("command_client.py")), self._path]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
        path.chmod(0o755)

    def accepts(self, options: Mapping[str, Any]) -> bool:
        """Return whether the server runs a command with these options as `subprocess.run` would."""
        environment = options.get("env") or os.environ
        changed = environment.items() ^ self._environment.items()
        if options.keys() - SUPPORTED or self._state != _inherited_state():
            return False
        return not any(name.startswith(_START_VARIABLES) for name, _ in changed)

    def run(
        self, arguments: list[str], *, script: str | None = None, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command, or a Python script; the options are those of `subprocess.run` in `SUPPORTED`."""
        data, text = options.get("input"), options.get("text", False)
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            with tempfile.TemporaryFile() as input_file:
                stdin: Any = options.get("stdin")
                if data is not None:
                    input_file.write(data.encode() if text else data)
                    input_file.seek(0)
                    stdin = input_file
                fileno = 0 if stdin is None else stdin if isinstance(stdin, int) else stdin.fileno()
                if fileno == subprocess.DEVNULL:
                    fileno = os.open(os.devnull, os.O_RDONLY)
                files = [fileno, output.fileno(), errors.fileno()]
                code = self._run(arguments, script, files, options)
            printed = []
            for file in (output, errors):
                file.seek(0)
                printed.append(file.read())
        decoded = [part.decode() if text else part for part in printed]
        return subprocess.CompletedProcess(["cachedb", *arguments], code, *decoded)

    def _run(self, arguments: list[str], script: str | None, files: list[int], options: Mapping[str, Any]) -> int:
        request = {
            "arguments": arguments,
            "script": script,
            "cwd": str(options.get("cwd") or Path.cwd()),
            "environment": dict(options.get("env") or os.environ),
        }
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(self._path)
            socket.send_fds(connection, [b"x"], files)
            with connection.makefile("rw") as stream:
                stream.write(json.dumps(request) + "\n")
                stream.flush()
                pid = int(stream.readline())
                connection.settimeout(options.get("timeout", 120))
                try:
                    return os.waitstatus_to_exitcode(int(stream.readline()))
                except TimeoutError:
                    os.kill(pid, signal.SIGKILL)
                    raise subprocess.TimeoutExpired(arguments, options.get("timeout", 120)) from None


def _inherited_state() -> list[object]:
    """Return the state that a child inherits besides its environment and files."""
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    mounts = os.readlink("/proc/self/ns/mnt")
    return [*limits, mounts, os.geteuid(), os.getegid(), os.getgroups(), signal.getsignal(signal.SIGINT), _umask()]


def _umask() -> str:
    status = Path("/proc/self/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("Umask:"))


def serve(path: str) -> NoReturn:
    """Import all modules, listen at a socket, and fork for each connection until stdin is closed."""
    for name in _IMPORTS:
        import_module(name)
    for module in walk_packages(cachedb.__path__, "cachedb."):
        import_module(module.name)
    new_index.install()
    new_index.statements_of_schema()  # once, and not in each fork
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening, selectors.DefaultSelector() as selector:
        listening.bind(path)
        listening.listen(64)
        selector.register(listening, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    os._exit(0)
                elif key.fileobj is listening:
                    started = _start_command(listening.accept()[0])
                    selector.register(open_process(started.pid), selectors.EVENT_READ, started)
                else:
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    _, status = os.waitpid(key.data.pid, 0)
                    _send(key.data.connection, status)
                    key.data.connection.close()


class _Started(NamedTuple):
    """A command that was started for a connection."""

    pid: int
    connection: socket.socket


def _start_command(connection: socket.socket) -> _Started:
    """Fork the command that a connection requests, and send its process ID."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as stream:
        request = json.loads(stream.readline())
    if (child := os.fork()) == 0:
        _run_command(request, files)
    for file in files:
        os.close(file)
    _send(connection, child)
    return _Started(child, connection)


def _send(connection: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # the test waits no longer
        connection.sendall(f"{number}\n".encode())


def _run_command(request: dict[str, Any], files: list[int]) -> NoReturn:
    """Run the command line or the script in this process, as a new interpreter does, and exit."""
    assert threading.active_count() == 1
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # as subprocess does
    script = request.get("script")
    sys.argv = ["-c" if script else str(Path(sys.prefix) / "cachedb"), *request["arguments"]]
    code: object = 0
    try:
        _run_script(script) if script else cachedb.__main__.main()
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _run_script(script: str) -> None:
    new_index.install(copies=False)
    main = sys.modules["__main__"] = ModuleType("__main__")
    try:
        exec(compile(script, "<string>", "exec"), vars(main))
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    threading._shutdown()  # type: ignore[attr-defined] # as an interpreter waits for threads and ends pools
