"""The table of mutations fits the code; `python -m tests.attacks.mutations` runs the mutations."""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from functools import cache

import pytest

from tests.attacks.mutations import CHECKOUT, MUTATIONS, Mutation, mutate


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_the_line_and_the_tests_of_a_mutation_exist(mutation: Mutation) -> None:
    assert mutate(mutation) != (CHECKOUT / mutation.file).read_text()
    arguments = shlex.split(mutation.tests)
    files = [word for word in arguments if word.endswith(".py")]
    assert files
    assert all((CHECKOUT / file).is_file() for file in files)
    assert arguments[len(files) :: 2] in ([], ["-k"])
    names = " ".join(name for file in files for name in read_test_names(file))
    words = re.findall(r"\w+", " ".join(arguments[len(files) + 1 :]))
    assert [word for word in words if word not in ("and", "or", "not") and word not in names] == []


@cache
def read_test_names(file: str) -> list[str]:
    """Return the names of a file's test functions, without running pytest for each mutation."""
    nodes = ast.walk(ast.parse((CHECKOUT / file).read_text()))
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def test_no_two_mutations_are_the_same() -> None:
    assert max(Counter(mutation[1:] for mutation in MUTATIONS).values()) == 1


def test_no_two_mutations_have_the_same_name() -> None:
    assert max(Counter(mutation.what for mutation in MUTATIONS).values()) == 1


@pytest.mark.parametrize(
    ("line", "without", "why"),
    [
        ("no such line", "", "has this line .* times"),
        ("import ", "", "has this line .* times"),
        ("def blob_path(", "def (", "would not be valid Python"),
        ("return Path(blob_file(", "return Path(no_file(", "would use undefined names: no_file"),
        ("digest = parse_digest(name.", "parse_digest(name.", "would use undefined names: digest"),
    ],
)
def test_a_mutation_that_cannot_be_made_is_refused(line: str, without: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^it: cachedb/disk/layout.py {why}"):
        mutate(Mutation("it", "cachedb/disk/layout.py", line, without, ""))
