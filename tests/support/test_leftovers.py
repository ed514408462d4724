"""A killed test run leaves no process and no mount behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.leftovers import MARK
from tests.support.processes import is_alive
from tests.support.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]

STARTED = """
    import json, os, subprocess, time
    from pathlib import Path

    from tests.conftest import start_python

    def test_that_is_killed(tmp_path):
        place = tmp_path / "mounted"
        place.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode == 0
        helper = start_python("import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); input()")
        grandchild = int(helper.stdout.readline())
        session = subprocess.Popen(["sleep", "600"], start_new_session=True)
        if (fork := os.fork()) == 0:
            os.setsid()
            time.sleep(600)
            os._exit(0)
        started = Path(os.environ["STARTED"])
        processes = [os.getpid(), helper.pid, grandchild, session.pid, fork]
        found = {"processes": processes, "place": str(place), "mounted": mounted}
        started.with_suffix(".half").write_text(json.dumps(found))
        started.with_suffix(".half").rename(started)
        time.sleep(600)
"""


def is_mounted(place: str) -> bool:
    """Return whether a file system is mounted at a path in any process's mount namespace."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and place in process.joinpath("mountinfo").read_text():
                return True
        except OSError:
            continue  # the process has ended, or belongs to another user
    return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_killed_run_leaves_no_process_and_no_mount(tmp_path: Path, workers: int) -> None:
    test, started = tmp_path / "test_started.py", tmp_path / "started"
    test.write_text(textwrap.dedent(STARTED))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["-n", str(workers), "--rootdir", str(tmp_path), "--basetemp", str(tmp_path / "run"), str(test)]
    environment = {**os.environ, "STARTED": str(started), "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as run:
        assert run.stdout is not None
        assert wait_until(lambda: started.exists() or run.poll() is not None), "the test has not begun"
        assert run.poll() is None, run.stdout.read()
        found = json.loads(started.read_text())
        assert all(map(is_alive, found["processes"]))
        assert is_mounted(found["place"]) == found["mounted"]
        run.send_signal(signal.SIGKILL)
        try:
            assert wait_until(lambda: not any(map(is_alive, found["processes"]))), "a process is left"
            assert wait_until(lambda: not is_mounted(found["place"])), "a mount is left"
        finally:  # this test must not leave the mount if the watcher did
            subprocess.run(["umount", "--lazy", found["place"]], check=False, capture_output=True)


def test_a_run_adds_its_own_mark_to_the_environment() -> None:
    marks = os.environ[MARK].split(":")
    assert marks
    assert len(set(marks)) == len(marks)
