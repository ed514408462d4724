"""Single flight: of many who want an image one makes it, and whatever becomes of that one, the next has its turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cachedb import Cache, CacheError
from cachedb.disk import locks
from tests.conftest import Run, run_python, running
from tests.disk.test_locks import eventually
from tests.support import make
from tests.support.make import save
from tests.support.promises import check

MADE = make.image(1)
MAKER = """
    import os, sys, time
    from cachedb import Cache
    from tests.support import make
    from tests.support.make import save
    with Cache.open(sys.argv[1]) as cache, cache.producing("app:1") as image:
        assert image is None
        print("making", flush=True)
        sys.stdin.readline()
        save(cache, "app:1", make.image(1))
"""


def being_made(directory: Path) -> list[str]:
    """The lock files of those who make something, or wait for it."""
    return [name for name in os.listdir(directory / "locks") if name.endswith(".producing")]


def is_napping(thread: threading.Thread) -> bool:
    """Whether a thread waits for another process."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_name != "nap":
        frame = frame.f_back
    return frame is not None


def waiting(cache: Cache, name: str = "app:1") -> list[object]:
    """Have a thread want an image that is being made; what it gets when its turn has come, in a list."""
    got: list[object] = []

    def want() -> None:
        with cache.producing(name) as image:
            got.append(image)

    thread = threading.Thread(target=want, daemon=True)
    thread.start()
    assert eventually(lambda: got != [] or is_napping(thread))
    assert got == []
    return got


@pytest.mark.slow
def test_of_many_processes_one_makes_the_image_and_all_get_it(directory: Path) -> None:
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
    assert being_made(directory) == []
    check(directory)


def test_if_the_maker_is_killed_the_next_one_takes_over(cache: Cache) -> None:
    with running(MAKER, cache.directory) as maker:
        got = waiting(cache)
        maker.kill()
        maker.wait()
        assert eventually(lambda: got == [None]), "the kernel took the right from the dead"
    assert eventually(lambda: being_made(cache.directory) == [])


def test_what_a_killed_maker_left_is_swept_at_the_next_open_and_what_a_living_one_has_never(directory: Path) -> None:
    with running(MAKER, directory) as maker:
        Cache.open(directory).close()
        assert len(being_made(directory)) == 1
        maker.kill()
        maker.wait()
        assert len(being_made(directory)) == 1
        Cache.open(directory).close()
        assert being_made(directory) == []


def test_who_waits_gets_the_image_when_the_maker_is_done(cache: Cache) -> None:
    with running(MAKER, cache.directory) as maker:
        got = waiting(cache)
        print(file=maker.stdin)
        assert eventually(lambda: len(got) == 1)
        assert got == [cache.get_image("app:1")]


def test_if_the_block_fails_the_next_one_has_its_turn(cache: Cache) -> None:
    with pytest.raises(KeyError), cache.producing("app:1") as image:  # noqa: PT012
        assert image is None
        got = waiting(cache)
        raise KeyError
    assert eventually(lambda: got == [None])
    with cache.producing("app:1") as image:
        assert image is None, "and this thread may try again"
    assert eventually(lambda: being_made(cache.directory) == [])


def test_threads_of_one_process_wait_for_each_other_and_a_name_is_the_same_with_its_tag(cache: Cache) -> None:
    with cache.producing("app") as image:
        assert image is None
        got = [waiting(cache, name) for name in ("app:latest", "app")]
        save(cache, "app", MADE)
        time.sleep(0.05)
        assert got == [[], []], "the turn ends with the block"
    assert eventually(lambda: got == [[cache.get_image("app")]] * 2)
    assert eventually(lambda: being_made(cache.directory) == [])


