"""The README is true: its tour prints the output that it shows, and its examples run."""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.oci import DOCKER_CONFIG, DOCKER_MANIFEST, host_platform
from tests.support import make

DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with the repository's examples and its own cache, and put `cachedb` on the PATH."""
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


def set_up_command(mark: str) -> str:
    """Return a command of one or more lines that `.ci/run` takes from the README."""
    block: str
    (block,) = re.findall(rf"<!-- {mark} -->\n```sh\n(.*?)```", README, re.DOTALL)
    return block


@pytest.mark.slow
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
        pattern = re.escape(expected).replace("…", "[^\n]+")  # text that differs between runs
        assert re.fullmatch(pattern, result.stdout), f"{command}\n{result.stdout}"


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 180
    outside = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert [line for line in outside.splitlines() if len(line) > 120 and line[0] != "|"] == []


def test_the_library_example_runs(place: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code.count("\n") <= 15
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("hello:1 sha256:")
    assert [line.split()[0] for line in lines[1:4]] == ["manifest", "config", "layer"]
    assert (place / "layout" / "index.json").is_file()


def build(place: Path, base: str) -> subprocess.CompletedProcess[str]:
    (place / "note.txt").write_text("hello")
    command = [sys.executable, "examples/build_step.py", base, "note.txt", "built:1", "layout"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_the_build_step_adds_a_layer(place: Path) -> None:
    subprocess.run(["cachedb", "import", "-q", "examples/hello.oci.tar"], check=True, stdout=subprocess.DEVNULL)
    built = build(place, "hello:1")
    assert built.returncode == 0, built.stderr
    with Cache.open(place / "cache") as cache:
        base, made = cache.get_image_blobs("hello:1"), cache.get_image_blobs("built:1")
        assert cache.is_image_complete("built:1")
        assert [blob.digest for blob in made if blob.role == "layer"][:-1] == [
            blob.digest for blob in base if blob.role == "layer"
        ]
        layer = made[-1].path
        assert layer is not None
        linked = place / "layout" / "blobs" / "sha256" / made[-1].digest.partition(":")[2]
        assert linked.samefile(layer)


@pytest.mark.slow
def test_the_build_step_uses_the_hosts_platform_of_an_index(place: Path) -> None:
    theirs, ours = make.image(1, architecture="s390x"), make.image(2, 3)
    here = {"os": "linux", "architecture": host_platform().split("/")[1]}
    root = make.index(theirs, ours, platforms=[{"os": "linux", "architecture": "s390x"}, here])
    with Cache.open(place / "cache") as cache:
        for made in (theirs, ours):
            for digest, data in made.blobs.items():
                cache.save_blob(digest, data)
        cache.save_manifest("base:1", root)
        built = build(place, "base:1")
        assert built.returncode == 0, built.stderr
        layers = [blob.digest for blob in cache.get_image_blobs("built:1") if blob.role == "layer"]
        assert layers[:-1] == [make.digest_of(data) for data in ours.layers]
        assert cache.is_image_complete("built:1")


@pytest.mark.slow
def test_the_build_step_keeps_docker_media_types(place: Path) -> None:
    made = make.image(1, compression="gzip")
    manifest = json.loads(made.manifest)
    manifest["mediaType"] = DOCKER_MANIFEST
    manifest["config"]["mediaType"] = DOCKER_CONFIG
    manifest["layers"][0]["mediaType"] = DOCKER_LAYER_GZIP
    with Cache.open(place / "cache") as cache:
        make.save(cache, "base:1", made._replace(manifest=json.dumps(manifest).encode()))
        built = build(place, "base:1")
        assert built.returncode == 0, built.stderr
        kinds = [blob.media_type for blob in cache.get_image_blobs("built:1")]
        assert kinds == [DOCKER_MANIFEST, DOCKER_CONFIG, DOCKER_LAYER_GZIP, DOCKER_LAYER_GZIP]
        assert cache.is_image_complete("built:1")


def test_the_build_step_holds_its_base(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location("build_step", ROOT / "examples" / "build_step.py")
    assert specification is not None
    assert specification.loader is not None
    step = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(step)
    build_layer = step.build_layer
    with Cache.open(place / "cache") as cache, Cache.open(place / "cache") as other:
        make.save(other, "base:1", make.image(1))

        def remove_base_and_build(file: Path) -> bytes:
            other.remove_manifest("base:1")
            other.collect_garbage()
            return bytes(build_layer(file))

        monkeypatch.setattr(step, "build_layer", remove_base_and_build)
        (place / "note.txt").write_text("hello")
        step.add_layer(cache, "base:1", place / "note.txt", "built:1")
        assert cache.is_image_complete("built:1")


@pytest.mark.slow
def test_the_build_step_fails_if_it_cannot_make_a_complete_image(place: Path) -> None:
    made = make.image(1)
    with Cache.open(place / "cache") as cache:
        cache.save_manifest("missing:1", made.manifest)
        root = json.loads(make.index(make.image(2)))
        root["manifests"][0]["platform"] = {"os": "plan9", "architecture": "mips"}
        cache.save_manifest("foreign:1", json.dumps(root).encode())
        artifact = make.image(3)
        config = b"{}"
        manifest = json.loads(artifact.manifest)
        manifest["config"] = make.descriptor(config, "application/vnd.example+json")
        make.save(cache, "artifact:1", artifact._replace(config=config, manifest=json.dumps(manifest).encode()))
        for base, message in {
            "missing:1": "is not in the cache",
            "foreign:1": "has no manifest for linux/",
            "artifact:1": "is not a container image",
            "absent:1": "is not in the cache",
        }.items():
            failed = build(place, base)
            assert failed.returncode == 1
            assert message in failed.stderr
            assert failed.stderr.startswith("build_step: ")
            assert not cache.is_image_complete("built:1")


def test_each_set_up_command_can_be_pasted_at_once() -> None:
    for mark in ("main", "test"):
        command = set_up_command(mark)
        assert command.startswith("python3 -m venv")
        lines = command.splitlines()
        assert len(lines) > 1
        assert all(line.endswith(" &&") for line in lines[:-1])  # a step that fails ends the command
        assert not lines[-1].endswith(("&&", "\\"))
        subprocess.run(["bash", "-n", "-c", command], check=True)
        assert 'export CACHEDB_DIR="$PWD/' in command
    assert "pytest -q -m 'not slow and not attack' -n auto" in set_up_command("test").replace('"', "'")


@pytest.mark.slow
def test_the_code_has_every_message_of_the_troubleshooting_page() -> None:
    texts = " ".join(
        f"{node.value} "
        for path in (ROOT / "cachedb").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    texts += f"{os.strerror(errno.ENOSPC)} no such column: "  # from the operating system, and from SQLite
    messages = re.findall(r"^### `(.*)`$", (ROOT / "docs/how-to/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 40
    for message in messages:
        parts = [part.strip() for part in message.split("…")]
        assert any(len(part) > 5 for part in parts), message
        assert [part for part in parts if part not in texts] == [], message
