"""The descendants of a command, which end with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FIND = """
import os, subprocess
from cachedb.cli.process_tree import _find_descendants

child = subprocess.Popen(["sleep", "600"])
print(_find_descendants({os.getpid()}).keys() == {child.pid}, bool(_find_descendants({1})))
child.kill()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: run the tests as root to make a PID namespace")
@pytest.mark.parametrize(("options", "found"), [(["--mount-proc"], "True True\n"), ([], "False False\n")])
def test_no_process_of_another_pid_namespace_is_taken_for_a_descendant(options: list[str], found: str) -> None:
    command = ["unshare", "--pid", "--fork", "--kill-child", *options, sys.executable, "-c", FIND]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == found
