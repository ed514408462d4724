"""Automatic pruning: a pull makes room before its first byte, and others prune when they have acknowledged."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachedb import Busy, Cache, CacheError, NoRoom, Policy
from cachedb.content import publish
from cachedb.disk import downloads, single_flight
from cachedb.disk.downloads import measure_fresh
from cachedb.disk.layout import partial_path
from cachedb.disk.sizes import FileSystem, measure_files
from cachedb.index import blobs
from cachedb.oci.digests import Digest
from cachedb.operations import gauge, plan, prune, room
from cachedb.operations.plan import Plan
from cachedb.operations.prune import CLAIM_KEY, Pruned
from tests.conftest import Run, run_python, snapshot
from tests.support import make
from tests.support.ages import age
from tests.support.faults import ALWAYS, Answer, Call
from tests.support.registries import Registry, isolate_client  # noqa: F401 - isolate_client is a fixture
from tests.support.waiting import wait_until

MB = 1_000_000
OLD, NEW, OTHER = (make.image(seed, size=3 * MB) for seed in (1, 2, 3))
SHARING = make.image(1, 4, size=3 * MB)  # shares its larger half with `OLD`

pytestmark = pytest.mark.usefixtures("check_promises")


@pytest.fixture
def remote() -> Iterator[Registry]:
    with Registry() as made:
        made.add(NEW, "new", "1")
        made.add(SHARING, "sharing", "1")
        yield made


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return a function that returns the messages so far, from warnings on, and of prunes."""
    caplog.set_level(logging.INFO, "cachedb")
    monkeypatch.setattr(logging.getLogger("cachedb"), "propagate", True)  # the command line turns it off
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING or hasattr(record, "pruned")
    ]


def save_old(cache: Cache, name: str, image: make.ImageContent, days: int = 1) -> None:
    make.save(cache, name, image)
    age(cache, "last_used_at", name, days=days)


def limit(cache: Cache, text: str = 'max-size = "5MB"', *, used_within: str = "0s", more: str = "") -> None:
    """Install a policy with limits that keeps images used in a time only."""
    cache.set_policy(f'[limits]\n{text}\n[[keep]]\nused-within = "{used_within}"\n{more}')


def names_of(cache: Cache) -> list[str]:
    return [str(name) for name in cache.list_names()]


# A pull


def test_a_pull_makes_room_before_the_first_byte(
    cache: Cache, remote: Registry, logged: Callable[[], list[str]]
) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)
    before = list[list[str]]()

    def note_names(call: Call) -> Answer:
        before.append(names_of(cache))
        return call.serve()

    remote.fault(note_names, path="/v2/new/blobs/", times=ALWAYS)
    pulled = cache.pull(f"{remote.host}/new:1")
    assert before == [[], []]
    assert pulled.image.complete
    assert logged() == ["pruned 1 image, 3.01 MB"]


def test_a_pull_removes_no_more_than_it_needs(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD, days=2)
    save_old(cache, "other:1", OTHER, days=1)
    limit(cache, 'max-size = "8MB"')
    cache.pull(f"{remote.host}/new:1")
    assert names_of(cache) == [f"{remote.host}/new:1", "other:1"]


def test_a_pull_that_fits_removes_nothing(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache, 'max-size = "9MB"')
    cache.pull(f"{remote.host}/new:1")
    assert names_of(cache) == [f"{remote.host}/new:1", "old:1"]


def test_a_pull_without_room_fails_before_the_first_byte_and_removes_nothing(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD)
    make.save(cache, "kept:1", OTHER)
    cache.add_hold("kept:1")
    limit(cache)
    before = snapshot(cache.directory)
    with pytest.raises(NoRoom, match=r"/new:1 needs 3.01 MB: cannot free .* the rest stays .*3.01 MB held") as raised:
        cache.pull(f"{remote.host}/new:1")
    assert "\n" not in str(raised.value)
    assert snapshot(cache.directory) == before
    assert not [request for request in remote.requests if "/blobs/" in request.path]


