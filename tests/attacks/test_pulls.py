"""Pull more than fits, for some seconds: no pull fails, and the cache stays within its limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.attack
IMAGES = int(os.environ.get("CACHEDB_PULLS", "40"))


def test_processes_that_pull_more_than_fits_stay_within_the_limit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.attacks.pulls", "--directory", str(tmp_path / "cache")]
    options = ["--processes", "4", "--images", str(IMAGES), "--size", "3000000", "--max-size", "40000000"]
    # `used-within` is short, because a slow machine must not fail a pull for want of images that may go.
    done = subprocess.run(
        [*command, *options, "--used-within", "0s"], check=False, text=True, capture_output=True, timeout=600
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "\nwrong 0\n" in done.stdout
