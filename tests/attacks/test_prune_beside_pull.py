"""Pull beside a prune: no acknowledged image lacks a blob, and none that is held."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.attack

ROUNDS = int(os.environ.get("CACHEDB_ROUNDS", "100"))


def test_no_acknowledged_image_lacks_a_blob_while_another_process_prunes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.attacks.prune_beside_pull", "--rounds", ROUNDS, "--directory", tmp_path]
    done = subprocess.run([*map(str, command)], check=False, text=True, capture_output=True)
    counts = {name: int(count) for count, name in re.findall(r"^ *(\d+) ([a-z ]+)$", done.stdout, re.MULTILINE)}
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert counts["rounds"] == counts["whole"] + counts["gone"] == ROUNDS
    assert counts["failed pulls"] == counts["broken images"] == counts["failed prunes"] == 0
    assert counts["held"] > 0
    assert counts["removed"] > 0
