"""`cachedb sql` and `cachedb report`: what ends a query that does not end by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from cachedb import Cache

# SQLite checks the time only between instructions. Here one of them takes seconds, and 150 have no check in between.
STUCK = "WITH t AS MATERIALIZED (SELECT printf('%.*c', 4900000, 'a') AS x) SELECT {} FROM t".format(
    " + ".join(f"(x LIKE '%{'a' * 120}b{number}')" for number in range(150))
)


def begin_query(directory: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cachedb", "--dir", str(directory), "sql", *options, STUCK]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_cpu_ticks(process: subprocess.Popen[str]) -> int:
    """Return the time that a process has computed, in clock ticks."""
    return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[11])


def wait_until_it_computes(process: subprocess.Popen[str]) -> None:
    """Wait until the query, which runs at idle priority, has taken a second of CPU time."""
    while os.sched_getscheduler(process.pid) != os.SCHED_IDLE:
        time.sleep(0.01)
    begun = read_cpu_ticks(process)
    while read_cpu_ticks(process) < begun + os.sysconf("SC_CLK_TCK"):
        time.sleep(0.01)


def test_a_query_that_is_stuck_ends_after_its_time(directory: Path) -> None:
    Cache.open(directory).close()
    with begin_query(directory, "--timeout", "1s") as process:
        try:
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output) == (1, "")
    assert error == "cachedb: the query took over 1 s: narrow it, or give it more time\n"


def test_a_query_that_is_stuck_ends_on_a_signal(directory: Path) -> None:
    Cache.open(directory).close()
    with begin_query(directory) as process:
        try:
            wait_until_it_computes(process)
            process.send_signal(signal.SIGINT)
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output, error) == (130, "", "cachedb: interrupted\n")
    with Cache.open(directory) as cache:
        assert cache.verify().problems == []
