"""The commands of docker, podman, skopeo and crane work, or lead to the right command in one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from cachedb import Cache
from cachedb.cli.main import cli
from cachedb.cli.other_tools import ALIASES, check_arguments, translate
from cachedb.cli.spelling import SpellingGroup
from tests.conftest import Run
from tests.support import make
from tests.support.registries import Registry, isolate_client  # noqa: F401 - isolate_client is a fixture

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "familiar-commands.md"
IMAGE = make.image(1)


class Row(NamedTuple):
    """A row of the page: a command of another tool."""

    typed: str
    ours: str
    works: bool


def read_rows() -> Iterator[Row]:
    for line in PAGE.read_text().splitlines():
        if match := re.fullmatch(r"\| `([^`]+)` \| (.+) \| ((?:works|says so).*) \|", line):
            typed, ours, result = match.groups()
            yield Row(typed, ours, result.startswith("works"))


ROWS = list(read_rows())


@pytest.fixture
def registry(cache: Cache, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Yield a registry with an image; the cache and the working directory have it too."""
    monkeypatch.chdir(directory.parent)
    archive = make.write(Path("app.tar"), make.oci_files({"app:1": IMAGE}))
    with Registry() as made:
        made.add(IMAGE, "app", "1")
        for name in ("app:1", "other:1", f"{made.host}/app:1", f"{made.host}/local:1"):
            cache.cache_from_tar(archive, name)
        yield made


def test_the_page_has_40_commands() -> None:
    assert len(ROWS) >= 40


@pytest.mark.usefixtures("isolate_client")
@pytest.mark.parametrize("row", ROWS, ids=[row.typed for row in ROWS])
def test_a_command_of_another_tool_works_or_leads_to_ours_in_one_line(
    cachedb: Run, registry: Registry, row: Row
) -> None:
    typed, _, file = row.typed.replace("registry.example.org", registry.host).partition(" < ")
    data = Path(file).read_bytes() if file else b""
    done = cachedb(*shlex.split(typed)[1:], input=data, text=False)
    stderr = done.stderr.decode()
    if row.works:
        assert done.returncode == 0, stderr
        return
    assert done.returncode in (1, 2)
    assert re.fullmatch(r"cachedb: .*\n", stderr)
    ours = re.findall(r"cachedb [a-z]+", row.ours)
    assert ours
    for command in ours:
        assert command in stderr


def run(*words: str) -> str:
    return CliRunner().invoke(cli, words, prog_name="cachedb").output


def test_a_hidden_command_is_found_but_not_listed() -> None:
    context = click.Context(cli)
    for name in ALIASES:
        command = cli.get_command(context, name)
        assert command is not None
        assert command.hidden
    listed = cli.list_commands(context)
    assert not {*ALIASES, "history", "du"} & {*listed, *re.findall(r"^  (\w+)  ", run("--help"), re.MULTILINE)}


def test_an_alias_has_the_help_of_the_command_that_it_runs() -> None:
    assert "List the images" in run("images", "--help")
    assert run("history", "--help").replace("cachedb history", "cachedb show") == run("show", "--help")


@pytest.mark.slow
def test_save_without_a_file_writes_to_stdout(cachedb: Run, registry: Registry, tmp_path: Path) -> None:
    assert cachedb("save", "app:1", text=False).stdout == cachedb("export", "app:1", "-", text=False).stdout
    both = cachedb("save", "app:1", "other:1", text=False)
    assert both.stdout == cachedb("export", "app:1", "other:1", "-", text=False).stdout
    assert not Path("other:1").exists()


def test_a_forced_removal_ignores_a_missing_image(cachedb: Run, registry: Registry) -> None:
    assert cachedb("rmi", "absent:1").returncode == 3
    assert cachedb("rmi", "-f", "absent:1").returncode == 0


def test_an_image_with_the_name_of_a_foreign_command_is_found() -> None:
    assert translate(["manifest", "inspect"]) == ["manifest", "inspect"]
    assert translate(["manifest", "inspect", "app:1"]) == ["inspect", "app:1"]


@pytest.mark.parametrize(
    "line", ["copy --format json folder", "copy ./a", "pull app:1 other:1", "push app:1 host/app:1", "blob cat x@y"]
)
def test_our_own_arguments_are_kept(line: str) -> None:
    words = line.split()
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    assert translate(words) == words
    check_arguments(command, words)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("exprot", ["export"]), ("improt", ["import"]), ("shwo", ["show"]), ("tga", ["tag"]), ("relase", ["release"]),
        ("verfy", ["verify"]), ("hols", ["hold", "holds"]),
        ("prnue", ["prune"]), ("delete", []), ("start", []), ("sync", []), ("create", []), ("as", []),
        ("frobnicate", []),
    ],
)  # fmt: skip
def test_only_a_close_spelling_is_suggested(typed: str, meant: list[str]) -> None:
    assert isinstance(cli, SpellingGroup)
    assert cli.find_close(click.Context(cli), typed) == meant


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("exprot", "no such command 'exprot' (did you mean `cachedb export`?); see `cachedb --help`"),
        ("db upgrad", "no such command 'upgrad' (did you mean `cachedb db upgrade`?); see `cachedb db --help`"),
        ("frobnicate", "no such command 'frobnicate'; see `cachedb --help`"),
        ("blob frobnicate", "no such command 'frobnicate'; see `cachedb blob --help`"),
    ],
)
def test_a_mistyped_command_is_an_error_of_one_line(cachedb: Run, line: str, expected: str) -> None:
    done = cachedb(*line.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"cachedb: {expected}\n")
