"""`cachedb systemd`: the units, their quoting, whose files they are, and the calls of systemctl."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cachedb import CacheError
from cachedb.cli import systemd
from cachedb.cli.main import cli
from tests.conftest import Run, find_peer

SERVICE, TIMER = "cachedb-prune.service", "cachedb-prune.timer"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder of the user's units; hide that of this host, and its systemd."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(systemd, "_SYSTEM_FOLDER", str(tmp_path / "etc"))
    monkeypatch.setattr(systemd, "_BOOTED", str(tmp_path / "missing"))
    return tmp_path / "config" / "systemd" / "user"


@pytest.fixture
def run(directory: Path) -> Callable[..., None]:
    """Return a function that runs a command in this process."""
    return lambda *words: cli.main(["--dir", str(directory), "systemd", *words], standalone_mode=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Put a systemctl on the PATH that records its arguments, and return a function that returns them."""
    (tmp_path / "bin").mkdir()
    program, record = tmp_path / "bin" / "systemctl", tmp_path / "calls"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{record}"\ntest "$2" != fail || exit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "_BOOTED", str(tmp_path))
    return lambda: record.read_text().splitlines() if record.exists() else []


def test_install_writes_a_service_and_a_timer(
    run: Callable[..., None], folder: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("install", "--user")
    assert sorted(path.name for path in folder.iterdir()) == [SERVICE, TIMER]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    lines = (folder / SERVICE).read_text().splitlines()
    assert f'Environment="CACHEDB_DIR={directory}"' in lines
    assert f"ConditionPathExists={directory}/policy.toml" in lines
    assert "Nice=10" in lines
    assert "IOSchedulingClass=idle" in lines
    assert not [line for line in lines if line.startswith("User=") or "@" in line]
    assert capsys.readouterr().out == (
        f"wrote {folder / SERVICE}\nwrote {folder / TIMER}\n"
        "systemd does not run here; on a host where it does, run:\n"
        "  systemctl --user daemon-reload\n  systemctl --user enable --now cachedb-prune.timer\n"
    )


def test_a_dry_run_prints_the_files_and_writes_nothing(
    run: Callable[..., None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("install", "--user", "--dry-run")
    printed = capsys.readouterr().out
    assert not folder.exists()
    assert f"# {folder / SERVICE}\n" in printed
    assert f"# {folder / TIMER}\n" in printed
    assert "ExecStart=" in printed


@pytest.mark.parametrize("name", ["plain", "two words", "100%n", "$HOME", 'a"b', "a\\b", "it's", "@COMMAND@", "ü"])
def test_systemd_accepts_any_directory(
    run: Callable[..., None],
    folder: Path,
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    systemd_analyze = find_peer("systemd-analyze", "apt-get install systemd")
    cli.main(["--dir", str(directory.parent / name), "systemd", "install", "--user"], standalone_mode=False)
    capsys.readouterr()
    done = subprocess.run(
        [systemd_analyze, "verify", str(folder / TIMER), str(folder / SERVICE)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two words", '"CACHEDB_DIR=/x/two words"'),
        ("100%n", '"CACHEDB_DIR=/x/100%%n"'),
        ('a"b', '"CACHEDB_DIR=/x/a\\"b"'),
        ("a\\b", '"CACHEDB_DIR=/x/a\\\\b"'),
        ("@COMMAND@", '"CACHEDB_DIR=/x/@COMMAND@"'),
    ],
)
def test_a_path_is_quoted_for_systemd(name: str, expected: str) -> None:
    text = systemd._render(Path("/x") / name, is_system=False)[SERVICE]
    assert f"Environment={expected}\n" in text


@pytest.mark.parametrize("name", ["a\nb", "a ", "a\\"])
def test_a_path_that_no_unit_can_have_is_refused(name: str) -> None:
    with pytest.raises(CacheError, match="systemd cannot use the path"):
        systemd._render(Path("/x") / name, is_system=False)


def test_a_dollar_is_no_variable_in_an_argument_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_find_command", lambda: ["/opt/$x/python", "$y"])
    assert 'ExecStart="/opt/$x/python" "$$y" prune\n' in systemd._render(Path("/x"), is_system=False)[SERVICE]


def test_the_service_of_the_host_runs_as_the_owner_of_the_cache(
    run: Callable[..., None], directory: Path, tmp_path: Path
) -> None:
    directory.mkdir()
    owner = directory.stat().st_uid
    run("install", "--system")
    text = (tmp_path / "etc" / SERVICE).read_text()
    assert ("User=" in text) == (owner != 0)
    if os.geteuid() == 0:
        os.chown(directory, 12345, 12345)
        run("install", "--system")
        assert "[Service]\nUser=12345\n" in (tmp_path / "etc" / SERVICE).read_text()


def test_a_running_systemd_is_told(run: Callable[..., None], folder: Path, calls: Callable[[], list[str]]) -> None:
    run("install", "--user")
    assert calls() == ["--user daemon-reload", "--user enable --now cachedb-prune.timer"]
    run("uninstall", "--user")
    assert calls()[2:] == ["--user disable --now cachedb-prune.timer", "--user daemon-reload"]
    assert list(folder.iterdir()) == []


def test_a_failure_of_systemctl_is_an_error(
    run: Callable[..., None], calls: Callable[[], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "bin" / "systemctl").write_text("#!/bin/sh\necho Failed to connect to bus >&2; exit 1\n")
    message = "`systemctl --user daemon-reload` failed: Failed to connect to bus: run it yourself"
    with pytest.raises(CacheError, match=message):
        run("install", "--user")


@pytest.mark.parametrize("command", ["install", "uninstall"])
@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_files_of_others_stay(run: Callable[..., None], folder: Path, command: str, kind: str) -> None:
    folder.mkdir(parents=True)
    if kind == "file":
        (folder / TIMER).write_text("[Timer]\n")
    elif kind == "link":
        (folder / TIMER).symlink_to("/dev/null")
    else:
        os.mkfifo(folder / TIMER)
    with pytest.raises(CacheError, match="was not written by cachedb"):
        run(command, "--user")
    assert [path.name for path in folder.iterdir()] == [TIMER]
    if kind != "pipe":
        assert (folder / TIMER).read_text() == ("[Timer]\n" if kind == "file" else "")


def test_an_uninstall_without_files_says_so(
    run: Callable[..., None], calls: Callable[[], list[str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("uninstall", "--user")
    assert capsys.readouterr().out == f"there is nothing to remove in {folder}\n"
    assert calls() == []


@pytest.mark.parametrize("words", [["install"], ["uninstall"], ["install", "--user", "--system"]])
def test_one_of_the_two_systemds_is_chosen(cachedb: Run, words: list[str]) -> None:
    done = cachedb("systemd", *words)
    assert done.returncode == 2
    assert "give one of --user and --system" in done.stderr


def test_the_service_runs_this_program(cachedb: Run) -> None:
    printed = cachedb("systemd", "install", "--user", "--dry-run").stdout
    (line,) = [line for line in printed.splitlines() if line.startswith("ExecStart=")]
    assert line.startswith('ExecStart="/')
    assert line.endswith(" prune")
