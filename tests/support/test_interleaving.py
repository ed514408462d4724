"""The stepping of two processes through every order, at a store that is one file with a number in it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import interleaving
from tests.support.interleaving import Failed, Order, Steps, Zygote, every_order, run

pytestmark = pytest.mark.attack


def act(actor: str, directory: Path, steps: Steps) -> object:
    """Add one to the number, in two steps; with the lock or without."""
    path = directory / "number"
    with steps.stepped():
        if actor == "locked":
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
            steps.wants("lock", "wait for the lock")
            fcntl.flock(lock, fcntl.LOCK_EX)
        steps.step("file", "read")
        number = int(path.read_text())
        if actor == "stuck":
            time.sleep(60)
        if actor == "dies":
            os._exit(1)
        steps.step("file", "write")
        path.write_text(str(number + 1))
        if actor == "locked":
            fcntl.flock(lock, fcntl.LOCK_UN)
            steps.released("lock")
    if actor == "fails":
        raise ValueError("as it must")
    return number


def warm() -> None:
    """Nothing here is slow."""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(__name__, Path(__file__).parents[2]) as started:
        yield started


def words(zygote: Zygote, actor: str, directory: Path, kinds: str = "file", seed: int | None = None) -> dict[str, int]:
    """Run every order of two of the same, and return the number that each leaves."""
    found = {}

    def run_one(choose: interleaving.Choose) -> Order:
        (directory / "number").write_text("0")
        return run(zygote, (actor, actor), directory, [kinds], choose=choose)

    for order in every_order(run_one, seed):
        assert order.word not in found
        found[order.word] = int((directory / "number").read_text())
    return found


def test_every_order_is_run_once_and_those_that_lose_an_update_are_found(zygote: Zygote, tmp_path: Path) -> None:
    found = words(zygote, "plain", tmp_path)
    assert found == {"AABB": 2, "ABAB": 1, "ABBA": 1, "BAAB": 1, "BABA": 1, "BBAA": 2}


def test_a_seed_gives_the_same_orders_in_an_order_of_its_own(zygote: Zygote, tmp_path: Path) -> None:
    found = [list(words(zygote, "plain", tmp_path, seed=seed)) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1]
    assert len({tuple(order) for order in found}) > 1
    assert all(sorted(order) == sorted(found[0]) for order in found)


def test_an_order_that_a_lock_keeps_out_is_none(zygote: Zygote, tmp_path: Path) -> None:
    assert words(zygote, "locked", tmp_path) == {"AAABBB": 2, "BBBAAA": 2}


def test_of_points_in_a_row_the_first_may_stand_for_all(zygote: Zygote, tmp_path: Path) -> None:
    assert words(zygote, "plain", tmp_path, "file*") == {"AB": 2, "BA": 2}


@pytest.mark.parametrize("actor", ["stuck", "dies"])
def test_an_actor_that_comes_to_no_stop_is_a_failure_that_names_the_order(
    zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actor: str
) -> None:
    monkeypatch.setattr(interleaving, "PATIENCE", 5.0)
    (tmp_path / "number").write_text("0")
    with pytest.raises(Failed, match=r"in the order AB: .*B at 'file read'"):
        run(zygote, ("plain", actor), tmp_path, ["file"], choose=lambda begun: "ABBB"[len(begun)])


def test_an_actor_that_fails_says_how(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    order = run(zygote, ("plain", "fails"), tmp_path, ["file"], choose=lambda begun: "A")
    assert [(outcome.value, outcome.error) for outcome in order.outcomes] == [(0, ""), (None, "ValueError")]
