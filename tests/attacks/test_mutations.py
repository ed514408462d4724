"""The table of mutations fits the code; `python -m tests.attacks.mutations` runs the mutations."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.attacks.mutations import CHECKOUT, MUTATIONS, Mutation, mutate


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_the_line_and_the_tests_of_a_mutation_exist(mutation: Mutation) -> None:
    assert mutate(mutation) != (CHECKOUT / mutation.file).read_text()
    files = [word for word in mutation.tests.split() if word.endswith(".py")]
    assert files
    assert all((CHECKOUT / file).is_file() for file in files)


def test_no_two_mutations_have_the_same_name() -> None:
    assert max(Counter(mutation.what for mutation in MUTATIONS).values()) == 1


@pytest.mark.parametrize(
    ("line", "without", "why"),
    [
        ("no such line", "", "has this line 0 times"),
        ("import ", "", "has this line . times"),
        ("def blob_path(", "def (", "would not be valid Python"),
    ],
)
def test_a_mutation_that_cannot_be_made_is_refused(line: str, without: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^it: cachedb/disk/layout.py {why}"):
        mutate(Mutation("it", "cachedb/disk/layout.py", line, without, ""))