def test_an_image_that_is_larger_than_the_limit_has_an_error_of_its_own(cache: Cache, remote: Registry) -> None:
    limit(cache, 'max-size = "2MB"')
    with pytest.raises(NoRoom, match=r"needs 3.01 MB, more than max-size in policy\.toml: raise the limit"):
        cache.pull(f"{remote.host}/new:1")


def test_a_pull_goes_down_to_a_part_of_the_limit(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD, days=2)
    save_old(cache, "other:1", OTHER, days=1)
    limit(cache, 'max-size = "8MB"\ndown-to = "60%"')
    cache.pull(f"{remote.host}/new:1")
    assert names_of(cache) == [f"{remote.host}/new:1"]


def test_a_part_of_the_limit_that_is_out_of_reach_stops_no_pull(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD)
    make.save(cache, "held:1", OTHER)
    cache.add_hold("held:1")
    limit(cache, 'max-size = "8MB"\ndown-to = "10%"')
    cache.pull(f"{remote.host}/new:1")
    assert names_of(cache) == [f"{remote.host}/new:1", "held:1"]


@pytest.mark.parametrize(
    ("text", "free"), [('min-free = "1MB"', 3_500_000), ('min-free = "10%"', 5 * MB), ('max-size = "1GB"', 2 * MB)]
)
def test_a_pull_leaves_space_of_the_file_system_free(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch, text: str, free: int
) -> None:
    save_old(cache, "old:1", OLD)
    save_old(cache, "other:1", OTHER, days=2)
    limit(cache, text)
    start = measure_blobs(cache)

    def measure(_: Path) -> FileSystem:
        return FileSystem(20 * MB, free + start - measure_blobs(cache) - sum_partials(cache))

    for module in (gauge, plan):
        monkeypatch.setattr(module, "measure_file_system", measure)
    cache.pull(f"{remote.host}/new:1")
    assert names_of(cache) == [f"{remote.host}/new:1", "old:1"]
    assert measure(cache.directory).free >= 0


def measure_blobs(cache: Cache) -> int:
    return sum(path.stat().st_size for path in cache.directory.glob("blobs/*/*"))


def sum_partials(cache: Cache) -> int:
    kept = measure_files(cache.directory).kept
    return kept["partial downloads"] + kept["ingest"]


def test_a_pull_keeps_the_blobs_that_it_shares_with_an_image_that_goes(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD)
    save_old(cache, "other:1", OTHER)
    limit(cache, 'max-size = "9MB"', more='[[remove]]\nnames = ["old:1"]\n')
    cache.pull(f"{remote.host}/sharing:1")
    assert names_of(cache) == [f"{remote.host}/sharing:1"]
    assert not [request for request in remote.requests if request.path.endswith(make.digest_of(OLD.layers[0]))]


def test_a_pull_counts_only_the_bytes_that_it_adds(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache, 'max-size = "8.5MB"')
    cache.pull(f"{remote.host}/sharing:1")  # adds 3 MB to those of old:1
    assert names_of(cache) == [f"{remote.host}/sharing:1", "old:1"]


def test_bytes_of_an_interrupted_download_count_once(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache, 'max-size = "8.5MB"')
    layer = NEW.layers[0]
    path = partial_path(cache.directory, Digest(make.digest_of(layer)))
    path.parent.mkdir()
    make.write_bytes(path, layer[: 2 * MB])
    cache.pull(f"{remote.host}/new:1")
    assert names_of(cache) == [f"{remote.host}/new:1", "old:1"]


def test_a_stale_download_counts_whole_because_a_prune_removes_it(tmp_path: Path) -> None:
    path = make.write_bytes(tmp_path / "partial", b"1234")
    assert measure_fresh(path) == 4
    os.utime(path, (time.time() - 2 * 86400, time.time() - 2 * 86400))
    assert measure_fresh(path) == 0
    assert measure_fresh(tmp_path / "missing") == 0


