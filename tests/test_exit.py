"""If no thread can be started, as during the interpreter's exit, the calling thread does the work."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cachedb import Cache
from cachedb.progress import sum_progress
from cachedb.threads import in_threads, start
from tests.conftest import files_of, run_python
from tests.support import make

CHUNK = 1024 * 1024


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every start of a thread fail, as at a limit on threads or during the interpreter's exit."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.mark.slow
def test_every_operation_works_in_an_atexit_handler(tmp_path: Path) -> None:
    archive = tmp_path / "app.tar"
    make.write(archive, make.oci_files({"app:1": make.image(1, size=2 * CHUNK)}))
    output = run_python(
        """
        import atexit, sys
        from pathlib import Path
        from cachedb import Cache, CacheError
        directory, archive = Path(sys.argv[1]), sys.argv[2]

        def work():
            with Cache.open(directory) as cache:
                cache.cache_from_tar(archive)
                cache.add_blob(bytes(3_000_000))
                cache.export("app:1", directory.parent / "out.tar")
                assert not cache.verify().problems
                for form in ("docker-archive", "oci-dir"):
                    cache.export("app:1", directory.parent / form, format=form)
                for number in range(100):
                    cache.add_blob(b"%d" % number)
                for registry_call in (cache.pull, cache.push):
                    try:
                        registry_call("localhost:1/app:1" if registry_call == cache.pull else "app:1", **(
                            {} if registry_call == cache.pull else {"target": "localhost:1/app:1"}))
                    except CacheError as error:
                        print(type(error).__name__)
            with Cache.open(directory) as cache:
                print(cache.collect_garbage().blobs)
                cache.remove_manifest("app:1")
            print("done")

        Cache.open(directory).close()
        atexit.register(work)
        """,
        tmp_path / "cache",
        archive,
        new_interpreter=True,
    )
    assert output.split() == ["RegistryUnavailable", "RegistryUnavailable", "101", "done"]
    assert files_of(tmp_path / "cache") == {}


@pytest.mark.slow
def test_an_open_cache_works_in_an_exit_handler_that_was_registered_before_it(tmp_path: Path) -> None:
    output = run_python(
        """
        import atexit, sys

        def use():
            print(len(cache.list_blobs()))
            cache.add_blob(b"second")
            cache.close()
            print("done")

        atexit.register(use)
        from cachedb import Cache
        cache = Cache.open(sys.argv[1])
        cache.add_blob(b"first")
        """,
        tmp_path / "cache",
        new_interpreter=True,
    )
    assert output.split() == ["1", "done"]
    with Cache.open(tmp_path / "cache") as cache:
        assert cache.collect_garbage().blobs == 2


@pytest.mark.slow
def test_a_thread_that_outlives_the_main_thread_can_use_the_cache(tmp_path: Path) -> None:
    archive = tmp_path / "app.tar"
    make.write(archive, make.oci_files({"app:1": make.image(1)}))
    output = run_python(
        """
        import sys, threading
        from cachedb import Cache

        def work():
            threading.main_thread().join()
            with Cache.open(sys.argv[1]) as cache:
                cache.cache_from_tar(sys.argv[2])
                print(len(cache.verify().problems))

        threading.Thread(target=work).start()
        """,
        tmp_path / "cache",
        archive,
        new_interpreter=True,
    )
    assert output.split() == ["0"]


@pytest.mark.usefixtures("no_threads")
def test_the_calling_thread_does_the_work_if_no_other_can_be_started() -> None:
    threads = in_threads(lambda item, _: (item, threading.get_ident()), range(5), sum_progress(0, None), threads=3)
    assert threads == [(item, threading.get_ident()) for item in range(5)]


@pytest.mark.usefixtures("no_threads")
def test_a_failure_in_the_calling_thread_stops_all_work() -> None:
    stopped: list[bool] = []

    def work(item: int, _: object) -> None:
        raise KeyError(item)

    with pytest.raises(KeyError, match="0"):
        in_threads(work, range(5), sum_progress(0, None), stop=lambda: stopped.append(True))
    assert stopped == [True]


@pytest.mark.usefixtures("no_threads")
def test_a_large_blob_is_hashed_if_no_thread_can_be_started(cache: Cache) -> None:
    data = bytes(CHUNK) * 6 + b"end"
    assert cache.get_blob(cache.add_blob(data)) == data


@pytest.mark.usefixtures("no_threads")
def test_many_files_are_unlinked_if_no_thread_can_be_started(directory: Path) -> None:
    with Cache.open(directory) as cache:
        for number in range(100):
            cache.add_blob(b"%d" % number)
    with Cache.open(directory) as cache:
        assert cache.collect_garbage().blobs == 100
        assert os.listdir(directory / "trash") == []
    assert files_of(directory) == {}


def test_start_returns_false_if_the_thread_cannot_be_started(no_threads: None) -> None:
    assert not start(threading.Thread())
