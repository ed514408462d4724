"""A query that is stuck in one step of SQLite ends; a slow reader of its output stops nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cachedb import Cache
from tests.conftest import run_python
from tests.support.processes import cpu_seconds
from tests.support.waiting import wait_until

# SQLite checks the time only between instructions. Here one of them takes seconds, and 150 have no check in between.
STUCK = "WITH t AS MATERIALIZED (SELECT printf('%.*c', 4900000, 'a') AS x) SELECT {} FROM t".format(
    " + ".join(f"(x LIKE '%{'a' * 120}b{number}')" for number in range(150))
)


# On a busy machine, a query at idle priority gets no time. This one says when it begins.
AT_NORMAL_PRIORITY = """
import os
from cachedb.cli.main import main
os.sched_setscheduler = lambda *_: os.write(2, b"begun\\n")
main()
"""


def begin_query(directory: Path, *options: str, script: str | None = None) -> subprocess.Popen[str]:
    program = ["-c", script] if script else ["-m", "cachedb"]
    command = [sys.executable, *program, "--dir", str(directory), "sql", *options, STUCK]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_it_computes(process: subprocess.Popen[str]) -> None:
    """Wait until a query at normal priority has taken half a second of CPU time."""
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    begun = cpu_seconds(process.pid)
    assert wait_until(lambda: cpu_seconds(process.pid) >= begun + 0.5)


@pytest.mark.slow
def test_a_query_that_is_stuck_ends_after_its_time(directory: Path) -> None:
    Cache.open(directory).close()
    with begin_query(directory, "--timeout", "1s") as process:
        try:
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output) == (1, "")
    assert error == "cachedb: the query took over 1 s: narrow it, or give it more time\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGINT, "cachedb: interrupted\n"), (signal.SIGTERM, ""), (signal.SIGHUP, "")]
)
def test_a_query_that_is_stuck_ends_on_a_signal(directory: Path, number: signal.Signals, message: str) -> None:
    Cache.open(directory).close()
    with begin_query(directory, script=AT_NORMAL_PRIORITY) as process:
        try:
            wait_until_it_computes(process)
            process.send_signal(number)
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output, error) == (128 + number, "", message)
    with Cache.open(directory) as cache:
        assert cache.verify().problems == []


# Watch rows. The watcher looks not after a time, but when `may_look` allows it, given the step of the last look.
WATCH = """
import select, time
from cachedb.cli import step_watcher

looked, real = 0, select.select

def look(readable, *_):
    global looked
    last = watcher._step
    looked += 1
    while not (found := real(readable, [], [], 0.001))[0] and not may_look(last):
        pass
    return found

def wait_for_looks(number):
    last = looked
    while looked < last + number:
        time.sleep(0.001)

select.select = look
watcher = step_watcher.StepWatcher(0.01)
with watcher.watching():
"""


def test_a_slow_reader_does_not_end_a_query() -> None:
    script = (
        f"may_look = lambda last: not watcher._is_in_step\n{WATCH}"
        "    for row in watcher.watch_rows(iter(range(3))):\n        wait_for_looks(10)\n        print(row)\n"
    )
    assert run_python(script) == "0\n1\n2\n"


def test_steps_that_end_in_time_do_not_end_a_query() -> None:
    # The watcher looks once in each step.
    script = f"may_look = lambda last: watcher._is_in_step and watcher._step > last\n{WATCH}"
    rows = "(row for row in range(20) if not wait_for_looks(1))"
    assert run_python(f"{script}    print(list(watcher.watch_rows({rows})))\n") == f"{list(range(20))}\n"


def test_a_query_runs_where_no_thread_can_be_started() -> None:
    script = f"import threading\nthreading.Thread.start = lambda _: (_ for _ in ()).throw(RuntimeError())\n{WATCH}"
    assert run_python(f"{script}    print(list(watcher.watch_rows(iter(range(3)))))\n") == "[0, 1, 2]\n"


@pytest.mark.slow
def test_a_closed_stderr_does_not_keep_a_stuck_query(directory: Path) -> None:
    Cache.open(directory).close()
    with begin_query(directory, "--timeout", "1s") as process:
        assert process.stderr is not None
        process.stderr.close()
        try:
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()
