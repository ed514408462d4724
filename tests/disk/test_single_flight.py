"""Single flight: one of many callers produces an image; if it fails or dies, the next one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cachedb import Cache, CacheError
from cachedb.disk import locks, single_flight
from tests.conftest import Run, run_python, running
from tests.support import make
from tests.support.make import save
from tests.support.processes import is_alive
from tests.support.promises import check
from tests.support.waiting import wait_until

MADE = make.image(1)
PRODUCER = """
    import os, sys, time
    from cachedb import Cache
    from tests.support import make
    from tests.support.make import save
    with Cache.open(sys.argv[1]) as cache, cache.producing("app:1") as image:
        assert image is None
        print("producing", flush=True)
        sys.stdin.readline()
        save(cache, "app:1", make.image(1))
"""


def list_claims(directory: Path) -> list[str]:
    """Return the lock files of producers and of those who wait for them."""
    return [name for name in os.listdir(directory / "locks") if name.endswith(".producing")]


def is_napping(thread: threading.Thread) -> bool:
    """Return whether a thread waits for another process."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "nap":
        frame = frame.f_back
    return frame is not None


def start_waiting(cache: Cache, name: str = "app:1") -> list[object]:
    """Let a thread wait for an image that is being produced; return the list that gets its result."""
    got: list[object] = []

    def want() -> None:
        with cache.producing(name) as image:
            got.append(image)

    thread = threading.Thread(target=want, daemon=True)
    thread.start()
    assert wait_until(lambda: got != [] or is_napping(thread))
    assert got == []
    return got


@pytest.mark.slow
def test_one_of_many_processes_produces_the_image_and_all_get_it(directory: Path) -> None:
    output = run_python(
        """
        import os, sys, time
        from cachedb import Cache
        from tests.support import make
        from tests.support.make import save

        def want():
            with Cache.open(sys.argv[1]) as cache, cache.producing("app:1") as image:
                if image is None:
                    time.sleep(0.3)
                    save(cache, "app:1", make.image(1))
                    return b"made\\n"
                assert image.complete and image.digest == make.image(1).digest
                return b"found\\n"

        children = []
        for _ in range(8):
            if (child := os.fork()) == 0:
                os.write(1, want())
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
        """,
        directory,
    )
    assert sorted(output.split()) == ["found"] * 7 + ["made"]
    assert list_claims(directory) == []
    check(directory)


@pytest.mark.slow
def test_the_next_one_takes_over_if_the_producer_is_killed(cache: Cache) -> None:
    with running(PRODUCER, cache.directory) as producer:
        got = start_waiting(cache)
        producer.kill()
        producer.wait()
        assert wait_until(lambda: got == [None]), "the dead process still has the claim"
    assert wait_until(lambda: list_claims(cache.directory) == [])


@pytest.mark.slow
def test_the_next_open_removes_the_claim_of_a_killed_producer_only(directory: Path) -> None:
    with running(PRODUCER, directory) as producer:
        Cache.open(directory).close()
        assert len(list_claims(directory)) == 1
        producer.kill()
        producer.wait()
        assert len(list_claims(directory)) == 1
        Cache.open(directory).close()
        assert list_claims(directory) == []


@pytest.mark.slow
def test_a_waiter_gets_the_image_when_the_producer_is_done(cache: Cache) -> None:
    with running(PRODUCER, cache.directory) as producer:
        got = start_waiting(cache)
        print(file=producer.stdin)
        assert wait_until(lambda: len(got) == 1)
        assert got == [cache.get_image("app:1")]


def test_the_next_one_takes_over_if_the_block_fails(cache: Cache) -> None:
    with pytest.raises(KeyError), cache.producing("app:1") as image:  # noqa: PT012
        assert image is None
        got = start_waiting(cache)
        raise KeyError
    assert wait_until(lambda: got == [None])
    with cache.producing("app:1") as image:
        assert image is None, "this thread cannot try again"
    assert wait_until(lambda: list_claims(cache.directory) == [])


def test_threads_wait_for_each_other_also_if_one_leaves_out_the_tag(cache: Cache) -> None:
    with cache.producing("app") as image:
        assert image is None
        got = [start_waiting(cache, name) for name in ("app:latest", "app")]
        save(cache, "app", MADE)
        time.sleep(0.05)
        assert got == [[], []], "the claim ended before the block"
    assert wait_until(lambda: got == [[cache.get_image("app")]] * 2)
    assert wait_until(lambda: list_claims(cache.directory) == [])


