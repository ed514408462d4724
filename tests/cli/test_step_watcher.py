"""A query that is stuck in one step of SQLite ends; a slow reader of its output stops nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cachedb import Cache
from tests.conftest import run_python
from tests.disk.test_locks import wait_until
from tests.support.processes import cpu_seconds

# SQLite checks the time only between instructions. Here one of them takes seconds, and 150 have no check in between.
STUCK = "WITH t AS MATERIALIZED (SELECT printf('%.*c', 4900000, 'a') AS x) SELECT {} FROM t".format(
    " + ".join(f"(x LIKE '%{'a' * 120}b{number}')" for number in range(150))
)


def begin_query(directory: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cachedb", "--dir", str(directory), "sql", *options, STUCK]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_it_computes(process: subprocess.Popen[str]) -> None:
    """Wait until the query, which runs at idle priority, has taken a second of CPU time."""
    assert wait_until(lambda: os.sched_getscheduler(process.pid) == os.SCHED_IDLE)
    begun = cpu_seconds(process.pid)
    assert wait_until(lambda: cpu_seconds(process.pid) >= begun + 1)


def test_a_query_that_is_stuck_ends_after_its_time(directory: Path) -> None:
    Cache.open(directory).close()
    with begin_query(directory, "--timeout", "1s") as process:
        try:
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output) == (1, "")
    assert error == "cachedb: the query took over 1 s: narrow it, or give it more time\n"


@pytest.mark.parametrize(("number", "message"), [(signal.SIGINT, "cachedb: interrupted\n"), (signal.SIGTERM, "")])
def test_a_query_that_is_stuck_ends_on_a_signal(directory: Path, number: signal.Signals, message: str) -> None:
    Cache.open(directory).close()
    with begin_query(directory) as process:
        try:
            wait_until_it_computes(process)
            process.send_signal(number)
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output, error) == (128 + number, "", message)
    with Cache.open(directory) as cache:
        assert cache.verify().problems == []


# Watch rows with a grace of 10 ms, until the watcher has looked ten times after the time of the query.
WATCH = """
import itertools, os, select, sys, time
from cachedb.cli import step_watcher

step_watcher._GRACE_SECONDS, looks, real = 0.01, itertools.count(), select.select

def look(*arguments):
    global looked
    looked = next(looks)
    return real(*arguments)

def wait_for_looks():
    last = looked
    while looked < last + 10:
        time.sleep(0.001)

looked, step_watcher.select.select = 0, look
watcher = step_watcher.StepWatcher(0.01, "stuck")
with watcher.watching():
"""


def test_a_slow_reader_does_not_end_a_query() -> None:
    script = (
        WATCH + "    for row in watcher.watch_rows(iter(range(3))):\n        wait_for_looks()\n        print(row)\n"
    )
    assert run_python(script) == "0\n1\n2\n"


def test_steps_that_end_in_time_do_not_end_a_query() -> None:
    rows = "(row for row in range(3000) if not time.sleep(0.0005))"
    script = WATCH + f"    print(sum(1 for _ in watcher.watch_rows({rows})), looked > 10)\n"
    assert run_python(script) == "3000 True\n"


def test_a_query_runs_where_no_thread_can_be_started() -> None:
    script = f"import threading\nthreading.Thread.start = lambda _: (_ for _ in ()).throw(RuntimeError())\n{WATCH}"
    assert run_python(f"{script}    print(list(watcher.watch_rows(iter(range(3)))))\n") == "[0, 1, 2]\n"


def test_a_closed_stderr_does_not_keep_a_stuck_query(directory: Path) -> None:
    Cache.open(directory).close()
    with begin_query(directory, "--timeout", "1s") as process:
        assert process.stderr is not None
        process.stderr.close()
        try:
            assert process.wait(timeout=60) == 1
        finally:
            process.kill()