def test_a_pull_waits_for_another_prune_then_looks_again(cache: Cache, remote: Registry) -> None:
    save_old(cache, "old:1", OLD, days=2)
    save_old(cache, "other:1", OTHER, days=1)
    limit(cache, 'max-size = "8MB"')
    pulling = threading.Thread(target=cache.pull, args=(f"{remote.host}/new:1",))
    with Cache.open(cache.directory) as second:
        with single_flight.try_claim(cache.directory, CLAIM_KEY) as has_claim:
            assert has_claim
            pulling.start()
            assert wait_until(lambda: any("/manifests/" in request.path for request in remote.requests))
            second.remove_manifest("other:1")  # as the other process chose
        pulling.join()
    assert names_of(cache) == [f"{remote.host}/new:1", "old:1"]
    with (
        Cache.open(cache.directory, wait=0) as impatient,
        single_flight.try_claim(cache.directory, CLAIM_KEY),
    ):
        remote.add(OTHER, "other", "1")
        result = list[BaseException]()

        def pull() -> None:
            try:
                impatient.pull(f"{remote.host}/other:1")
            except BaseException as error:
                result.append(error)

        other = threading.Thread(target=pull)
        other.start()
        other.join()
        assert isinstance(result[0], Busy)


def test_a_pull_plans_again_if_a_planned_image_was_used_meanwhile(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_old(cache, "old:1", OLD, days=2)
    save_old(cache, "other:1", OTHER, days=1)
    limit(cache, 'max-size = "8MB"')
    planned = list[list[str]]()
    real = prune.remove_planned

    def use_then_remove(database: object, made: Plan) -> Pruned:
        planned.append([str(image.name) for image in made.images])
        if len(planned) == 1:
            age(cache, "last_used_at", "old:1", seconds=1)
        return real(cache._database, made)

    monkeypatch.setattr(prune, "remove_planned", use_then_remove)
    seen = list[list[str]]()

    def note_names(call: Call) -> Answer:
        seen.append(names_of(cache))
        return call.serve()

    remote.fault(note_names, path="/v2/new/blobs/")
    cache.pull(f"{remote.host}/new:1")
    assert seen == [["old:1"]]
    assert planned == [["old:1"], ["other:1"]]
    assert names_of(cache) == [f"{remote.host}/new:1", "old:1"]


def test_two_pulls_at_the_same_time_leave_the_cache_within_its_limit(
    cache: Cache, remote: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote.add(OTHER, "other", "1")
    save_old(cache, "old:1", OLD)
    limit(cache, 'max-size = "8MB"')
    both = threading.Barrier(2)

    def wait_for_both(call: Call) -> Answer:
        both.wait(300)  # both have found room by now
        return call.serve()

    for image, name in ((NEW, "new"), (OTHER, "other")):
        remote.fault(wait_for_both, path=f"/v2/{name}/blobs/{make.digest_of(image.layers[0])}")
    pulls = [threading.Thread(target=cache.pull, args=(f"{remote.host}/{name}:1",)) for name in ("new", "other")]
    for pull in pulls:
        pull.start()
    for pull in pulls:
        pull.join()
    assert measure_blobs(cache) < 8 * MB
    assert "old:1" not in names_of(cache)


def test_an_invalid_policy_stops_neither_a_pull_nor_an_import(
    cache: Cache, remote: Registry, tmp_path: Path, logged: Callable[[], list[str]]
) -> None:
    (cache.directory / "policy.toml").write_text("[limit]\n")
    cache.pull(f"{remote.host}/new:1")
    cache.cache_from_tar(write_archive(tmp_path, OLD), "old:1")
    assert logged() == [
        "cannot prune automatically: policy.toml, line 1: unknown table 'limit': use limits, keep or remove"
    ]
    limit(cache, more='[[remove]]\nsql = "SELECT name FROM image_usage"\n')
    (cache.directory / "policy.toml").write_text('[limits]\nmax-size = "5MB"\n[[remove]]\nsql = "SELECT nam FROM x"\n')
    remote.add(OTHER, "other", "1")
    cache.pull(f"{remote.host}/other:1")
    assert len(names_of(cache)) == 3
    assert [message.partition(":")[0] for message in logged()[1:]] == [
        "cannot make room for 127.0.0.1",
        "cannot prune automatically",
    ]


# Import, save and adopt


def write_archive(folder: Path, image: make.ImageContent) -> Path:
    return make.write(folder / "archive.tar", make.oci_files({"new:1": image}))


def import_new(cache: Cache, folder: Path) -> None:
    cache.cache_from_tar(write_archive(folder, NEW), "new:1")


def save_new(cache: Cache, _: Path) -> None:
    make.save(cache, "new:1", NEW)


def adopt_new(cache: Cache, folder: Path) -> None:
    make.json_cache(folder / "older", {"new/1": NEW})
    cache.adopt(folder / "older")


def pull_new(cache: Cache, _: Path) -> None:
    with Registry() as remote:
        remote.add(NEW, "new", "1")
        cache.pull(f"{remote.host}/new:1")


ADDITIONS = [import_new, save_new, adopt_new]


@pytest.mark.parametrize("add", ADDITIONS)
def test_an_acknowledged_image_is_followed_by_a_prune(
    cache: Cache, tmp_path: Path, logged: Callable[[], list[str]], add: Callable[[Cache, Path], None]
) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)
    add(cache, tmp_path)
    assert names_of(cache) == ["new:1"]
    assert logged() == ["pruned 1 image, 3.01 MB"]


def test_a_single_blob_is_followed_by_a_prune(cache: Cache) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)
    assert cache.has_blob(cache.add_blob(NEW.layers[0]))
    assert names_of(cache) == []


