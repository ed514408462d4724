"""A command of the server has the results of one that a new interpreter runs."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, running
from tests.support import make
from tests.support.command_server import CommandServer


@pytest.fixture
def both(command_server: CommandServer, directory: Path) -> Run:
    """Return a function that runs a command in both ways, asserts that the results are equal and returns them."""

    def run(*words: str, **options: Any) -> subprocess.CompletedProcess[Any]:
        options = {"capture_output": True, "timeout": 120, **options}
        assert command_server.accepts(options)
        arguments = ["--dir", str(directory), *words]
        served = command_server.run(arguments, **options)
        started = subprocess.run([sys.executable, "-m", "cachedb", *arguments], check=False, **options)
        assert served.returncode == started.returncode
        assert served.stdout == started.stdout
        assert served.stderr == started.stderr
        return served

    return run


@pytest.fixture
def archive(cachedb: Run, tmp_path: Path) -> Path:
    made = make.write(tmp_path / "app.tar", make.oci_files({"app:1": make.image(1)}))
    assert cachedb("import", made).returncode == 0
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ls", "-q"], 0),
        (["ls", "--help"], 0),
        (["rm", "none:1"], 3),
        (["rm", "--no-such"], 2),
        (["exists", "no:1"], 3),
    ],
)
def test_a_command_has_the_same_output_and_exit_code(both: Run, archive: Path, words: list[str], code: int) -> None:
    assert both(*words).returncode == code


@pytest.mark.slow
def test_a_command_reads_stdin_and_writes_bytes(both: Run, archive: Path) -> None:
    assert both("import", "-q", "-", input=archive.read_bytes()).stdout == b"app:1\n"
    with archive.open("rb") as file:
        assert both("import", "-q", "-", stdin=file).stdout == b"app:1\n"
        file.seek(0)
        assert both("import", "-q", "-", stdin=file.fileno()).returncode == 0
    assert both("import", "-q", "-", stdin=subprocess.DEVNULL).returncode == 1
    exported = both("export", "app:1", "-").stdout
    assert b"oci-layout" in exported


@pytest.mark.slow
def test_a_command_has_the_given_folder_and_environment(both: Run, archive: Path) -> None:
    assert both("import", "-q", archive.name, cwd=archive.parent).returncode == 0
    assert both("import", "-q", archive.name, cwd="/").returncode == 1
    narrow = both("ls", "--help", text=True, env={**os.environ, "COLUMNS": "40"}).stdout
    assert narrow != both("ls", "--help", text=True, env={**os.environ, "COLUMNS": "100"}).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "import sys; print(sys.argv, __name__)",
        "import sys; sys.exit(3)",
        "import threading; threading.Timer(0.1, print, ['at the end']).start()",
        "from concurrent.futures import ThreadPoolExecutor; ThreadPoolExecutor(1).submit(print, 'in a pool')",
        "raise ValueError",
    ],
)
def test_a_script_has_the_same_output_and_exit_code(command_server: CommandServer, script: str) -> None:
    served = command_server.run(["A"], script=script, text=True)
    started = subprocess.run([sys.executable, "-c", script, "A"], capture_output=True, text=True, check=False)
    assert (served.returncode, served.stdout) == (started.returncode, started.stdout)
    assert served.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


@pytest.mark.slow
def test_a_program_of_the_server_ends_as_its_command(
    command_server: CommandServer, archive: Path, directory: Path, tmp_path: Path
) -> None:
    program = tmp_path / "cachedb"
    command_server.write_program(program)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(program), "--dir", str(directory), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=archive.parent, timeout=120)

    assert run("import", "-q", archive.name).stdout == "app:1\n"
    assert (run("exists", "none:1").returncode, run("rm", "none:1").stderr.count("\n")) == (3, 1)
    assert run("produce", "none:1", "--", "sh", "-c", "kill -KILL $PPID").returncode == -9


@pytest.mark.slow
def test_commands_run_at_the_same_time(command_server: CommandServer, archive: Path, directory: Path) -> None:
    arguments = ["--dir", str(directory), "ls", "-q"]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: command_server.run(arguments, text=True), range(8)))
    assert [(one.returncode, one.stdout) for one in done] == [(0, "app:1\n")] * 8


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_killed(command_server: CommandServer, archive: Path, directory: Path) -> None:
    holder = """
        import sys
        from pathlib import Path
        from cachedb.index.sqlite.database import Database
        with Database(Path(sys.argv[1])).alone():
            print("ready", flush=True)
            input()
        """
    with running(holder, directory), pytest.raises(subprocess.TimeoutExpired):
        command_server.run(["--dir", str(directory), "rm", "app:1"], timeout=0.1)
    done = command_server.run(["--dir", str(directory), "ls", "-q"], text=True)
    assert done.stdout == "app:1\n"


def test_a_command_inherits_no_descriptor_of_the_server(command_server: CommandServer) -> None:
    done = command_server.run(["produce", "none:1", "--", "sh", "-c", "ls -l /proc/$PPID/fd"], text=True)
    assert "index.db" in done.stdout + done.stderr
    assert "socket:" not in done.stdout + done.stderr


def test_what_only_a_new_interpreter_can_have_is_not_accepted(command_server: CommandServer) -> None:
    assert command_server.accepts({"env": {**os.environ, "COLUMNS": "40"}})
    assert not command_server.accepts({"env": {**os.environ, "PYTHONUTF8": "1"}})
    assert not command_server.accepts({"env": {**os.environ, "LC_ALL": "POSIX"}})
    assert not command_server.accepts({"stdout": subprocess.PIPE})
    before = os.umask(0o027)
    try:
        assert not command_server.accepts({})
    finally:
        os.umask(before)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        assert not command_server.accepts({})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert command_server.accepts({})
