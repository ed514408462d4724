"""The README is true: its tour gives the output it shows, and its library example runs."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cachedb import Cache

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the repository's examples, a cache of its own, and `cachedb` on the path."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = tmp_path / "bin" / "cachedb"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cachedb "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CACHEDB_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("place")
def test_the_tour_prints_what_the_readme_shows() -> None:
    steps = []
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        steps += re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    assert len(steps) >= 12
    for command, expected in steps:
        result = subprocess.run(
            command, shell=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        pattern = re.escape(expected).replace("…", "[^\n]+")  # what differs from one run to the next
        assert re.fullmatch(pattern, result.stdout), f"{command}\n{result.stdout}"


def test_the_library_example_runs(place: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code.count("\n") <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("hello:1 sha256:")
    assert [line.split()[0] for line in lines[1:4]] == ["manifest", "config", "layer"]
    assert (place / "layout" / "index.json").is_file()


def test_the_build_step_of_the_examples_makes_an_image(place: Path) -> None:
    (place / "note.txt").write_text("hello")
    subprocess.run(["cachedb", "import", "-q", "examples/hello.oci.tar"], check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "examples/build_step.py", "hello:1", "note.txt", "hello:2", "layout"]
    subprocess.run(command, check=True)
    with Cache.open(place / "cache") as cache:
        base, made = cache.get_image_blobs("hello:1"), cache.get_image_blobs("hello:2")
        assert cache.is_image_complete("hello:2")
        assert [blob.digest for blob in made if blob.role == "layer"][:-1] == [
            blob.digest for blob in base if blob.role == "layer"
        ]
        layer = made[-1].path
        assert layer is not None
        linked = place / "layout" / "blobs" / "sha256" / made[-1].digest.partition(":")[2]
        assert linked.samefile(layer)


def test_each_set_up_command_is_one_line() -> None:
    for mark in ("main", "test"):
        (block,) = re.findall(rf"<!-- {mark} -->\n```sh\n(.*?)```", README, re.DOTALL)
        assert block.count("\n") == 1
        assert block.startswith("python3 -m venv")
