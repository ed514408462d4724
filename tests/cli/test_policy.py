"""The commands of `policy`: what they print, check and install."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.disk.layout import POLICY_FILE
from cachedb.operations.policy import parse_policy
from cachedb.operations.policy_file import load_policy
from tests.conftest import Run
from tests.operations.test_policy import EXAMPLE, MEANING

NO_POLICY = "there is no policy.toml: `cachedb policy edit` writes one\n"


def edit_with(tmp_path: Path, script: str) -> dict[str, str]:
    """Return an environment whose editor is a shell script, with a folder of its own for the edited copy."""
    editor, folder = tmp_path / "editor", tmp_path / "edited"
    editor.write_text(f"#!/bin/sh\n{script}\n")
    editor.chmod(0o755)
    folder.mkdir(exist_ok=True)
    return {**os.environ, "VISUAL": shlex.quote(str(editor)), "TMPDIR": str(folder)}


# show


def test_show_prints_the_policy_and_the_default(cache: Cache, cachedb: Run) -> None:
    default = '\n# cachedb adds this rule, because no other one has used-within\n[[keep]]\nused-within = "10m"\n'
    assert cachedb("policy", "show").stdout == f"# {NO_POLICY}{default}"
    cache.set_policy('[limits]\nmax-size = "1.5GB"\n')
    expected = f'# {cache.directory}/policy.toml\n\n[limits]\nmax-size = "1500MB"\n{default}'
    assert cachedb("policy", "show").stdout == expected


def test_show_prints_a_policy_that_means_the_same(cache: Cache, cachedb: Run) -> None:
    cache.set_policy(EXAMPLE)
    assert parse_policy(cachedb("policy", "show").stdout) == MEANING


def test_show_prints_the_policy_as_json(cache: Cache, cachedb: Run) -> None:
    found = json.loads(cachedb("policy", "show", "--format", "json").stdout)
    empty = {"max_size": None, "min_free": None, "down_to": 1.0}
    assert found == {"limits": empty, "keep": [], "remove": [], "default_used_within": 600}
    cache.set_policy(EXAMPLE)
    found = json.loads(cachedb("policy", "show", "--format", "json").stdout)
    assert found["limits"] == MEANING.limits._asdict()
    for kind in ("keep", "remove"):
        rules = [
            {**rule, "names": tuple(rule["names"]), "labels": tuple(rule["labels"].items())} for rule in found[kind]
        ]
        assert rules == [rule._asdict() for rule in getattr(MEANING, kind)]
    assert found["default_used_within"] is None


def test_show_and_check_create_no_cache(directory: Path, cachedb: Run) -> None:
    for command in ("show", "check"):
        done = cachedb("policy", command)
        assert (done.returncode, done.stderr) == (0, "")
    assert not directory.exists()


# check


def test_check_names_the_line_of_a_mistake(cache: Cache, cachedb: Run, tmp_path: Path) -> None:
    path = tmp_path / "new.toml"
    path.write_text("[limits]\n\nmax_size = 1\n")
    done = cachedb("policy", "check", path)
    assert done.returncode == 2
    assert done.stderr == f"cachedb: {path}, line 3: unknown key 'max_size': use max-size, min-free or down-to\n"
    (cache.directory / POLICY_FILE).write_text("[[keep]]\n")
    for command in ("check", "show"):
        done = cachedb("policy", command)
        assert done.returncode == 2
        assert done.stderr.startswith("cachedb: policy.toml, line 1: the rule has no condition: use names, ")


def test_check_counts_what_a_valid_policy_has(cache: Cache, cachedb: Run) -> None:
    assert cachedb("policy", "check").stdout == NO_POLICY
    cache.set_policy(EXAMPLE)
    assert cachedb("policy", "check").stdout == "policy.toml is valid: 2 limits, 3 keep rules, 3 remove rules\n"
    done = cachedb("policy", "check", "-", input="[[remove]]\nnewest = 3\n")
    assert done.stdout == "- is valid: 0 limits, 0 keep rules, 1 remove rule\n"


@pytest.mark.usefixtures("cache")
def test_check_runs_queries_on_the_cache(cachedb: Run) -> None:
    done = cachedb("policy", "check", "-", input='[[keep]]\nsql = "SELECT nothing FROM image_usage"\n')
    assert done.returncode == 2
    assert done.stderr.startswith("cachedb: -, line 2: sql: ")


def test_check_says_that_queries_need_a_cache(directory: Path, cachedb: Run) -> None:
    done = cachedb("policy", "check", "-", input='[[keep]]\nsql = "SELECT nothing FROM image_usage"\n')
    assert done.returncode == 0
    assert done.stderr == "cachedb: the queries were not run, because there is no cache\n"
    assert not directory.exists()


# edit


def test_edit_installs_the_edited_copy(cache: Cache, cachedb: Run, tmp_path: Path) -> None:
    environment = edit_with(tmp_path, f"printf '{EXAMPLE}' >> \"$1\"".replace("%", "%%"))
    done = cachedb("policy", "edit", env=environment)
    assert (done.returncode, done.stdout) == (0, f"installed {cache.directory}/policy.toml\n"), done.stderr
    assert load_policy(cache.directory) == MEANING
    environment = edit_with(tmp_path, "sed -i 's/200GB/100GB/' \"$1\"")
    assert cachedb("policy", "edit", env=environment).returncode == 0
    assert load_policy(cache.directory).limits.max_size == 100 * 10**9
    assert os.listdir(tmp_path / "edited") == []


def test_edit_offers_a_template_that_changes_nothing_as_it_is(directory: Path, cachedb: Run, tmp_path: Path) -> None:
    environment = edit_with(tmp_path, f'cp "$1" "{tmp_path}/offered"')
    done = cachedb("policy", "edit", env=environment)
    assert (done.returncode, done.stdout) == (0, "the policy is unchanged\n")
    assert not directory.exists()
    offered = (tmp_path / "offered").read_text()
    assert parse_policy(offered) == parse_policy("")
    without_marks = parse_policy("\n".join(line.removeprefix("#") for line in offered.splitlines()[1:]))
    assert without_marks.limits.max_size == 200 * 10**9
    assert without_marks.keep
    assert without_marks.remove


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ('echo "newest = 3" >> "$1"', 2, "policy.toml, line 4: unknown table 'newest'"),
        ("exit 7", 1, "Editing failed"),
    ],
)
def test_edit_keeps_the_policy_and_the_text_after_a_failure(
    cache: Cache, cachedb: Run, tmp_path: Path, script: str, code: int, message: str
) -> None:
    cache.set_policy("limits.max-size = '1GB'\n\n\n")
    done = cachedb("policy", "edit", env=edit_with(tmp_path, script))
    assert done.returncode == code
    assert message in done.stderr
    (kept,) = (tmp_path / "edited").iterdir()
    if code == 2:
        assert f"the edited text is in {str(kept)!r}" in done.stderr
        assert kept.read_text().endswith("newest = 3\n")
    assert load_policy(cache.directory).limits.max_size == 10**9


def test_edit_does_not_overwrite_the_change_of_another_process(cache: Cache, cachedb: Run, tmp_path: Path) -> None:
    path = cache.directory / POLICY_FILE
    script = f'echo \'limits.max-size = "1GB"\' > "{path}"; echo \'limits.max-size = "2GB"\' > "$1"'
    done = cachedb("policy", "edit", env=edit_with(tmp_path, script))
    assert done.returncode == 1
    assert done.stderr.endswith("another process has changed policy.toml meanwhile: edit it again\n")
    assert load_policy(cache.directory).limits.max_size == 10**9