def test_a_complete_image_is_returned_without_a_lock(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    save(cache, "app:1", MADE)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(locks, "acquire", refuse)
        with cache.producing("app:1") as image, cache.producing("app:1") as again:
            assert image == again == cache.get_image("app:1")


def test_an_incomplete_image_is_produced(cache: Cache) -> None:
    cache.save_manifest("app:1", MADE.manifest)
    with cache.producing("app:1") as image:
        assert image is None
        save(cache, "app:1", MADE)
    with cache.producing("app:1") as image:
        assert image is not None


def test_a_blob_is_produced_once(cache: Cache) -> None:
    digest = make.digest_of(b"data")
    got: list[bool] = []

    def want() -> None:
        with cache.producing_blob(digest.removeprefix("sha256:")) as stored:
            got.append(stored)

    with cache.producing_blob(digest) as stored:
        assert stored is False
        thread = threading.Thread(target=want)
        thread.start()
        assert wait_until(lambda: got != [] or is_napping(thread))
        assert got == []
        cache.save_blob(digest, b"data")
    thread.join(60)
    assert got == [True]
    assert list_claims(cache.directory) == []


def test_a_thread_cannot_wait_for_itself_and_names_do_not_wait_for_each_other(cache: Cache) -> None:
    with cache.producing("app:1") as first, cache.producing("app:2") as second:
        assert first is second is None
        for name in ("app:1", "app:2"):
            with pytest.raises(CacheError, match="this thread is already producing"), cache.producing(name):
                pytest.fail("the thread got its own claim again")
        with Cache.open(cache.directory) as other, pytest.raises(CacheError), other.producing("app:1"):
            pytest.fail("the thread got its own claim through another Cache")
    with cache.producing("app:1") as image:
        assert image is None


@pytest.mark.slow
def test_a_child_forked_in_the_block_neither_releases_nor_keeps_the_claim(directory: Path) -> None:
    output = run_python(
        """
        import os, sys
        from cachedb import Cache
        from cachedb.disk import locks

        cache = Cache.open(sys.argv[1])
        with cache.producing("app:1") as image:
            assert image is None
            (name,) = [name for name in os.listdir(cache.directory / "locks") if name.endswith(".producing")]
            path = cache.directory / "locks" / name
            if (leaver := os.fork()) == 0:
                pass  # leaves the block
            else:
                assert os.waitpid(leaver, 0)[1] == 0
                assert path.exists(), "the child removed its parent's lock file"
                assert locks.acquire(path, wait=False) is None, "the child released its parent's claim"
                if (stayer := os.fork()) == 0:
                    sys.stdin.read()
                    os._exit(0)
        if leaver == 0:
            os._exit(0)
        with Cache.open(sys.argv[1]) as other, other.producing("app:1") as image:
            assert image is None, "the child that lives on kept the claim of its parent"
        os.kill(stayer, 9)
        os.waitpid(stayer, 0)
        print("done")
        """,
        directory,
    )
    assert output == "done\n"


# The command line

STORE = """
import sys, time
from pathlib import Path
from cachedb import Cache
from tests.support import make
from tests.support.make import save
with Path(sys.argv[1]).open("a") as file:
    file.write("ran\\n")
time.sleep(0.3)
with Cache.open() as cache:  # the directory is in CACHEDB_DIR
    save(cache, "app:1", make.image(1))
"""
SLEEP = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"


def start_produce(directory: Path, *command: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "cachedb", "--dir", directory, "produce", "app:1", "--", sys.executable, *command]
    return subprocess.Popen(
        [*map(str, line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_one_of_many_produce_commands_runs_its_command(directory: Path, tmp_path: Path) -> None:
    Cache.open(directory).close()
    ran = tmp_path / "ran"
    processes = [start_produce(directory, "-c", STORE, ran) for _ in range(5)]
    for process in processes:
        output, messages = process.communicate(timeout=60)
        assert (output, process.returncode) == ("", 0)
        assert messages == "" or messages.startswith("cachedb: waiting for process "), messages
    assert ran.read_text() == "ran\n"
    check(directory)


@pytest.mark.slow
def test_the_next_one_takes_over_if_produce_is_killed_in_its_command(directory: Path, tmp_path: Path) -> None:
    with start_produce(directory, "-c", SLEEP) as killed:
        assert killed.stdout is not None
        command = int(killed.stdout.readline())
        with start_produce(directory, "-c", STORE, tmp_path / "ran") as other:
            assert other.stderr is not None
            assert f"waiting for process {killed.pid} (" in other.stderr.readline()
            killed.kill()
            assert other.wait(60) == 0
        os.kill(command, signal.SIGKILL)  # SIGKILL ended only the parent of this command
    check(directory)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_produce_ends_its_command(directory: Path, number: signal.Signals, code: int) -> None:
    with start_produce(directory, "-c", SLEEP) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        command = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(60) == code
        assert "Traceback" not in process.stderr.read()
    assert wait_until(lambda: not is_alive(command))
    assert list_claims(directory) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_produce_ends_a_command_that_has_just_begun(
    directory: Path, number: signal.Signals, code: int
) -> None:
    script = f"""
import os, signal, subprocess, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
begin = subprocess.Popen.__init__

def interrupted(self, *arguments, **options):
    begin(self, *arguments, **options)
    print(self.pid, flush=True)
    os.kill(os.getpid(), {number:d})

subprocess.Popen.__init__ = interrupted
sys.argv = ["cachedb", "--dir", {str(directory)!r}, "produce", "app:1", "sleep", "600"]
from cachedb.cli.main import main
main()
"""
    # The command would keep the output open.
    with (directory.parent / "output").open("w+") as output:
        done = subprocess.run([sys.executable, "-c", script], stdout=output, timeout=300, check=False)
        output.seek(0)
        command = int(output.read())
    try:
        assert done.returncode == code
        assert not is_alive(command)
    finally:
        with suppress(ProcessLookupError):
            os.kill(command, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["produce", "a command of produce"])
def test_a_second_interrupt_of_produce_kills_a_process_that_was_started(directory: Path, by: str) -> None:
    stubborn = """
import os, signal
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""
    started = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stubborn!r}])"
    with start_produce(directory, "-c", stubborn if by == "produce" else started) as process:
        assert process.stdout is not None
        command = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    try:
        assert wait_until(lambda: not is_alive(command), 20)
    finally:
        with suppress(ProcessLookupError):
            os.kill(command, signal.SIGKILL)


@pytest.mark.slow
def test_a_signal_to_produce_ends_all_processes_that_its_command_started(directory: Path) -> None:
    alone = "import os; os.setpgid(0, 0)"  # without the process group, as a job of an interactive shell
    cleaning_up = """
import os, signal, sys, time

def clean_up(*_):
    time.sleep(0.5)
    os.write(1, b"cleaned up ")
    sys.exit()

signal.signal(signal.SIGTERM, clean_up)
os.write(1, b"%d\\n" % os.getpid())
time.sleep(60)
"""
    shell = f"""
import os, sys
script = '"$0" -c "$1" & "$0" -c "$2"; true'
os.execvp("sh", ["sh", "-c", script, sys.executable, {cleaning_up!r}, {alone + cleaning_up!r}])
"""
    with start_produce(directory, "-c", shell) as process:
        assert process.stdout is not None
        started = [int(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert not any(map(is_alive, started))
        assert process.stdout.read() == 2 * "cleaned up "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("exit 7", 7, ""),
        ("kill -9 $$", 137, ""),
        ("true", 1, "cachedb: the command succeeded, but 'app:1' is missing or incomplete: store it under this name\n"),
    ],
)
def test_produce_exits_with_the_code_of_its_command(
    cachedb: Run, directory: Path, script: str, code: int, message: str
) -> None:
    Cache.open(directory).close()
    result = cachedb("produce", "app:1", "sh", "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", message)
    assert list_claims(directory) == []


def test_produce_runs_nothing_for_a_complete_image_and_refuses_an_invalid_command(cachedb: Run, cache: Cache) -> None:
    for arguments in (["app:1"], ["app:1", "--"], ["app:1", "--", "/does/not/exist"], ["No Name", "--", "true"]):
        result = cachedb("produce", *arguments)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    save(cache, "app:1", MADE)
    assert cachedb("produce", "app:1", "--", "false").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("outer", "inner"), [("app:1", "app:1"), ("app:latest", "app"), ("app", "app:latest")])
@pytest.mark.parametrize("linked", [False, True])
def test_a_nested_produce_of_the_same_name_is_refused(
    cachedb: Run, directory: Path, outer: str, inner: str, linked: bool
) -> None:
    if linked:
        (directory.parent / "link").symlink_to(directory)
    place = directory.parent / "link" if linked else directory
    command = [sys.executable, "-m", "cachedb", "--dir", str(place), "produce", inner, "true"]
    result = cachedb("produce", outer, "--", *command, timeout=30)
    assert result.returncode == 1
    assert f"a parent process is already producing {inner!r}" in result.stderr


def test_a_nested_produce_is_refused_if_the_directorys_name_has_two_lines(cachedb: Run, tmp_path: Path) -> None:
    place = ("--dir", str(tmp_path / "two\nlines"), "produce", "app:1", "--")
    result = cachedb(*place, sys.executable, "-m", "cachedb", *place, "true", timeout=30)
    assert result.returncode == 1
    assert "a parent process is already producing" in result.stderr


@pytest.mark.slow
def test_a_command_may_produce_the_same_name_in_another_cache(cachedb: Run, directory: Path, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "app.tar", make.oci_files({"app:1": MADE}))
    script = (
        "python=$1 archive=$2 here=$3 other=$4\n"
        'cachedb() { "$python" -m cachedb --dir "$other" "$@"; }\n'
        'cachedb produce app:1 -- "$python" -m cachedb import -q "$archive"\n'
        'cachedb export app:1 - | "$python" -m cachedb --dir "$here" import -q -'
    )
    places = (sys.executable, archive, directory, tmp_path / "other")
    for place in places[2:]:
        Cache.open(place).close()
    result = cachedb("produce", "app:1", "--", "sh", "-ec", script, "sh", *places)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "hard link"])
def test_another_kind_of_file_in_the_place_of_a_claim_is_set_aside(cache: Cache, tmp_path: Path, kind: str) -> None:
    """The key gives the name, so another user of a shared cache knows it."""
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("the only copy")
    place = single_flight._claim_path(cache.directory, "blob 1")
    make: dict[str, Callable[[], object]] = {
        "link": lambda: place.symlink_to(thesis),
        "pipe": lambda: os.mkfifo(place),
        "folder": lambda: (place / "deep").mkdir(parents=True),
        "hard link": lambda: os.link(thesis, place),
    }
    make[kind]()
    with single_flight.try_claim(cache.directory, "blob 1") as has_claim:
        assert has_claim
        assert [claim.key for claim in single_flight.list_claims(cache.directory)] == ["blob 1"]
    assert thesis.read_text() == "the only copy"
    (left,) = (path for path in (cache.directory / "locks").iterdir() if path.name.startswith(place.name))
    assert [problem.path for problem in cache.verify().problems] == [left]


def test_an_interrupt_while_a_claim_is_released_leaves_no_claim(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(single_flight, "no_fork", interrupt)
    with pytest.raises(KeyboardInterrupt) as raised, cache.producing("app:1"):
        pass
    monkeypatch.undo()
    assert single_flight.list_claims(cache.directory) == []
    with cache.producing("app:1"):
        assert len(single_flight.list_claims(cache.directory)) == 1
    del raised  # until here it kept the frames, and with them the file


def test_the_claim_of_a_file_that_an_interrupt_loses_is_released(cache: Cache) -> None:
    path = single_flight._claim_path(cache.directory, "blob 1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        single_flight._take_claim(path, "blob 1")  # an interrupt came before the caller got the file
        assert single_flight.list_claims(cache.directory) == []


def test_noted_progress_changes_no_other_file(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, utime = threading.Event(), threading.Event(), os.utime
    mine, guard = tmp_path / "mine", threading.RLock()
    mine.touch()
    utime(mine, (0, 0))

    class Guard:
        def __enter__(self) -> None:
            if not guard.acquire(blocking=False):
                go_on.set()  # the claim is not released before the time is set
                guard.acquire()

        def __exit__(self, *_: object) -> None:
            guard.release()

    def set_time(file: int) -> None:
        begun.set()
        assert go_on.wait(60)
        utime(file)

    monkeypatch.setattr(single_flight, "_guard", Guard())
    monkeypatch.setattr(single_flight, "_PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(os, "utime", set_time)
    with cache.producing("app:1"):
        assert begun.wait(60)
    opened = [mine.open("rb") for _ in range(20)]  # one of them gets the number of the claim's descriptor
    go_on.set()
    assert wait_until(lambda: not any(thread.name == "cachedb progress" for thread in threading.enumerate()))
    for file in opened:
        file.close()
    assert mine.stat().st_mtime == 0


def test_a_thread_does_not_wait_for_a_claim_that_it_has_tried_for(cache: Cache) -> None:
    with single_flight.try_claim(cache.directory, "key") as has_claim:
        assert has_claim
        with single_flight.try_claim(cache.directory, "key") as has_another:
            assert not has_another
        with (
            pytest.raises(CacheError, match="this thread is already producing 'key'"),
            single_flight.claim_or_find(cache.directory, "key", lambda: None, seconds=0),
        ):
            pass
    with single_flight.claim_or_find(cache.directory, "key", lambda: None, seconds=0) as found:
        assert found is None