def test_an_image_that_is_there_costs_no_lock(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    save(cache, "app:1", MADE)

    def none(*_: object, **__: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(locks, "acquire", none)
        with cache.producing("app:1") as image, cache.producing("app:1") as again:
            assert image == again == cache.get_image("app:1")


def test_an_incomplete_image_is_still_to_be_made(cache: Cache) -> None:
    cache.save_manifest("app:1", MADE.manifest)
    with cache.producing("app:1") as image:
        assert image is None
        save(cache, "app:1", MADE)
    with cache.producing("app:1") as image:
        assert image is not None


def test_a_blob_is_brought_once(cache: Cache) -> None:
    digest = make.digest_of(b"data")
    got: list[bool] = []

    def want() -> None:
        with cache.producing_blob(digest.removeprefix("sha256:")) as stored:
            got.append(stored)

    with cache.producing_blob(digest) as stored:
        assert stored is False
        thread = threading.Thread(target=want)
        thread.start()
        assert eventually(lambda: got != [] or is_napping(thread))
        assert got == []
        cache.save_blob(digest, b"data")
    thread.join(60)
    assert got == [True]
    assert being_made(cache.directory) == []


def test_a_thread_does_not_wait_for_itself_and_different_names_not_for_each_other(cache: Cache) -> None:
    with cache.producing("app:1") as first, cache.producing("app:2") as second:
        assert first is second is None
        for name in ("app:1", "app:2"):
            with pytest.raises(CacheError, match="being made by this thread already"), cache.producing(name):
                pytest.fail("it would wait for itself")
        with Cache.open(cache.directory) as other, pytest.raises(CacheError), other.producing("app:1"):
            pytest.fail("through another Cache, too")
    with cache.producing("app:1") as image:
        assert image is None


def test_a_child_that_is_forked_in_the_block_neither_frees_nor_keeps_its_parents_right(directory: Path) -> None:
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
                assert path.exists(), "the child took its parent's lock file away"
                assert locks.acquire(path, wait=False) is None, "the child freed its parent's right"
                if (stayer := os.fork()) == 0:
                    sys.stdin.read()
                    os._exit(0)
        if leaver == 0:
            os._exit(0)
        with Cache.open(sys.argv[1]) as other, other.producing("app:1") as image:
            assert image is None, "the child that lives on keeps the right of its parent"
        os.kill(stayer, 9)
        os.waitpid(stayer, 0)
        print("done")
        """,
        directory,
    )
    assert output == "done\n"


# The command line

BRING = """
import sys, time
from pathlib import Path
from cachedb import Cache
from tests.support import make
from tests.support.make import save
with Path(sys.argv[1]).open("a") as file:
    file.write("ran\\n")
time.sleep(0.3)
with Cache.open() as cache:  # which one, CACHEDB_DIR says
    save(cache, "app:1", make.image(1))
"""
WAIT = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"


def producer(directory: Path, *command: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "cachedb", "--dir", directory, "produce", "app:1", "--", sys.executable, *command]
    return subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie, which its new parent may be slow to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_of_many_at_once_one_runs_its_command(directory: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    processes = [producer(directory, "-c", BRING, ran) for _ in range(5)]
    for process in processes:
        output, said = process.communicate(timeout=60)
        assert (output, process.returncode) == ("", 0)
        assert said == "" or said.startswith("cachedb: waiting for process "), said
    assert ran.read_text() == "ran\n"
    check(directory)


@pytest.mark.slow
def test_if_one_is_killed_in_its_command_the_next_one_takes_over(directory: Path, tmp_path: Path) -> None:
    with producer(directory, "-c", WAIT) as killed:
        assert killed.stdout is not None
        command = int(killed.stdout.readline())
        with producer(directory, "-c", BRING, tmp_path / "ran") as other:
            assert other.stderr is not None
            assert f"waiting for process {killed.pid} (" in other.stderr.readline()
            killed.kill()
            assert other.wait(60) == 0
        os.kill(command, signal.SIGKILL)  # of a process that is killed so, nobody tells its children
    check(directory)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_too(directory: Path, number: signal.Signals, code: int) -> None:
    line = [sys.executable, "-m", "cachedb", "--dir", str(directory), "produce", "app:1", sys.executable, "-c", WAIT]
    with subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        command = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(60) == code
        assert "Traceback" not in process.stderr.read()
    assert eventually(lambda: not is_alive(command))
    assert being_made(directory) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("exit 7", 7, ""),
        ("kill -9 $$", 137, ""),
        ("true", 1, "cachedb: the command succeeded, but 'app:1' is missing or incomplete: store it under this name\n"),
    ],
)
def test_the_exit_code_is_the_commands(cachedb: Run, directory: Path, script: str, code: int, message: str) -> None:
    result = cachedb("produce", "app:1", "sh", "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", message)
    assert being_made(directory) == []


def test_what_is_there_is_not_made_again_and_what_is_no_command_is_refused(cachedb: Run, cache: Cache) -> None:
    for arguments in (["app:1"], ["app:1", "--"], ["app:1", "--", "/does/not/exist"], ["No Name", "--", "true"]):
        result = cachedb("produce", *arguments)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    save(cache, "app:1", MADE)
    assert cachedb("produce", "app:1", "--", "false").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("outer", "inner"), [("app:1", "app:1"), ("app:latest", "app"), ("app", "app:latest")])
@pytest.mark.parametrize("linked", [False, True])
def test_a_command_that_would_wait_for_itself_is_refused(
    cachedb: Run, directory: Path, outer: str, inner: str, linked: bool
) -> None:
    if linked:
        (directory.parent / "link").symlink_to(directory)
    place = directory.parent / "link" if linked else directory
    command = [sys.executable, "-m", "cachedb", "--dir", str(place), "produce", inner, "true"]
    result = cachedb("produce", outer, "--", *command, timeout=30)
    assert result.returncode == 1
    assert f"a parent process is already producing {inner!r}" in result.stderr


def test_it_is_refused_in_a_directory_of_two_lines_as_well(cachedb: Run, tmp_path: Path) -> None:
    place = ("--dir", str(tmp_path / "two\nlines"), "produce", "app:1", "--")
    result = cachedb(*place, sys.executable, "-m", "cachedb", *place, "true", timeout=30)
    assert result.returncode == 1
    assert "a parent process is already producing" in result.stderr


@pytest.mark.slow
def test_a_command_may_make_the_same_name_in_another_cache(cachedb: Run, directory: Path, tmp_path: Path) -> None:
    archive = make.write(tmp_path / "app.tar", make.oci_files({"app:1": MADE}))
    script = (
        "python=$1 archive=$2 here=$3 other=$4\n"
        'cachedb() { "$python" -m cachedb --dir "$other" "$@"; }\n'
        'cachedb produce app:1 -- "$python" -m cachedb import -q "$archive"\n'
        'cachedb export app:1 - | "$python" -m cachedb --dir "$here" import -q -'
    )
    places = (sys.executable, archive, directory, tmp_path / "other")
    result = cachedb("produce", "app:1", "--", "sh", "-ec", script, "sh", *places)
    assert (result.returncode, result.stderr) == (0, "")
