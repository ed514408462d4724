"""The command line as a process: output, exit codes, errors of one line, completion, signals."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cachedb import Cache
from cachedb.cli.main import cli
from tests.conftest import Run, files_of, snapshot
from tests.support import make
from tests.support.waiting import wait_until

MADE = make.image(1, 2, compression="gzip")
IMAGE_KEYS = [
    "name", "repository", "reference", "digest", "media_type", "size", "complete", "added_at", "last_used_at",
    "architecture", "os", "variant", "created", "author", "pinned", "expires_at", "platform", "created_at",
]  # fmt: skip
BLOB_KEYS = [
    "digest", "size", "role", "media_type", "position", "stored", "compressed", "path", "diff_id", "created_by",
]  # fmt: skip


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return make.write(tmp_path / "app.tar", make.oci_files({"app:1": MADE}))


@pytest.mark.slow
@pytest.mark.parametrize("value", ["abc", "-1", "nan"])
def test_an_invalid_wait_is_reported_under_the_name_of_its_source(cachedb: Run, directory: Path, value: str) -> None:
    Cache.open(directory).close()
    done = cachedb("ls", env={**os.environ, "CACHEDB_WAIT": value})
    error = f"cachedb: CACHEDB_WAIT is {value!r}: give a number of seconds, 0 or more, or inf\n"
    assert (done.returncode, done.stderr) == (1, error)
    done = cachedb("--wait", "-1", "ls", env={**os.environ, "CACHEDB_WAIT": value})
    assert (done.returncode, "'--wait'" in done.stderr) == (2, True)
    assert cachedb("--wait", "2", "ls", env={**os.environ, "CACHEDB_WAIT": value}).returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_an_image_is_imported_listed_shown_and_removed(cachedb: Run, archive: Path, directory: Path) -> None:
    imported = cachedb("import", archive, "--format", "json")
    assert (imported.returncode, imported.stderr) == (0, "")
    (image,) = json.loads(imported.stdout)
    assert image.pop("replaced") is None
    assert list(image) == IMAGE_KEYS
    assert (image["repository"], image["reference"], image["complete"]) == ("app", "1", True)
    assert image["digest"] == MADE.digest
    assert image["size"] == sum(map(len, MADE.blobs.values()))
    for key in ("added_at", "last_used_at"):
        assert image[key].endswith("Z")
        assert datetime.fromisoformat(image[key]).utcoffset() == timedelta(0)
    assert json.loads(cachedb("ls", "--format", "json").stdout) == [image]
    assert cachedb("ls", "-q").stdout == "app:1\n"

    shown = json.loads(cachedb("show", "app:1", "--format", "json").stdout)
    assert list(shown) == [*IMAGE_KEYS, "labels", "platforms", "blobs"]
    assert [list(blob) for blob in shown["blobs"]] == [BLOB_KEYS] * 4
    assert [Path(blob["path"]).read_bytes() for blob in shown["blobs"]] == list(MADE.blobs.values())
    assert cachedb("show", "-q", "app:1").stdout.split() == list(MADE.blobs)
    assert cachedb("manifest", "app:1").stdout.encode() == MADE.manifest

    stats = json.loads(cachedb("stats", "--format", "json").stdout)
    assert (stats["manifest_count"], stats["blob_count"], stats["total_size"]) == (1, 4, image["size"])
    removed = {"blobs": 4, "size": image["size"], "bytes": image["size"], "images": [{"name": "app:1"}]}
    assert cachedb("rm", "--format", "json", "app:1").stdout == json.dumps(removed, indent=2) + "\n"
    assert files_of(directory) == {}


@pytest.mark.slow
def test_the_default_output_is_a_readable_table(cachedb: Run, archive: Path) -> None:
    assert "app:1" in cachedb("import", archive).stdout
    heading, row = cachedb("ls").stdout.splitlines()
    assert heading.split() == ["NAME", "DIGEST", "SIZE", "CREATED", "ADDED", "STATE"]
    assert re.fullmatch(r"app:1  sha256:[0-9a-f]{12}  [0-9.]+ kB  -        just now  complete", row)
    shown = cachedb("show", "app:1").stdout
    assert shown.count("sha256:") == 5
    assert "config" in shown
    assert "images" in cachedb("stats").stdout
    assert cachedb("gc").stdout == "freed 0 blobs, 0 B\n"
    assert re.fullmatch(
        r"would remove app:1\nwould free 4 blobs, [0-9.]+ kB\n", cachedb("rm", "--dry-run", "app:1").stdout
    )
    assert re.fullmatch(r"freed 4 blobs, [0-9.]+ kB\n", cachedb("rm", "app:1").stdout)


def run_on_terminal(command: list[str], keep: str = "stdout") -> str:
    """Run a command with stdout or stderr on a terminal, and return its output there."""
    master, slave = pty.openpty()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, keep: slave}
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, env=environment, **streams)  # type: ignore[call-overload]
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.wait() == 0
    return shown.decode()


@pytest.mark.slow
def test_a_terminal_shows_tables_and_progress_bars(archive: Path, directory: Path) -> None:
    command = [sys.executable, "-m", "cachedb", "--dir", str(directory)]
    assert "importing" in run_on_terminal([*command, "import", str(archive)], keep="stderr")
    assert "app:1" in run_on_terminal([*command, "ls"])
    exported = str(directory.parent / "out.tar")
    assert "exporting" in run_on_terminal([*command, "export", "app:1", exported], keep="stderr")
    assert run_on_terminal([*command, "import", "-q", str(archive)], keep="stderr") == ""


@pytest.mark.slow
def test_an_image_is_imported_and_exported_through_pipes(cachedb: Run, archive: Path) -> None:
    with archive.open("rb") as file:
        assert cachedb("import", "-", "copy:2", "-q", stdin=file).stdout == "copy:2\n"
    piped = cachedb("import", "-", "piped", "-q", input=archive.read_bytes(), text=False)
    assert piped.stdout == b"piped:latest\n"
    exported = cachedb("export", "copy:2", "-", text=False)
    assert exported.returncode == 0
    again = cachedb("import", "-", "again", "--format", "json", input=exported.stdout, text=False)
    assert json.loads(again.stdout)[0]["digest"] == MADE.digest


@pytest.mark.slow
def test_a_blob_is_added_read_and_found(cachedb: Run, tmp_path: Path) -> None:
    data = b"\x00binary\xff"
    file = tmp_path / "data"
    file.write_bytes(data)
    digest = make.digest_of(data)
    assert cachedb("blob", "add", file).stdout == f"{digest}\n"
    assert cachedb("blob", "add", "--digest", make.hex_of(data), file).stdout == f"{digest}\n"
    assert cachedb("blob", "add", "-", input=data, text=False).stdout == f"{digest}\n".encode()
    sha512 = cachedb("blob", "add", "--algorithm", "sha512", file).stdout.strip()
    assert sha512 == make.digest_of(data, "sha512")
    assert cachedb("blob", "cat", digest, text=False).stdout == data
    assert Path(cachedb("blob", "path", digest).stdout.strip()).read_bytes() == data
    assert cachedb("exists", digest).returncode == 0
    wrong = cachedb("blob", "add", "--digest", "0" * 64, file)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1)


@pytest.mark.slow
def test_a_tag_is_listed_and_removed_as_a_second_name(cachedb: Run, archive: Path) -> None:
    cachedb("import", archive)
    assert cachedb("tag", "app:1", "app:stable").returncode == 0
    assert cachedb("ls", "-q").stdout == "app:1\napp:stable\n"
    assert cachedb("rm", "-q", "app:1", "app:stable").stdout == "app:1\napp:stable\n"


ABSENT = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "nope"], 3),
        (["rm", "nope"], 3),
        (["manifest", "nope:1"], 3),
        (["export", "nope", "out.tar"], 3),
        (["tag", "nope", "other"], 3),
        (["blob", "cat", ABSENT], 3),
        (["blob", "path", ABSENT], 3),
        (["show", "Upper"], 2),
        (["show", "a b"], 2),
        (["show", "a\nb"], 2),
        (["show", "a:" + "b" * 300], 2),
        (["show", "a" * 300], 2),
        (["blob", "cat", "sha256:../../etc/passwd"], 2),
        (["show"], 2),
        (["frobnicate"], 2),
        (["ls", "--format", "xml"], 2),
        (["ls", "--nope"], 2),
        (["export", "--link", "app", "out.tar"], 2),
        (["export", "--format", "oci-dir", "app", "-"], 2),
        (["import", "/does/not/exist"], 1),
        (["import", "/dev/null"], 1),
        (["blob", "add", "/does/not/exist"], 1),
    ],
)
@pytest.mark.usefixtures("cache")
def test_an_error_is_one_line_and_has_its_exit_code(cachedb: Run, arguments: list[str], code: int) -> None:
    result = cachedb(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert re.fullmatch(r"cachedb: .+\n", result.stderr), result.stderr


def test_exists_refuses_an_invalid_name_also_without_a_cache(cachedb: Run, directory: Path) -> None:
    for name in ("No Name", "app:*"):
        done = cachedb("exists", name)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is not a name" in done.stderr
    assert cachedb("exists", "app@sha256:0123456789ab").returncode == 3
    assert not directory.exists()


@pytest.mark.slow
def test_exists_exits_with_3_if_the_image_is_absent_or_incomplete(cachedb: Run, archive: Path, directory: Path) -> None:
    assert cachedb("exists", "app:1").returncode == 3
    assert cachedb("exists", ABSENT).returncode == 3
    cachedb("import", archive)
    assert cachedb("exists", "app:1").returncode == 0
    with Cache.open(directory) as cache:
        cache.save_manifest("part", make.image(9).manifest)
    assert cachedb("exists", "part").returncode == 3
    assert cachedb("exists", "No Name").returncode == 2


@pytest.mark.usefixtures("cache")
def test_control_characters_in_an_archive_do_not_reach_the_terminal(cachedb: Run, tmp_path: Path) -> None:
    evil = make.write(tmp_path / "evil.tar", make.docker_files({"a\x1b[31m\nb": make.image(1)}))
    result = cachedb("import", evil)
    assert result.returncode == 1
    assert "\x1b" not in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("what", ["a file", "a foreign database", "foreign files", "proc"])
def test_a_directory_that_is_not_a_cache_is_refused_and_stays_unchanged(
    cachedb: Run, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "other"
    if what == "a file":
        path.write_text("x")
    elif what == "a foreign database":
        path.mkdir()
        subprocess.run(
            [sys.executable, "-c", "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('CREATE TABLE t (x)')",
             str(path / "index.db")], check=True,
        )  # fmt: skip
    elif what == "foreign files":
        path.mkdir()
        (path / "thesis.tex").write_text("x")
    else:
        path = Path("/proc/cachedb")
    before = sorted(path.rglob("*"))
    for command in ("init", "ls"):
        result = cachedb("--dir", path, command)
        assert (result.stdout, result.stderr.count("\n")) == ("", 1)
        assert result.returncode == (3 if command == "ls" and what in ("a file", "proc") else 1)
    assert sorted(path.rglob("*")) == before


@pytest.mark.slow
def test_the_directory_comes_from_the_option_the_environment_or_the_platform(tmp_path: Path, archive: Path) -> None:
    base = [sys.executable, "-m", "cachedb"]
    plain = {key: value for key, value in os.environ.items() if key != "CACHEDB_DIR"}
    home = {**plain, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path)}
    subprocess.run([*base, "import", str(archive)], env=home, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "xdg" / "cachedb" / "index.db").is_file()
    named = {**home, "CACHEDB_DIR": str(tmp_path / "named")}
    subprocess.run([*base, "init"], env=named, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "named" / "index.db").is_file()
    subprocess.run([*base, "--dir", str(tmp_path / "given"), "init"], env=named, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "given" / "index.db").is_file()
    assert (tmp_path / "given").stat().st_mode & 0o777 == 0o700


def find_commands(command: click.Command, path: tuple[str, ...] = ()) -> list[str]:
    """Return the paths of a command and of all commands in it; the root command's path is empty."""
    found = [" ".join(path)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            found += find_commands(child, (*path, name))
    return found


COMMANDS = find_commands(cli)
WITHOUT_EXAMPLE = {"blob", "db", "systemd"}  # their commands have examples


def test_commands_are_found_in_groups_too() -> None:
    assert {"", "import", "ls", "db", "db upgrade", "blob cat"} <= set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_help_and_all_but_three_groups_an_example(path: str) -> None:
    result = CliRunner().invoke(cli, [*path.split(), "--help"], prog_name="cachedb")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: {' '.join(['cachedb', *path.split()])} [OPTIONS]")
    assert ("Examples:" in result.output) == (path not in WITHOUT_EXAMPLE)


def test_help_imports_no_slow_modules() -> None:
    code = "import sys; from cachedb.cli.main import cli; print([m for m in sys.modules if m.partition('.')[0] in %r])"
    slow = {"sqlalchemy", "alembic", "rich", "sqlite3", "tarfile", "platformdirs"}
    result = subprocess.run([sys.executable, "-c", code % slow], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.slow
def test_ls_imports_neither_alembic_nor_rich_nor_tarfile(directory: Path) -> None:
    Cache.open(directory).close()
    code = (
        f"import sys; sys.argv = ['cachedb', '--dir', {str(directory)!r}, 'ls']\n"
        "from cachedb.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in sys.modules if m in ('alembic', 'rich', 'tarfile')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_early_is_no_error(cachedb: Run, archive: Path, directory: Path) -> None:
    cachedb("import", archive)
    command = (
        f"{shlex.join([sys.executable, '-m', 'cachedb', '--dir', str(directory)])} export app:1 - | head -c 10 | wc -c"
    )
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert (result.stdout.strip(), result.stderr) == ("10", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_python_shuts_down_ends_the_command_without_a_traceback(
    number: signal.Signals, code: int
) -> None:
    program = f"""
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(os.kill, os.getpid(), {number.value})
sys.argv = ["cachedb", "--version"]
from cachedb.cli.main import main
main()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (code, "")


def test_a_command_under_nohup_outlives_its_terminal() -> None:
    program = """
import os, signal, sys
import click
signal.signal(signal.SIGHUP, signal.SIG_IGN)
click.Group.main = lambda *_, **__: os.kill(os.getpid(), signal.SIGHUP)
from cachedb.cli.main import main
main()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_import_leaves_the_cache_as_it_was(
    directory: Path, archive: Path, number: signal.Signals, code: int
) -> None:
    Cache.open(directory).close()
    before = snapshot(directory)
    command = [sys.executable, "-m", "cachedb", "--dir", str(directory), "import", "-"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None
    process.stdin.write(archive.read_bytes()[:1024])
    process.stdin.flush()

    def has_spool() -> bool:
        """Return whether the command spools the archive to a file without a name."""
        with suppress(FileNotFoundError):
            files = Path(f"/proc/{process.pid}/fd").iterdir()
            found = [os.readlink(file) for file in files]
            return any(link.startswith(f"{directory}/ingest/") and link.endswith(" (deleted)") for link in found)
        return False

    assert wait_until(has_spool)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"Traceback" not in stderr
    assert snapshot(directory) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system: run as root")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_an_import_and_changes_nothing(
    cachedb: Run, small_disk: Path, archive: Path, tmp_path: Path
) -> None:
    directory = small_disk / "cache"
    assert cachedb("--dir", directory, "import", archive).returncode == 0
    before = snapshot(directory)
    large = make.write(tmp_path / "large.tar", make.docker_files({"large": make.image(3, 4, size=5_000_000)}))
    result = cachedb("--dir", directory, "import", large)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"cachedb: .*No space left on device.*free some space.*\n", result.stderr)
    assert snapshot(directory) == before
    assert cachedb("--dir", directory, "rm", "app:1").returncode == 0


def test_long_json_is_written_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from cachedb.cli.output import print_json

    class Written(io.StringIO):
        longest = 0

        def write(self, text: str) -> int:
            Written.longest = max(Written.longest, len(text))
            return super().write(text)

    value = [{"digest": MADE.digest, "size": number} for number in range(20_000)]
    monkeypatch.setattr(sys, "stdout", written := Written())
    print_json(value)
    assert written.getvalue() == json.dumps(value, indent=2) + "\n"
    assert Written.longest < len(written.getvalue()) / 4


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_an_interrupt_while_a_connection_closes_is_an_error_of_one_line(directory: Path) -> None:
    script = """
    import sys
    from cachedb.cli import main
    from cachedb.index.sqlite import connection

    close = connection.CacheConnection.close

    def interrupt(self):
        connection.CacheConnection.close = close
        raise KeyboardInterrupt

    connection.CacheConnection.close = interrupt
    main.main()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), "--dir", str(directory), "ls"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, "cachedb: interrupted")


@pytest.mark.parametrize("moment", ["click is imported", "the command line begins"])
def test_an_interrupt_before_the_command_begins_is_an_error_of_one_line(moment: str) -> None:
    script = """
    import sys

    def interrupt(*_):
        raise KeyboardInterrupt

    if sys.argv[1] == "the command line begins":
        import signal
        signal.getsignal = interrupt

    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == sys.argv[1].partition(" ")[0]:
                interrupt()

    sys.meta_path.insert(0, Interrupting())
    from cachedb.__main__ import main
    main()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), moment]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "cachedb: interrupted\n")


@pytest.mark.slow
def test_a_third_signal_ends_a_command_whose_thread_is_stuck(directory: Path, tmp_path: Path) -> None:
    with Cache.open(directory) as cache:
        make.save(cache, "app:1", make.image(1))
    script = """
import os, signal, threading
from cachedb.cli.main import main
from cachedb.operations import copy

def wait_for_ever(*_):
    os.write(1, b"stuck\\n")  # in one piece, because several threads come here
    threading.Event().wait()

signal.signal(signal.SIGINT, signal.default_int_handler)
copy._copy_blob = wait_for_ever
main()
"""
    command = [sys.executable, "-c", script, "--dir", str(directory), "copy", str(tmp_path / "copy")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "stuck\n"

            def interrupt() -> bool:
                process.send_signal(signal.SIGINT)
                return process.poll() is not None

            assert wait_until(interrupt, 60)
        finally:
            process.kill()
    assert process.returncode == 130
