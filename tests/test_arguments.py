"""An argument of a wrong type raises a `TypeError` or a `CacheError` before anything is done."""

from __future__ import annotations

import inspect
import io
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cachedb import Cache, CacheError, Keep, Name, NotInCache, Policy, StorageError
from cachedb.index import drift, schema
from cachedb.operations import upgrade
from tests.conftest import snapshot
from tests.support import make
from tests.test_closing import ARGUMENTS, call, list_public_methods

WRONG: list[Any] = [None, 3, 1.5, True, b"app:1", ["app:1"], {"app": 1}, object(), io.StringIO("text")]
# By parameter: the types in WRONG that it accepts.
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "data": (bytes,),
    "prefix": (str,),
    "text": (),
    "source": (),
    "seconds": (type(None), int, float),
    "timeout": (type(None), int, float),
    "ttl": (type(None), int, float),
    "parameters": (type(None),),
    "query": (),
    "platform": (type(None),),
    "convert": (type(None),),
    "tag": (type(None),),
    "authfile": (type(None), str),
    "credentials": (type(None),),
    "progress": (type(None),),
    "blob_progress": (type(None),),
    "name": (type(None),),  # for an archive
    "target": (type(None),),
    "group": (type(None),),
    "is_working": (type(None),),
    "media_type": (type(None),),
    "filters": (type(None),),
    "export.name": (list,),
    "policy": (type(None),),
    "to_free": (type(None), int, float),
    "plan": (type(None),),
}
FLAGS = {
    "stream",
    "by_image",
    "dry_run",
    "quick",
    "repair",
    "link",
    "all_platforms",
    "if_missing",
    "ignore_missing",
    "allow_stale",
    "referrers",
    "foreign_layers",
    "plain_http",
    "tls_verify",
    "verify",
}


def cases() -> list[tuple[str, str]]:
    """Return all pairs of a method and one of its parameters that has a type."""
    found = []
    for method in list_public_methods():
        for parameter in list(inspect.signature(getattr(Cache, method)).parameters)[1:]:
            if parameter not in FLAGS:  # a flag accepts any value
                found.append((method, parameter))
    return found


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    """Yield a cache with an image, for calls that change nothing."""
    with Cache.open(tmp_path_factory.mktemp("unchanged") / "cache") as opened:
        make.save(opened, "app:1", make.image(1))
        yield opened


@pytest.mark.parametrize(("method", "parameter"), cases())
def test_an_argument_of_a_wrong_type_is_refused(unchanged: Cache, tmp_path: Path, method: str, parameter: str) -> None:
    cache = unchanged
    signature = inspect.signature(getattr(Cache, method))
    for wrong in WRONG:
        is_bool = type(wrong) is bool and parameter in ("seconds", "timeout", "to_free", "ttl")
        accepted = ACCEPTED.get(f"{method}.{parameter}", ACCEPTED.get(parameter, ()))
        if isinstance(wrong, accepted) and not is_bool:
            continue
        before = snapshot(cache.directory)
        bound = signature.bind(cache, *ARGUMENTS[method])
        if method == "export":
            bound.arguments["destination"] = tmp_path / "out"
        is_rest = signature.parameters[parameter].kind is inspect.Parameter.VAR_POSITIONAL
        bound.arguments[parameter] = (wrong,) if is_rest else wrong
        with pytest.raises((TypeError, CacheError)):
            call(cache, method, *bound.args[1:], **bound.kwargs)
        after = snapshot(cache.directory)
        assert {**after, "locks": 0, "ingest": 0} == {**before, "locks": 0, "ingest": 0}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [3, b"/tmp", ["x"], object(), True])
def test_a_directory_of_a_wrong_type_is_refused(wrong: Any) -> None:
    for function in (Cache.open, upgrade.upgrade, upgrade.back_up, drift.check, schema.current, schema.history):
        with pytest.raises(TypeError, match="directory is of type"):
            function(wrong)
    with pytest.raises(CacheError):
        Name.parse(wrong)


def test_a_progress_callback_of_a_wrong_type_is_refused_before_the_work(cache: Cache) -> None:
    for function in (upgrade.upgrade, upgrade.back_up):
        with pytest.raises(TypeError, match="progress is of type 'int': give a function, or None"):
            function(cache.directory, progress=3)  # type: ignore[arg-type]