@pytest.mark.parametrize("add", [*ADDITIONS, pull_new])
def test_the_images_of_an_operation_survive_its_own_prune(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add: Callable[[Cache, Path], None]
) -> None:
    monkeypatch.setattr(room, "_RETRY_SECONDS", 0.0)
    save_old(cache, "old:1", OLD)
    limit(cache, 'max-size = "1MB"' if add is not pull_new else 'max-size = "5MB"', more='[[remove]]\nnames = ["*"]\n')
    add(cache, tmp_path)
    (name,) = names_of(cache)
    assert name.endswith("new:1")
    assert cache.is_image_complete(name)


@pytest.mark.parametrize("add", ADDITIONS)
def test_a_limit_that_cannot_be_met_is_a_warning_once_a_minute(
    cache: Cache,
    tmp_path: Path,
    logged: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    add: Callable[[Cache, Path], None],
) -> None:
    make.save(cache, "held:1", OTHER)
    cache.add_hold("held:1")
    limit(cache)
    add(cache, tmp_path)
    assert names_of(cache) == ["held:1", "new:1"]
    cache.add_blob(b"more")
    (message,) = logged()
    assert message.startswith("cannot prune automatically: cannot free ")
    assert ", because the rest stays (" in message
    assert " MB held" in message
    monkeypatch.setattr(cache._room, "_retry_at", time.monotonic())
    cache.add_blob(b"and more")
    assert len(logged()) == 2


def test_a_prune_that_fails_is_a_warning(
    cache: Cache, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)

    def fail(*_: object) -> None:
        raise CacheError("the disk is gone")

    monkeypatch.setattr(prune, "remove_planned", fail)
    make.save(cache, "new:1", NEW)
    assert names_of(cache) == ["new:1", "old:1"]
    assert logged() == ["cannot prune automatically: the disk is gone"]


def test_a_claim_that_cannot_be_taken_is_a_warning(
    cache: Cache, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(cache)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(single_flight, "_take_claim", fail)
    cache.add_blob(b"stored")
    (message,) = logged()
    assert message.startswith("cannot prune automatically: cannot make a lock file: No space left on device")


def test_another_prune_is_not_waited_for(cache: Cache, logged: Callable[[], list[str]]) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)
    done = threading.Event()

    def save() -> None:
        make.save(cache, "new:1", NEW)
        done.set()

    with single_flight.try_claim(cache.directory, CLAIM_KEY):
        thread = threading.Thread(target=save)
        thread.start()
        assert done.wait(60)
        thread.join()
        assert names_of(cache) == ["new:1", "old:1"]
        assert logged() == []
    cache.add_blob(b"more")
    assert names_of(cache) == ["new:1"]


