"""Power cuts: check states of a cache; and of small scripts, to prove that the model catches faults."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.attacks import powercuts
from tests.support.make import hex_of
from tests.support.powercut import (
    ROOT,
    CommandFailed,
    Cut,
    Disk,
    Event,
    Names,
    Recording,
    Unfollowed,
    Write,
    final_state,
    generate_states,
    memory_folder,
    read_tree,
    record,
    verify,
    write_state,
)

pytestmark = pytest.mark.attack

STATES = int(os.environ.get("CACHEDB_POWER_CUTS", "80"))  # of each scenario

RecordScript = Callable[[str], Recording]


@pytest.fixture
def strace(peer: Callable[[str], str]) -> str:
    program = peer("strace")
    probe = subprocess.run([program, "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"strace cannot trace here: {probe.stderr.strip()}")
    return program


@pytest.fixture
def record_script(strace: str, tmp_path: Path) -> RecordScript:
    """Return a function that records a script; the script works in the empty folder ``work``."""
    work = tmp_path / "work"
    work.mkdir()

    def run(script: str) -> Recording:
        start = f"import os, threading\nwork = {str(work)!r} + '/'\n"
        return record([sys.executable, "-c", start + textwrap.dedent(script)], work, strace=strace)

    return run


WRITE = """
    def write(name, data, sync):
        file = os.open(work + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(file, data)
        if sync:
            os.fsync(file)
        os.close(file)

    def sync_folder(name=""):
        folder = os.open(work + name, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
"""


def script(body: str) -> str:
    return textwrap.dedent(WRITE) + textwrap.dedent(body)


def content(cut: Cut, path: str) -> bytes | None:
    entry = cut.tree.get(path)
    return None if entry is None else entry.content


NEW, OLD = b"n" * 3000, b"o" * 2000
REPLACE = """
    write("name", b"o" * 2000, sync=True)
    sync_folder()
    os.write(1, b"ack 1\\n")
    write("new", b"n" * 3000, sync={sync})
    os.rename(work + "new", work + "name")
    {folder}
    os.write(1, b"ack 2\\n")
"""


def replace_file(record_script: RecordScript, *, sync: bool, folder: bool) -> list[Cut]:
    """Return the states after a script that replaces a file, with or without syncs."""
    body = REPLACE.format(sync=sync, folder="sync_folder()" if folder else "")
    return list(generate_states(record_script(script(body)), seed=1, count=500))


def test_renaming_a_synced_file_over_another_leaves_one_of_the_two(record_script: RecordScript) -> None:
    cuts = replace_file(record_script, sync=True, folder=True)
    assert {content(cut, "name") for cut in cuts if len(cut.acks) == 1} == {OLD, NEW}
    assert {content(cut, "name") for cut in cuts if len(cut.acks) == 2} == {NEW}


def test_a_file_renamed_without_a_sync_is_torn_in_some_state(record_script: RecordScript) -> None:
    cuts = replace_file(record_script, sync=False, folder=True)
    left = {content(cut, "name") for cut in cuts if cut.acks}
    assert {b"", OLD, NEW, bytes(3000)} < left
    assert any(data not in (OLD, NEW) and b"n" in data for data in left if data), "only some sectors are kept"


def test_a_rename_without_a_sync_of_its_folder_is_lost_in_some_state(record_script: RecordScript) -> None:
    cuts = replace_file(record_script, sync=True, folder=False)
    assert {content(cut, "name") for cut in cuts if len(cut.acks) == 2} == {OLD, NEW}


def test_a_file_unlinked_before_the_commit_is_lost_without_the_commit_in_some_state(
    record_script: RecordScript,
) -> None:
    body = """
        write("index", b"blob", sync=True)
        write("blob", b"content", sync=True)
        sync_folder()
        os.write(1, b"ack 1\\n")
        {first}
        {second}
    """
    commit, unlink = 'write("index", b"none", sync=True)', 'os.unlink(work + "blob")'

    def find_dangling(first: str, second: str) -> list[Cut]:
        cuts = generate_states(record_script(script(body.format(first=first, second=second))), seed=1, count=500)
        return [cut for cut in cuts if cut.acks and content(cut, "index") == b"blob" and "blob" not in cut.tree]

    assert find_dangling(unlink, commit)
    assert not find_dangling(commit, unlink)


def test_an_append_without_a_sync_leaves_the_synced_content(record_script: RecordScript) -> None:
    recording = record_script(
        script(
            """
            write("log", b"a" * 512, sync=True)
            sync_folder()
            os.write(1, b"ack 1\\n")
            file = os.open(work + "log", os.O_WRONLY | os.O_APPEND)
            os.write(file, b"b" * 1024)
            os.write(file, b"c" * 1024)
            """
        )
    )
    left = {content(cut, "log") or b"" for cut in generate_states(recording, seed=1, count=500) if cut.acks}
    assert all(data.startswith(b"a" * 512) for data in left)
    assert {b"a" * 512, b"a" * 512 + b"b" * 1024 + b"c" * 1024} < left
    assert any(b"b" not in data and b"c" in data for data in left), "only the later append is kept"


def test_a_synced_file_exists_only_once_its_folder_and_the_folders_above_are_synced(
    record_script: RecordScript,
) -> None:
    recording = record_script(
        script(
            """
            os.mkdir(work + "folder")
            write("folder/file", b"content", sync=True)
            sync_folder("folder")
            os.write(1, b"ack 1\\n")
            sync_folder()
            os.write(1, b"ack 2\\n")
            """
        )
    )
    cuts = list(generate_states(recording, seed=1, count=100))
    assert {tuple(cut.tree) for cut in cuts if len(cut.acks) == 1} == {(), ("folder", "folder/file")}
    assert {tuple(cut.tree) for cut in cuts if len(cut.acks) == 2} == {("folder", "folder/file")}


def test_a_sync_covers_only_changes_made_before_it_began(record_script: RecordScript) -> None:
    recording = record_script(
        script(
            """
            write("file", b"first", sync=True)
            sync_folder()
            """
        )
    )
    begun = max(place for place, event in enumerate(recording.events) if event.text == "sync begins")
    late = Names("create late", ((ROOT, "late", 1),))
    disk = Disk(recording)
    for event in (*recording.events[: begun + 1], late, *recording.events[begun + 1 :]):
        disk.add(event)
    assert list(disk.pending.values()) == [late]
    assert list(disk.tree({})) == ["file"]


def test_events_of_threads_renames_links_and_modes_make_the_real_directory(
    record_script: RecordScript, tmp_path: Path
) -> None:
    recording = record_script(
        script(
            """
            def work_in(name):
                os.mkdir(work + name)
                for number in range(20):
                    write(f"{name}/{number}", b"x" * number * 100, sync=number % 2 == 0)
                    os.link(f"{work}{name}/{number}", f"{work}{name}/link-{number}", follow_symlinks=False)
                    os.rename(f"{work}{name}/{number}", f"{work}{name}/renamed-{number}")
                    os.chmod(f"{work}{name}/renamed-{number}", 0o444)
                    file = os.open(f"{work}{name}/both", os.O_RDWR | os.O_CREAT, 0o640)
                    os.read(file, 10)
                    os.write(file, b"written after the data was read")
                    os.ftruncate(file, number * 3)
                    os.close(file)
                sync_folder(name)
                os.rename(work + name, work + "last-" + name)

            threads = [threading.Thread(target=work_in, args=(name,)) for name in "abc"]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            os.symlink("last-a", work + "symlink")
            """
        )
    )
    assert len(recording.end) == 3 * 42 + 1
    write_state(final_state(recording), tmp_path / "again")
    assert read_tree(tmp_path / "again") == recording.end


def test_a_recording_that_lacks_an_event_is_refused(record_script: RecordScript) -> None:
    recording = record_script(script('write("file", b"content", sync=False)'))
    without: list[Event] = [event for event in recording.events if not isinstance(event, Write)]
    with pytest.raises(Unfollowed, match="file is not what the events make"):
        verify(recording._replace(events=without))


@pytest.mark.parametrize(
    "change",
    [
        "mmap.mmap(file, 4096)[0:5] = b'bytes'",
        "os.sendfile(file, os.open('/proc/self/exe', os.O_RDONLY), 0, 100)",
        pytest.param(
            "os.copy_file_range(os.open(work + 'other', os.O_RDONLY), file, 5)",
            marks=pytest.mark.skipif(
                not hasattr(os, "copy_file_range"), reason="this Python lacks os.copy_file_range: use one from pyenv"
            ),
        ),
        "os.open(work + 'file', os.O_WRONLY | os.O_DSYNC)",
        "os.chdir(work)",
    ],
)
def test_a_system_call_that_the_recorder_cannot_follow_is_refused(change: str, record_script: RecordScript) -> None:
    with pytest.raises(Unfollowed):
        record_script(
            script(
                f"""
                import mmap
                write("other", b"other", sync=False)
                file = os.open(work + "file", os.O_RDWR | os.O_CREAT)
                os.ftruncate(file, 4096)
                {change}
                """
            )
        )


def test_a_failed_command_gives_no_recording(record_script: RecordScript) -> None:
    with pytest.raises(CommandFailed, match="it went wrong"):
        record_script("raise SystemExit('it went wrong')")


def test_the_same_seed_gives_the_same_states_and_no_state_twice(record_script: RecordScript) -> None:
    recording = record_script(script(textwrap.dedent(REPLACE).format(sync=False, folder="")))
    once, again = (list(generate_states(recording, seed=3, count=25)) for _ in range(2))
    assert once == again
    assert len({repr((cut.acks, cut.tree)) for cut in once}) == len(once) == 25
    assert list(generate_states(recording, seed=4, count=25)) != once


@pytest.fixture
def scratch() -> Iterator[Path]:
    """The folder where states are made: in memory if possible, because a sync costs nothing there."""
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def record_scenario(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Recording]:
    """Return a function that records a scenario once, with the path of strace."""
    return functools.cache(lambda name, strace: powercuts.record(name, tmp_path_factory.mktemp("recorded"), strace))


@pytest.mark.parametrize("scenario", powercuts.SCENARIOS)
def test_acknowledged_steps_survive_a_power_cut(
    scenario: str, strace: str, record_scenario: Callable[[str, str], Recording], scratch: Path, tmp_path: Path
) -> None:
    recording = record_scenario(scenario, strace)
    checked, violations = powercuts.attack(scenario, recording, scratch, seed=1, count=STATES, most=1)
    for violation in violations:
        kept = powercuts.save_violation(violation, tmp_path, seed=1)
        pytest.fail(f"{violation.cut.description}\n{violation.error}\nkept in {kept}")
    assert checked == STATES


def test_a_state_that_lacks_an_acknowledged_blob_is_caught_and_saved(
    strace: str, record_scenario: Callable[[str, str], Recording], scratch: Path, tmp_path: Path
) -> None:
    recording = record_scenario("recovery", strace)
    *_, last = generate_states(recording, seed=1, count=60)
    write_state(last.tree, scratch / "good")
    powercuts.check_cut("recovery", scratch / "good", last.acks)
    (blob,) = (path for path in last.tree if path.endswith(hex_of(powercuts.A.config)))
    tree = {path: entry for path, entry in last.tree.items() if path != blob}
    violation = powercuts.Violation("recovery", last._replace(tree=tree), "P1")
    kept = powercuts.save_violation(violation, tmp_path, seed=1)
    for _ in range(2):
        with pytest.raises(AssertionError, match="P1"):
            powercuts.check_again(kept)


def test_a_state_that_lacks_a_step_or_has_one_too_many_is_caught(
    strace: str, record_scenario: Callable[[str, str], Recording], scratch: Path
) -> None:
    recording = record_scenario("recovery", strace)
    before, after = final_state(recording._replace(events=[])), final_state(recording)
    steps = len(powercuts.possible_states("recovery")[0]) - 1
    write_state(after, scratch / "good")
    powercuts.check_cut("recovery", scratch / "good", range(steps))
    for name, tree, acks in (("behind", before, range(2)), ("ahead", after, range(1))):
        write_state(tree, scratch / name)
        with pytest.raises(AssertionError, match="P7"):
            powercuts.check_cut("recovery", scratch / name, acks)
