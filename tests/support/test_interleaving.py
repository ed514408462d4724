"""Step two processes through every order; their store is one file that holds a number."""

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
    """Add one to the number in two steps, with or without the lock."""
    path = directory / "number"
    with steps.stepped():
        if actor == "locked":
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
            steps.announce_lock("lock", "wait for the lock")
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
            steps.report_released("lock")
    if actor == "fails":
        raise ValueError("as it must")
    return number


def warm() -> None:
    """Nothing here is slow."""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote(__name__, Path(__file__).parents[2]) as started:
        yield started


def run_all(zygote: Zygote, actor: str, directory: Path, kind: str = "file", seed: int | None = None) -> dict[str, int]:
    """Run every order of two equal actors; return the number that each order leaves, by word."""
    found = {}

    def run_one(choose: interleaving.Choose) -> Order:
        (directory / "number").write_text("0")
        return run(zygote, (actor, actor), directory, [kind], choose=choose)

    for order in every_order(run_one, seed):
        assert order.word not in found
        found[order.word] = int((directory / "number").read_text())
    return found


def test_every_order_runs_once_and_some_lose_an_update(zygote: Zygote, tmp_path: Path) -> None:
    found = run_all(zygote, "plain", tmp_path)
    assert found == {"AABB": 2, "ABAB": 1, "ABBA": 1, "BAAB": 1, "BABA": 1, "BBAA": 2}


def test_each_seed_runs_the_same_orders_in_another_sequence(zygote: Zygote, tmp_path: Path) -> None:
    found = [list(run_all(zygote, "plain", tmp_path, seed=seed)) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1]
    assert len({tuple(order) for order in found}) > 1
    assert all(sorted(order) == sorted(found[0]) for order in found)


def test_orders_that_a_lock_prevents_do_not_run(zygote: Zygote, tmp_path: Path) -> None:
    assert run_all(zygote, "locked", tmp_path) == {"AAABBB": 2, "BBBAAA": 2}


def test_with_an_asterisk_only_the_first_of_several_points_in_a_row_is_a_stop(zygote: Zygote, tmp_path: Path) -> None:
    assert run_all(zygote, "plain", tmp_path, "file*") == {"AB": 2, "BA": 2}


@pytest.mark.parametrize("actor", ["stuck", "dies"])
def test_an_actor_that_dies_or_does_not_stop_is_a_failure_that_names_the_order(
    zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actor: str
) -> None:
    monkeypatch.setattr(interleaving, "STEP_SECONDS", 5.0)
    (tmp_path / "number").write_text("0")
    with pytest.raises(Failed, match=r"in the order AB: .*B at 'file read'"):
        run(zygote, ("plain", actor), tmp_path, ["file"], choose=lambda word: "ABBB"[len(word)])


def test_the_outcome_of_a_failed_actor_names_the_error(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    order = run(zygote, ("plain", "fails"), tmp_path, ["file"], choose=lambda word: "A")
    assert [(outcome.value, outcome.error) for outcome in order.outcomes] == [(0, ""), (None, "ValueError")]