@pytest.mark.slow
def test_a_prune_looks_again_for_images_that_came_meanwhile(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    save_old(cache, "old:1", OLD, days=2)
    save_old(cache, "old:2", OTHER, days=1)
    limit(cache, 'max-size = "8MB"')
    real, removed = room.Room._remove, list[int]()

    def remove(self: room.Room, made: Plan) -> Pruned:
        done = real(self, made)
        if not removed:
            removed.append(len(done.images))
            thread = threading.Thread(target=make.save, args=(cache, "late:1", make.image(7, size=3 * MB)))
            thread.start()  # it finds the claim taken
            thread.join()
        return done

    monkeypatch.setattr(room.Room, "_remove", remove)
    cache.add_blob(NEW.layers[0])
    assert removed == [1]
    assert names_of(cache) == ["late:1"]


def test_an_image_that_comes_while_another_process_measures_is_noticed(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)
    real, looked = gauge.Gauge.is_short, list[bool]()

    def is_short(self: gauge.Gauge, *arguments: object) -> bool:
        found = real(self, *arguments)  # type: ignore[arg-type]
        if not looked:
            looked.append(found)
            thread = threading.Thread(target=make.save, args=(cache, "late:1", NEW))
            thread.start()
            thread.join()
        return found

    monkeypatch.setattr(gauge.Gauge, "is_short", is_short)
    cache.add_blob(b"a")
    assert looked == [False]
    assert names_of(cache) == ["late:1"]


@pytest.mark.parametrize("text", ['min-free = "1MB"', 'max-size = "1GB"'])
def test_an_import_prunes_before_its_first_byte_if_the_disk_is_short(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache, text)
    start, before = measure_blobs(cache), list[list[str]]()

    def measure(_: Path) -> FileSystem:
        return FileSystem(20 * MB, 2 * MB + start - measure_blobs(cache))

    real = publish.receive_and_save

    def receive_and_save(*arguments: object) -> object:
        before.append(names_of(cache))
        return real(*arguments)  # type: ignore[arg-type]

    for module in (gauge, plan):
        monkeypatch.setattr(module, "measure_file_system", measure)
    monkeypatch.setattr(publish, "receive_and_save", receive_and_save)
    cache.cache_from_tar(write_archive(tmp_path, NEW), "new:1")
    assert before == [[]]
    assert names_of(cache) == ["new:1"]


def test_a_short_disk_that_stays_short_stops_no_import(
    cache: Cache, tmp_path: Path, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(cache, 'min-free = "1MB"')
    measured = list[int]()

    def measure(_: Path) -> FileSystem:
        measured.append(1)
        return FileSystem(20 * MB, 0)

    for module in (gauge, plan):
        monkeypatch.setattr(module, "measure_file_system", measure)
    cache.cache_from_tar(write_archive(tmp_path, NEW), "new:1")
    assert names_of(cache) == ["new:1"]
    assert [message.partition(",")[0] for message in logged()] == [
        "cannot prune automatically: the import needs 3.02 MB: cannot free 4.02 MB more"
    ]
    count = len(measured)
    cache.add_blob(b"more")
    assert len(measured) == count, "it is tried again after a minute only"


# Which operations prune


def test_without_limits_nothing_is_measured_or_pruned(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = count_sums(monkeypatch)
    monkeypatch.setattr(gauge, "measure_file_system", lambda _: sums.append(1))
    cache.set_policy('[[remove]]\nnames = ["*"]\n[[keep]]\nused-within = "0s"\n')
    save_old(cache, "old:1", OLD)
    make.save(cache, "new:1", NEW)
    assert names_of(cache) == ["new:1", "old:1"]
    assert sums == []


def test_a_new_policy_applies_at_once(cache: Cache) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache, 'max-size = "1GB"')
    make.save(cache, "new:1", NEW)
    assert names_of(cache) == ["new:1", "old:1"]
    limit(cache)
    cache.add_blob(b"more")
    assert names_of(cache) == ["new:1"]
    (cache.directory / "policy.toml").unlink()
    make.save(cache, "old:1", OLD)
    assert names_of(cache) == ["new:1", "old:1"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", False),
        ("false", False),
        ("No", False),
        ("off", False),
        ("1", True),
        ("on", True),
        ("", True),
        (None, True),
    ],
)
def test_a_variable_of_the_environment_disables_automatic_prunes(
    directory: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    if value is not None:
        monkeypatch.setenv("CACHEDB_AUTO_PRUNE", value)
    with Cache.open(directory) as cache:
        save_old(cache, "old:1", OLD)
        limit(cache)
        make.save(cache, "new:1", NEW)
        assert names_of(cache) == (["new:1"] if expected else ["new:1", "old:1"])
        assert cache.prune(Policy(remove=())).images == []


def test_another_value_of_the_variable_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEDB_AUTO_PRUNE", "2")
    with pytest.raises(CacheError, match=r"CACHEDB_AUTO_PRUNE is '2': give 1 or 0"):
        Cache.open(directory)


@pytest.mark.slow
def test_without_a_policy_nothing_of_a_prune_is_imported(directory: Path) -> None:
    output = run_python(
        """
        import sys
        from cachedb import Cache
        with Cache.open(sys.argv[1]) as cache:
            cache.add_blob(b"x")
        print([name for name in sys.modules if name in ("cachedb.operations.plan", "cachedb.operations.policy")])
        """,
        directory,
        new_interpreter=True,
    )
    assert output == "[]\n"


@pytest.mark.slow
def test_a_forked_child_prunes_too(cache: Cache) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)
    output = run_python(
        """
        import os, sys
        from cachedb import Cache
        with Cache.open(sys.argv[1]) as cache:
            cache.add_blob(b"measured")
            if (child := os.fork()) == 0:
                cache.add_blob(bytes(3_000_000))
                print(cache.list_names(), flush=True)
                os._exit(0)
            os.waitpid(child, 0)
        """,
        cache.directory,
    )
    assert output == "[]\n"


# Priority


def test_a_plan_is_made_at_low_priority_and_removals_are_not(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)
    found = list[tuple[str, int]]()
    real_plan, real_remove = plan.make_plan, prune.remove_planned

    def note(what: str) -> None:
        found.append((what, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    def make_plan(*arguments: object, **options: object) -> Plan:
        note("plan")
        return real_plan(*arguments, **options)  # type: ignore[arg-type]

    def remove_planned(*arguments: object) -> Pruned:
        note("removal")
        return real_remove(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "make_plan", make_plan)
    monkeypatch.setattr(prune, "remove_planned", remove_planned)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    make.save(cache, "new:1", NEW)
    assert found == [("plan", min(own + 10, 19)), ("removal", own)]


# The gauge


def count_sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    real, sums = blobs.sum_sizes, list[int]()

    def sum_sizes(*arguments: object) -> blobs.Totals:
        sums.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(blobs, "sum_sizes", sum_sizes)
    return sums


def test_the_sizes_of_all_blobs_are_summed_only_near_a_limit(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = count_sums(monkeypatch)
    limit(cache, 'max-size = "8MB"')
    for number in range(5):
        cache.add_blob(make.random_bytes(MB, number))
    assert len(sums) == 1
    for number in range(5, 10):
        cache.add_blob(make.random_bytes(MB, number))
    assert len(sums) > 1


def test_a_bound_is_made_again_after_a_minute(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = count_sums(monkeypatch)
    limit(cache, 'max-size = "8MB"')
    monkeypatch.setattr(gauge, "_BOUND_SECONDS", 0.0)
    cache.add_blob(b"1")
    cache.add_blob(b"2")
    assert len(sums) > 1


def test_blobs_of_other_processes_and_absent_blobs_count(cache: Cache) -> None:
    limits = Policy().limits._replace(max_size=5 * MB)
    made = gauge.Gauge(cache._database)
    cache.save_manifest("new:1", NEW.manifest)  # its layer is absent, and its row an old one later
    assert not made.is_short(limits)
    assert not made.may_be_short(limits)
    with Cache.open(cache.directory) as other:
        other.save_blob(make.digest_of(NEW.layers[0]), NEW.layers[0])
        assert not made.may_be_short(limits)
        other.add_blob(make.random_bytes(3 * MB, 1))
    assert made.may_be_short(limits)
    assert made.is_short(limits)


def test_a_row_with_the_id_of_a_deleted_one_counts(cache: Cache) -> None:
    limits = Policy().limits._replace(max_size=5 * MB)
    made = gauge.Gauge(cache._database)
    with Cache.open(cache.directory) as other:
        other.add_blob(b"a")
        other.add_blob(b"b")
    assert not made.is_short(limits)
    cache.collect_garbage()
    cache.add_blob(make.random_bytes(6 * MB, 1))
    cache.add_blob(b"c")
    assert made.may_be_short(limits)
    assert made.is_short(limits)


def test_files_other_than_blobs_count(cache: Cache) -> None:
    limits = Policy().limits._replace(max_size=5 * MB)
    made = gauge.Gauge(cache._database)
    assert not made.is_short(limits)
    (cache.directory / "quarantine").mkdir()
    make.write_bytes(cache.directory / "quarantine" / "file", bytes(5 * MB))
    assert made.may_be_short(limits)
    assert made.is_short(limits)


# The command line


@pytest.mark.slow
def test_the_command_line_prints_a_line_for_an_automatic_prune(cache: Cache, cachedb: Run, tmp_path: Path) -> None:
    save_old(cache, "old:1", OLD)
    limit(cache)
    archive = write_archive(tmp_path, NEW)
    done = cachedb("import", archive, "new:1", "--format", "json")
    assert done.stderr == "cachedb: pruned 1 image, 3.01 MB\n"
    assert done.stdout.startswith("[")
    age(cache, "last_used_at", "new:1", days=1)
    done = cachedb("import", "-q", write_archive(tmp_path, OTHER), "other:1")
    assert (done.stdout, done.stderr) == ("other:1\n", "")
    assert names_of(cache) == ["other:1"]


def test_a_pull_without_room_exits_with_1(cache: Cache, cachedb: Run, remote: Registry) -> None:
    limit(cache, 'max-size = "2MB"')
    done = cachedb("pull", f"{remote.host}/new:1")
    assert done.returncode == 1
    assert done.stderr == (
        f"cachedb: {remote.host}/new:1 needs 3.01 MB, more than max-size in policy.toml: raise the limit\n"
    )


# Other pulls


def test_a_pull_without_room_beside_other_pulls_says_that_a_retry_may_help(cache: Cache, remote: Registry) -> None:
    digest = Digest(make.digest_of(OTHER.layers[0]))
    path = partial_path(cache.directory, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 3 * MB)
    limit(cache)

    def find_error() -> str:
        with pytest.raises(NoRoom) as raised:
            cache.pull(f"{remote.host}/new:1")
        return str(raised.value)

    advice = "or release holds; or retry when the other pulls, which are running now, have ended"
    with single_flight.try_claim(cache.directory, downloads.claim_key(digest)) as has_claim:
        assert has_claim
        assert find_error().endswith(advice)
        make.save(cache, "kept:1", OLD)
        cache.add_hold("kept:1")
        assert find_error().endswith("or release holds"), "the space of other pulls is not enough"
        cache.remove_manifest("kept:1")
        for hold in cache.list_holds():
            cache.release_hold(hold.id)
        cache.collect_garbage()
        assert find_error().endswith(advice)
    assert find_error().endswith("or release holds"), "an interrupted download does not end by itself"
    path.unlink()
    assert cache.pull(f"{remote.host}/new:1").image.complete
