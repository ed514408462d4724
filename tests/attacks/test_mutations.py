"""The list of mutations fits the code: which of them is noticed, `python -m tests.attacks.mutations` says."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.attacks.mutations import CHECKOUT, MUTATIONS, Mutation, mutated


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_mutation_is_of_a_line_that_is_there(mutation: Mutation) -> None:
    assert mutated(mutation) != (CHECKOUT / mutation.file).read_text()
    files = [word for word in mutation.tests.split() if word.endswith(".py")]
    assert files
    assert all((CHECKOUT / file).is_file() for file in files)


def test_a_mutation_has_a_name_of_its_own() -> None:
    assert max(Counter(mutation.what for mutation in MUTATIONS).values()) == 1


@pytest.mark.parametrize(
    ("line", "without", "why"),
    [
        ("no such line", "", "has this line 0 times"),
        ("import ", "", "has this line . times"),
        ("def blob_path(", "def (", "would be no Python"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(line: str, without: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"^it: cachedb/disk/layout.py {why}"):
        mutated(Mutation("it", "cachedb/disk/layout.py", line, without, ""))
