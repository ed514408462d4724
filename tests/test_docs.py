"""The documentation is true: its examples run, and its tables list exactly what the code has."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

import cachedb
from cachedb import Cache, errors
from cachedb.cli.main import cli
from tests.conftest import GO_PEERS
from tests.support.command_server import CommandServer
from tests.support.make import image
from tests.support.registries import REGISTRIES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
GENERATED = DOCS / "reference" / "commands"  # a build of the documentation writes it; it is not in git
PAGES = sorted(page for page in DOCS.rglob("*.md") if GENERATED not in page.parents)
STEP = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str  # the first word after the fence
    marks: list[str]  # the other words after the fence
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Yield the outermost fenced blocks of a page, including those in lists."""
    text = page.read_text()
    for match in re.finditer(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", text, re.MULTILINE | re.DOTALL):
        indent, _, info, inner = match.groups()
        language, *marks = info.split() or [""]
        inner = re.sub(rf"^{indent}", "", inner, flags=re.MULTILINE)
        yield Block(text.count("\n", 0, match.start()) + 1, language, marks, inner)


def examples_of(page: Path) -> list[Block]:
    """Return the examples of a page: console and Python without the mark `no-test`, and files with `file=NAME`."""
    found = (block for block in blocks(page) if block.language in ("console", "python") or named_file(block))
    return [block for block in found if "no-test" not in block.marks]


def named_file(block: Block) -> str | None:
    """Return the name of the file that a block is."""
    return next((mark.removeprefix("file=") for mark in block.marks if mark.startswith("file=")), None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with the repository's examples and its own cache, and put `cachedb` on the PATH."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, options in (("cachedb", "-m cachedb"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {options} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("CACHEDB_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    Cache.open().close()  # the pages do not show that the first command creates the cache
    return tmp_path


# Examples


@pytest.mark.slow
@pytest.mark.parametrize("name", [str(page.relative_to(DOCS)) for page in PAGES if examples_of(page)])
def test_the_examples_of_a_page_print_the_output_that_it_shows(
    name: str, place: Path, command_server: CommandServer
) -> None:
    """Run all blocks of a page in order, in one folder and with one cache."""
    page = DOCS / name
    served = place / "served"
    served.mkdir()
    command_server.write_program(served / "cachedb")
    environment = {**os.environ, "PATH": f"{served}:{os.environ['PATH']}"}
    names: dict[str, Any] = {}
    for block in examples_of(page):
        where = f"docs/{name}:{block.line}"
        if file := named_file(block):
            Path(file).write_text(block.text)
            continue
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
            continue
        steps = STEP.findall(block.text)
        assert steps, f"{where}: a console block needs lines that begin with `$ `"
        for command, expected in steps:
            result = subprocess.run(
                command,
                shell=True,
                check=False,
                # A signal that cannot be caught does not reach a command of the server.
                env=None if "KILL" in command else environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
            )
            pattern = re.escape(expected).replace("…", "[^\n]+")  # text that differs between runs
            assert re.fullmatch(pattern, result.stdout), f"{where}: {command}\n{result.stdout}"


def test_blocks_are_found_in_lists_and_inside_longer_fences(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "1. x\n   ```console no-test\n   $ a\n   ```\n````text\n```python\n1 / 0\n```\n````\n```python\nx\n```\n"
    )
    found = [(block.line, block.language, block.marks, block.text) for block in blocks(page)]
    assert found == [
        (2, "console", ["no-test"], "$ a\n"),
        (5, "text", [], "```python\n1 / 0\n```\n"),
        (10, "python", [], "x\n"),
    ]
    assert [block.line for block in examples_of(page)] == [10]
    assert STEP.findall("$ a \\\n  b\nc\n$ d\n") == [("a \\\n  b", "c\n"), ("d", "")]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_to_the_repository_lead_to_a_file(page: str) -> None:
    """Check the links of two pages that the build of the documentation does not check."""
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / target).exists() or GENERATED in (ROOT / target).parents, f"{page}: {target}"


# Tables


def table(page: str, heading: str, text: str | None = None) -> dict[str, list[str]]:
    """Return the rows of the table under a heading, by the code in the first cell."""
    text = text or (DOCS / page).read_text()
    section = re.split(rf"^##+ {re.escape(heading)}\n", text, flags=re.MULTILINE)[1]
    section = re.split(r"^##+ ", section, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", section, re.MULTILINE)
    return {key: [cell.strip() for cell in rest.split(" | ")] for key, rest in rows}


def test_the_sql_reference_lists_every_table() -> None:
    from cachedb.tables import METADATA

    assert set(table("reference/sql.md", "Tables")) == set(METADATA.tables)


def test_the_python_reference_has_every_public_name() -> None:
    text = (DOCS / "reference" / "python.md").read_text()
    documented = set(re.findall(r"^\.\. auto(?:class|data):: (\w+)$", text, re.MULTILINE))
    (members,) = re.findall(r":members: (Busy.*?)\n +:show", text, re.DOTALL)
    documented_errors = set(re.findall(r"\w+", members))
    assert documented_errors == set(errors.__all__)
    assert documented | documented_errors == set(cachedb.__all__) - {"__version__"}


def test_the_configuration_page_has_every_variable_that_the_code_reads() -> None:
    read = set()
    for file in [*(ROOT / "cachedb").rglob("*.py"), *(ROOT / "migrations").rglob("*.py")]:
        source = file.read_text()
        names = r"(?:environ(?:\.get\(|\[)|getenv\(|envvar=)\s*\"([A-Z_]+)\"|^_\w+\s*=\s*\"(_?CACHEDB_[A-Z_]+)\""
        for direct, named in re.findall(names, source, re.MULTILINE):
            read.add(direct or named)
        read |= set(re.findall(r"\bCACHEDB_[A-Z_]*[A-Z]\b", source))  # in messages and docstrings too
    described = table("reference/configuration.md", "Environment variables")
    ours = {name for row in described for name in row.split(", ")}
    # Python, OpenSSL and platformdirs read these.
    others = {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "TMPDIR"}
    others |= {"XDG_CACHE_HOME", "XDG_STATE_HOME"}
    internal = {"COMP_WORDS", "_CACHEDB_COMPLETE", "CACHEDB_COMPLETE"}
    assert read - internal == ours - others


def test_the_page_of_exit_codes_has_those_of_the_help() -> None:
    assert cli.help is not None
    (listed,) = re.findall(r"Exit codes: (.*?)\.$", cli.help, re.MULTILINE)
    codes = {code.partition(" ")[0] for code in listed.split("; ")}
    assert codes <= set(table("reference/exit-codes.md", "Exit codes"))


PEERS = {
    f"{heading}: {command}": (command.split()[0], cells)
    for heading in ("Archives and layouts", "Commands with registries")
    for command, cells in table("reference/peers.md", heading).items()
}


@pytest.mark.parametrize(("program", "cells"), PEERS.values(), ids=PEERS)
def test_the_page_of_other_tools_names_a_test_that_runs_the_tool(program: str, cells: list[str]) -> None:
    (file,) = re.findall(r"`(\w+\.py)`", cells[-1])
    source = (ROOT / "tests" / "peers" / file).read_text()
    assert re.search(rf"[\"'{{]{program}[\"' ]", source)
    if program in GO_PEERS:
        assert cells[0] == version_of(program)


def version_of(program: str) -> str:
    """Return the version of a peer that CI builds."""
    return GO_PEERS[program].rpartition("@v")[2]


def test_the_page_of_other_tools_has_every_registry_and_every_tool_that_ci_builds() -> None:
    registries = table("reference/peers.md", "Registries")
    assert set(registries) == set(REGISTRIES)
    assert registries["distribution-3"][1] == version_of("registry")
    assert GO_PEERS.keys() - {"registry"} <= {program for program, _ in PEERS.values()}


# JSON


def shapes() -> dict[str, dict[str, list[str]]]:
    """Return the tables of the JSON reference, by heading."""
    text = (DOCS / "reference" / "json.md").read_text()
    return {heading: table("", heading, text) for heading in re.findall(r"^### (.*)$", text, re.MULTILINE)}


def assert_has_shape(value: Any, shape: str, where: str) -> None:
    """Assert that an object has the fields of a shape's table, in order, with their types."""
    found = shapes()
    bases = {"Shown image": "Image", "Imported image": "Image", "Removal": "Collection", "Totals": "Usage"}
    described = {**found.get(bases.get(shape, ""), {}), **found[shape]}
    if shape == "Totals":
        del described["image_usage"]  # only `df -v` prints it
    assert list(value) == list(described), where
    for name, (kind, *_) in described.items():
        assert_has_type(value[name], kind, f"{where}.{name}")


def assert_has_type(value: Any, kind: str, where: str) -> None:
    """Assert that a value has a type, given as the page writes it."""
    kinds: dict[str, type] = {"string": str, "time": str, "number": int, "boolean": bool, "object": dict}
    if value is None:
        assert "null" in kind.split(" or "), where
        return
    kind = kind.removesuffix(" or null")
    if match := re.match(r"array of (.*)", kind):
        assert isinstance(value, list), where
        for number, one in enumerate(value):
            assert_has_type(one, match[1], f"{where}[{number}]")
    elif match := re.match(r"\[(.*?)\]\(.*?\)", kind):
        assert_has_shape(value, match[1], where)
    else:
        assert type(value) is kinds[kind], f"{where}: {value!r} is no {kind}"
        if kind == "time":
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", str(value)), where


@pytest.mark.slow
def test_the_output_of_commands_fits_the_json_reference(place: Path) -> None:
    """Run each command of the reference's table, and compare its output with the tables of fields."""
    described = table("reference/json.md", "Commands")
    with Cache.open() as cache:
        lacking = image(5, 6)
        cache.save_manifest("lacking:1", lacking.manifest)
        cache.cache_from_tar("examples/hello.oci.tar")
    old = place / "old"
    (old / "manifests" / "x").mkdir(parents=True)
    (old / "manifests" / "x" / "1").write_bytes(lacking.manifest)
    (old / "blobs" / "sha256").mkdir(parents=True)
    (old / "index.json").write_text("{}")
    subprocess.run(["cachedb", "db", "backup", "backup.db"], check=True, stdout=subprocess.DEVNULL)
    (place / "cache" / "blobs" / "sha256" / ("0" * 64)).write_bytes(b"x")  # a problem for `verify`
    arguments = {
        "import": "examples/hello.oci.tar", "show": "hello:1", "rm": "--dry-run hello:1", "gc": "--dry-run",
        "prune": "--max-size 1TB",
        "adopt": str(old), "copy": "copy", "hold": "hello:1 --for 2h", "df": "-v", "db downgrade": "0004",
        "db backup": "spare.db", "db restore": "backup.db", "report": "--list",
    }  # fmt: skip
    remote = {"digest", "inspect", "pull", "push", "tags"}  # these need a registry, and are not run
    assert remote < set(described)
    # The commands that change the schema come last.
    order = [*sorted(set(described) - {*remote, "db downgrade", "db upgrade"}), "db downgrade", "db upgrade"]
    for command in order:
        kind = described[command][0]
        line = f"cachedb {command} {arguments.get(command, '')} --format json"
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), f"{line}\n{done.stderr}"
        assert_has_type(json.loads(done.stdout), kind, command)


def test_the_json_reference_has_the_fields_of_the_result_types() -> None:
    types: dict[str, Any] = {
        "Image": cachedb.ImageInfo, "Blob": cachedb.BlobInfo, "Platform": cachedb.PlatformInfo, "Push": cachedb.Pushed,
        "Problem": cachedb.Problem, "Leftover": cachedb.Leftover, "Session": cachedb.SessionInfo,
        "Activity": cachedb.Activity, "Left out": cachedb.LeftOut, "Plan": cachedb.Plan, "Pruned": cachedb.Pruned,
        "Planned image": cachedb.PlannedImage, "Skipped image": cachedb.SkippedImage,
        "Explanation": cachedb.Explanation,
    }  # fmt: skip
    described = shapes()
    fields = {name: one._fields for name, one in types.items()}
    fields["Image"] = ("name", *fields["Image"], "platform", "created_at")
    fields["Push"] = (*fields["Push"], "size")
    fields["Plan"] = (*fields["Plan"], "garbage_size", "unmet_size")
    assert {name: tuple(described[name]) for name in types} == fields


def test_the_json_reference_has_every_command_that_prints_json() -> None:
    def walk(group: click.Group, before: str) -> Iterator[str]:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            if isinstance(command, click.Group):
                yield from walk(command, f"{before}{name} ")
                continue
            choices = [getattr(option.type, "choices", ()) for option in command.params]
            if any("json" in some for some in choices):
                yield before + name

    assert set(table("reference/json.md", "Commands")) == set(walk(cli, ""))


# Promises


def test_the_page_of_promises_has_each_promise_and_names_existing_tests() -> None:
    rows = table("explanation/promises.md", "The promises")
    assert list(rows) == [f"P{number}" for number in range(1, 15)]
    files = {file.name for file in (ROOT / "tests").rglob("*.py")}
    for promise, cells in rows.items():
        named = set(re.findall(r"`(\w+\.py)`", cells[-1]))
        assert named, promise
        assert named <= files, f"{promise}: {named - files}"
