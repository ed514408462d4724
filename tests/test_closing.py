"""A closed cache refuses all methods, also while other threads are using it."""

from __future__ import annotations

import inspect
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, CacheError, DigestMismatch
from tests.conftest import files_of, run_python, stored_rows
from tests.support import make

MADE = make.image(1)
CLOSED = "this cache is closed: open it again with Cache.open"
# Nobody can create a file below /dev/null, not even root.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "save_blob": (MADE.digest, MADE.manifest),
    "add_blob": (b"data",),
    "has_blob": (MADE.digest,),
    "get_blob": (MADE.digest,),
    "get_blob_size": (MADE.digest,),
    "get_blob_path": (MADE.digest,),
    "open_blob": (MADE.digest,),
    "producing_blob": (MADE.digest,),
    "save_manifest": ("app:1", MADE.manifest),
    "associate_blob_with_image": ("app:1", MADE.digest),
    "tag": ("app:1", "app:2"),
    "sql": ("SELECT 1",),
    "run_report": ("garbage",),
    "adopt": ("/dev/null/cache",),
    "copy": ("/dev/null/copy",),
    "pull": ("localhost:1/app:1",),
    "push": ("app:1", "localhost:1/app:1"),
    "push_tags": ("app", "localhost:1/app"),
    "list_remote_tags": ("localhost:1/app",),
    **dict.fromkeys(["plan_pull", "get_remote_digest", "inspect_remote"], ("localhost:1/app:1",)),
    "cache_from_tar": ("/dev/null",),
    "export": ("app:1", "/dev/null/out"),
    "list_blobs": (),
    "list_holds": (),
    "get_blob_details": (MADE.digest,),
    "get_selected_usage": (),
    "tag_images": ("app:1", "app:2"),
    "list_manifests": (),
    "list_names": (),
    "list_views": (),
    "collect_garbage": (),
    "plan_prune": (),
    "prune": (),
    "explain_prune": ("app:1",),
    "get_html_report": (),
    "get_leftovers": (),
    "sessions": (),
    "share": (),
    "get_stats": (),
    "get_usage": (),
    "verify": (),
    "get_policy": (),
    **dict.fromkeys(["check_policy", "set_policy"], ("",)),
    **dict.fromkeys(
        [
            "hold",
            "add_hold",
            "release_hold",
            "producing",
            "get_manifest",
            "get_details",
            "get_image",
            "get_image_blobs",
        ],
        ("app:1",),
    ),
    **dict.fromkeys(["get_platforms", "is_image_complete", "remove_manifest", "get_labels"], ("app:1",)),
    **dict.fromkeys(["pin", "unpin"], ("app:1",)),
}


def list_public_methods() -> list[str]:
    """Return the names of all public methods except `open` and `close`."""
    found = [name for name, _ in inspect.getmembers(Cache, callable) if not name.startswith("_")]
    return sorted(set(found) - {"open", "close"})


def call(cache: Cache, method: str, *arguments: object, **named: object) -> object:
    """Call a method, and read its generator or enter its context manager if it returns one."""
    result = getattr(cache, method)(*arguments, **named)
    if inspect.isgenerator(result):
        return list(result)
    if hasattr(result, "__enter__") and not hasattr(result, "read"):
        with result as inner:
            return inner
    return result


@pytest.mark.parametrize("method", list_public_methods())
def test_a_method_of_a_closed_cache_is_refused(cache: Cache, directory: Path, method: str) -> None:
    cache.close()
    before = sorted(str(path) for path in directory.rglob("*"))
    with pytest.raises(CacheError, match=CLOSED):
        call(cache, method, *ARGUMENTS[method])
    assert sorted(str(path) for path in directory.rglob("*")) == before


def test_a_closed_cache_can_be_closed_again_but_not_entered(cache: Cache, directory: Path) -> None:
    cache.close()
    cache.close()
    with pytest.raises(CacheError, match=CLOSED), cache:
        pass
    assert cache.directory == directory
    with pickle.loads(pickle.dumps(cache)) as another:
        assert another.list_names() == []


def test_a_cache_can_be_closed_inside_its_own_hold(cache: Cache) -> None:
    make.save(cache, "app:1", MADE)
    with cache.hold("app:1"):
        cache.close()


@pytest.mark.slow
def test_a_forked_child_inherits_a_closed_cache_and_may_close_an_open_one(tmp_path: Path) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb import Cache, CacheError
        closed, opened = Cache.open(sys.argv[1]), Cache.open(sys.argv[1])
        digest = opened.add_blob(b"data")
        closed.close()
        if not os.fork():
            try:
                closed.list_names()
            except CacheError as error:
                print(error, flush=True)
            opened.close()
            os._exit(0)
        assert os.wait()[1] == 0
        assert opened.collect_garbage().blobs == 0
        print(opened.has_blob(digest))
        opened.close()
        """,
        tmp_path / "cache",
    )
    assert output.splitlines() == [CLOSED, "True"]


def test_threads_that_use_a_cache_while_it_is_closed_end_with_a_cache_error(tmp_path: Path) -> None:
    directory, archive = tmp_path / "cache", tmp_path / "app.tar"
    make.write(archive, make.oci_files({"other:1": make.image(2, size=200_000)}))
    for _ in range(5):
        cache, failures, barrier = Cache.open(directory), list[BaseException](), threading.Barrier(4)

        def work(number: int, cache: Cache = cache, failures: list[Any] = failures, barrier: Any = barrier) -> None:
            barrier.wait(60)
            try:
                while True:
                    cache.add_blob(os.urandom(1000))
                    cache.cache_from_tar(archive, f"other:{number}")
                    cache.get_stats()
                    cache.has_blob(MADE.digest)
                    with cache.sql("SELECT name FROM image_usage") as answer:
                        list(answer.rows)
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        barrier.wait(60)
        cache.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert {isinstance(error, CacheError) and not isinstance(error, DigestMismatch) for error in failures} == {True}
        assert cache._parts[0]._lookups._idle == []
        assert [name for name in os.listdir("/proc/self/fd") if is_below(directory, name)] == []
    with Cache.open(directory) as opened:
        opened.collect_garbage()
        assert opened.verify().problems == []
        assert files_of(directory) == stored_rows(directory)
        assert os.listdir(directory / "trash") == []
    assert [name for name in os.listdir(directory / "locks") if name.endswith(".session")] == []


def is_below(directory: Path, descriptor: str) -> bool:
    """Return whether a descriptor of this process is of a file in a directory."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(directory))
    except FileNotFoundError:
        return False


def test_a_connection_in_use_stays_open_until_its_block_ends(cache: Cache) -> None:
    database = cache._database
    with database.read() as connection:
        cache.close()
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    assert [name for name in os.listdir("/proc/self/fd") if is_below(database.directory, name)] == []
    with pytest.raises(CacheError, match=CLOSED), database.read():
        pass


def test_a_session_does_not_begin_after_its_end(cache: Cache) -> None:
    session = cache._session
    session.close()  # first of all that `Cache.close` closes: the index is still open
    with pytest.raises(CacheError, match=CLOSED):
        session.id  # noqa: B018
    assert os.listdir(cache.directory / "ingest") == []