def test_a_file_in_text_mode_is_refused(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", make.image(1))
    with (tmp_path / "file").open("w+") as file:
        for work in (cache.add_blob, cache.cache_from_tar, lambda data: cache.export("app:1", data)):
            with pytest.raises(TypeError, match="a file open in binary mode"):
                work(file)  # type: ignore[arg-type]


class Part:
    """A file of a caller whose `read` returns one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def read(self, _size: int = -1) -> Any:
        return self.value


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("text", TypeError, r"the file's read\(\) returned a value of type 'str': open it in binary mode"),
        (None, StorageError, "a non-blocking file has no data yet"),
    ],
)
def test_a_file_that_returns_no_bytes_is_refused(
    cache: Cache, value: Any, error: type[Exception], message: str
) -> None:
    for work in (cache.add_blob, cache.cache_from_tar):
        with pytest.raises(error, match=message):
            work(Part(value))  # type: ignore[arg-type]


def test_a_file_that_returns_more_than_requested_is_refused(cache: Cache) -> None:
    with pytest.raises(CacheError, match=r"^the file's read\(\d+\) returned 9000000 bytes: give a file that "):
        cache.add_blob(Part(bytes(9_000_000)))  # type: ignore[arg-type]


def test_an_archive_that_has_no_data_yet_is_not_taken_as_cut_short(cache: Cache, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    with open(ours, "rb") as source, open(theirs, "wb") as target:
        target.write(make.write(tmp_path / "a.tar", make.oci_files({"app:1": make.image(1)})).read_bytes()[:10_000])
        target.flush()
        with pytest.raises(StorageError, match="cannot read the archive: a non-blocking file has no data yet"):
            cache.cache_from_tar(source)


def test_an_export_accepts_a_file_whose_write_returns_none(cache: Cache, tmp_path: Path) -> None:
    class File:
        def __init__(self) -> None:
            self.content = b""

        def write(self, data: memoryview) -> None:
            self.content += data

        def flush(self) -> None:
            pass

    make.save(cache, "app:1", make.image(1))
    cache.export("app:1", tmp_path / "app.tar")
    cache.export("app:1", file := File())  # type: ignore[arg-type]
    assert file.content == (tmp_path / "app.tar").read_bytes()


def test_an_export_waits_for_a_pipe_that_does_not_block(cache: Cache, tmp_path: Path) -> None:
    make.save(cache, "app:1", make.image(1, size=300_000))
    cache.export("app:1", tmp_path / "app.tar")
    full, received = threading.Event(), list[bytes]()

    class Pipe(io.FileIO):
        def write(self, data: Any) -> Any:
            count: int | None = super().write(data)
            if count is None:
                full.set()
            return count

    def receive() -> None:
        full.wait(60)
        received.append(source.read())

    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    with open(ours, "rb") as source:
        thread = threading.Thread(target=receive)
        with Pipe(theirs, "wb") as target:
            thread.start()
            cache.export("app:1", target)
        thread.join(60)
    assert received == [(tmp_path / "app.tar").read_bytes()]


def test_a_number_that_is_no_float_is_refused(cache: Cache) -> None:
    for work in (
        lambda: cache.add_hold(seconds=10**400),
        lambda: cache.sql("SELECT 1", timeout=10**400).__enter__(),
        lambda: cache.run_report("garbage", timeout=-(10**400)).__enter__(),
    ):
        with pytest.raises(CacheError, match=r"^(seconds|timeout) has over 300 digits: give a smaller number$"):
            work()


@pytest.mark.parametrize("group", ["9" * 5000, str(2**32 - 1), "x" * 1000])
def test_a_group_that_cannot_exist_is_refused(cache: Cache, group: str) -> None:
    with pytest.raises(CacheError, match=r"^there is no group '"):
        cache.share(group)


def test_a_report_whose_name_is_too_long_is_not_found(cache: Cache) -> None:
    with pytest.raises(NotInCache, match=r"^there is no report 'a+.+: `cachedb report --list`"):
        cache.run_report("a" * 300).__enter__()


@pytest.mark.parametrize("wrong", [None, "text", ["text"], iter([Keep(names=("app:1",))])])
def test_rules_and_limits_of_a_wrong_type_are_refused(cache: Cache, wrong: Any) -> None:
    make.save(cache, "app:1", make.image(1))
    for field in Policy._fields:
        for work in (cache.plan_prune, cache.prune, partial(cache.explain_prune, "app:1")):
            with pytest.raises(TypeError, match=rf"^{field} is (of type|not a tuple)"):
                work(Policy()._replace(**{field: wrong}))
    assert cache.list_names() == ["app:1"]


def test_a_manifest_as_text_is_refused(cache: Cache) -> None:
    with pytest.raises(TypeError, match="manifest is of type 'str': give its bytes"):
        cache.save_manifest("app:1", make.image(1).manifest.decode())  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_a_path_or_text_with_an_impossible_character_is_refused(cache: Cache, text: str) -> None:
    wrong = "has a NUL character or a lone surrogate: leave it out of "
    calls: dict[str, Callable[[], object]] = {
        "directory": lambda: Cache.open(text),
        "source": lambda: cache.cache_from_tar(text),
        "destination": lambda: cache.export("app:1", text),
        "group": lambda: cache.share(text),
        "prefix": lambda: cache.list_blobs(text),
    }
    for name, refused in calls.items():
        with pytest.raises(CacheError, match=f"^{name} {wrong}"):
            refused()
    for refused in (lambda: cache.copy(text), lambda: cache.adopt(text)):
        with pytest.raises(CacheError, match=f"^directory {wrong}"):
            refused()


def test_a_path_may_have_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    directory = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    Cache.open(directory).close()
    assert os.path.isfile(f"{directory}/index.db")


def test_a_path_that_is_too_long_is_not_adopted(cache: Cache) -> None:
    with pytest.raises(StorageError, match=r"^cannot read the cache to adopt: File name too long"):
        cache.adopt("a" * 5000)
