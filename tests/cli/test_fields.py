"""Rows in the columns and the format that the user chooses."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cachedb import Cache
from cachedb.cli.fields import IMAGE_FIELDS, describe_image, print_records
from cachedb.cli.main import cli
from cachedb.cli.options import Output
from tests.conftest import Run
from tests.support import make

LONG = "registry.example.org:5000/" + "team/" * 12 + "app:1"


@pytest.fixture
def filled(cache: Cache) -> Cache:
    make.save(cache, "app:1", make.image(1))
    cache.save_manifest("lacking:1", make.image(2, 3).manifest)
    return cache


def listed(cache: Cache, *words: str) -> str:
    done: Result = CliRunner().invoke(cli, ["--dir", str(cache.directory), "ls", *words])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_chosen_columns_are_printed_in_the_chosen_order_by_either_of_their_names(filled: Cache) -> None:
    assert listed(filled, "--columns", "state,NAME,tag,reference,last_used_at").splitlines() == [
        "STATE       NAME       TAG  TAG  LAST USED",
        "complete    app:1      1    1    just now",
        "incomplete  lacking:1  1    1    just now",
    ]
    assert listed(filled, "--columns", "name", "--no-header") == "app:1\nlacking:1\n"


def test_the_platforms_of_an_image_are_printed_if_they_are_chosen(cache: Cache) -> None:
    make.save_index(cache, "both:1", make.image(2), make.image(2, architecture="arm64"))
    make.save(cache, "one:1", make.image(2))
    assert listed(cache, "--columns", "name,platforms,platform").splitlines() == [
        "NAME    PLATFORMS                 PLATFORM",
        "both:1  linux/amd64, linux/arm64  -",
        "one:1   linux/amd64               linux/amd64",
    ]
    assert listed(cache, "one:1", "--format", "{{.Platforms}}") == "linux/amd64\n"
    chosen = json.loads(listed(cache, "both:1", "--format", "json", "--columns", "platforms"))
    assert chosen == [{"platforms": ["linux/amd64", "linux/arm64"]}]
    assert listed(cache, "both:1", "--format", "csv", "--columns", "platforms") == (
        'platforms\n"linux/amd64, linux/arm64"\n'
    )


def test_csv_and_tsv_have_exact_values_under_the_keys_of_the_json(filled: Cache) -> None:
    rows = list(csv.DictReader(io.StringIO(listed(filled, "--format", "csv"))))
    images = json.loads(listed(filled, "--format", "json"))
    for row, image in zip(rows, images, strict=True):
        texts = {key: "" if value is None else str(value) for key, value in image.items() if key in row}
        assert row == {**texts, "complete": json.dumps(image["complete"])}
    assert set(rows[0]) >= {"name", "digest", "size", "created", "complete"}
    size = images[0]["size"]
    assert listed(filled, "--format", "tsv", "--columns", "name,size", "--no-header").startswith(f"app:1\t{size}\n")


def test_json_has_a_name_in_every_row_and_only_the_chosen_columns(filled: Cache) -> None:
    images = json.loads(listed(filled, "--format", "json"))
    assert [image["name"] for image in images] == ["app:1", "lacking:1"]
    assert [image["complete"] for image in images] == [True, False]
    lines = listed(filled, "--format", "ndjson").splitlines()
    assert [json.loads(line) for line in lines] == images
    chosen = json.loads(listed(filled, "--format", "json", "--columns", "name,state"))
    assert chosen == [{"name": "app:1", "complete": True}, {"name": "lacking:1", "complete": False}]


def test_a_template_is_filled_as_docker_fills_it(filled: Cache) -> None:
    image = filled.get_image("app:1")
    assert listed(filled, "--format", r"{{.Name}}\t{{ .digest }} {{.STATE}}!\n").startswith(
        f"app:1\t{image.digest} complete!\n\n"
    )
    assert json.loads(listed(filled, "app:1", "--format", "{{json .}}"))["name"] == "app:1"
    assert listed(filled, "app:1", "--format", "{{json .Size}} {{json .Complete}}") == f"{image.size} true\n"
    assert listed(filled, "--format", r"table {{.Name}}\t{{.State}}").splitlines() == [
        "NAME       STATE", "app:1      complete", "lacking:1  incomplete",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--columns", "name,weight"], "'weight' is not a column: use name, repository, tag"),
        (["--format", "{{.Weight}}"], "'Weight' is not a column"), (["--format", "{{len .Name}}"], "is not a template"),
        (["--format", "{{.}}"], "is not a column"), (["--format", "{{.Name}} }}"], "is not a template"),
        (["--format", "{{.Name}}", "--columns", "name"], "exclude each other"), (["--format", "xml"], "ndjson, csv"),
    ],
)  # fmt: skip
def test_an_unknown_column_or_template_is_wrong_usage(
    cachedb: Run, filled: Cache, words: list[str], message: str
) -> None:
    done = cachedb("ls", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_control_characters_in_a_config_do_not_reach_a_table_or_template(capsys: pytest.CaptureFixture[str]) -> None:
    record = dict.fromkeys((field.key for field in IMAGE_FIELDS), None) | {"author": "\x1b[2J"}
    for form in ("table", "{{.Author}}"):
        print_records([record], IMAGE_FIELDS, Output(form, ("author",) if form == "table" else (), has_heading=False))
        assert capsys.readouterr().out == "\\x1b[2J\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Cache, int], str]:
    """Return a function that prints the images of a cache on a terminal with some columns."""

    def show(cache: Cache, width: int) -> str:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((width, 24)))
        records = list(map(describe_image, cache.list_manifests()))
        print_records(records, IMAGE_FIELDS, Output("table", (), has_heading=True))
        return capsys.readouterr().out

    return show


def test_a_narrow_terminal_leaves_out_columns_but_cuts_no_name(
    cache: Cache, terminal: Callable[[Cache, int], str]
) -> None:
    make.save(cache, LONG, make.image(1))
    digest = cache.get_image(LONG).digest[:19]
    wide, narrower, narrow, vertical = (terminal(cache, width) for width in (160, 140, 120, 60))
    assert "ADDED" in wide
    assert ("ADDED" in narrower, digest in narrower) == (False, True)
    assert ("ADDED" in narrow, digest in narrow, "STATE" in narrow) == (False, False, True)
    assert all(LONG in shown and len(shown.splitlines()) == 2 for shown in (wide, narrower, narrow))
    assert vertical.splitlines() == [
        f"NAME     {LONG}", f"DIGEST   {digest}", "SIZE     10.9 kB", "CREATED  -", "ADDED    just now",
        "STATE    complete",
    ]  # fmt: skip


def test_an_unchosen_terminal_column_is_never_missing_from_a_pipe(cachedb: Run, directory: Path) -> None:
    with Cache.open(directory) as cache:
        make.save(cache, LONG, make.image(1))
    heading, row = cachedb("ls", env={**os.environ, "COLUMNS": "20"}).stdout.splitlines()
    assert heading.split() == ["NAME", "DIGEST", "SIZE", "CREATED", "ADDED", "STATE"]
    assert row.startswith(LONG)
