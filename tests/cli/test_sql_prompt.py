"""The prompt of `cachedb sql`: queries, commands, history, completion, and signals."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachedb import Cache
from tests.conftest import Run
from tests.support import make
from tests.support.queries import ENDLESS
from tests.support.waiting import wait_until

PROMPT = "cachedb> "


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self._master = process, master

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, text: str) -> str:
        """Return what the command prints, up to a text."""
        shown = b""
        end = time.monotonic() + 120
        while text.encode() not in shown:
            assert select.select([self._master], [], [], max(0, end - time.monotonic()))[0], shown.decode()
            shown += os.read(self._master, 1)
        return shown.decode().replace("\r\n", "\n")

    def interrupt_until(self, text: str) -> None:
        """Send SIGINT until a text is printed; readline misses a signal just before it waits for a key."""
        shown = b""
        for _ in range(100):
            self.process.send_signal(signal.SIGINT)
            while select.select([self._master], [], [], 1)[0]:
                shown += os.read(self._master, 1)
                if text.encode() in shown:
                    return
        pytest.fail(shown.decode())

    def ask(self, text: str) -> str:
        """Type a line, and return what is printed before the next prompt."""
        self.send(f"{text}\n")
        shown = self.read_until(PROMPT)
        return shown.partition("\n")[2].removesuffix(PROMPT)


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "cachedb" / "sql_history"


@pytest.fixture
def cache(directory: Path) -> Iterator[Cache]:
    with Cache.open(directory) as opened:
        make.save(opened, "app:1", make.image(1, 2))
        yield opened


@contextmanager
def open_prompt(cache: Cache, *arguments: str) -> Iterator[Terminal]:
    """Start `cachedb sql` on a terminal, and wait for the prompt."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "cachedb", "--dir", str(cache.directory), "sql", *arguments]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "100", "INPUTRC": "/dev/null"}
    with subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        try:
            terminal = Terminal(process, master)
            terminal.read_until(PROMPT)
            yield terminal
        finally:
            process.kill()
            os.close(master)


@pytest.mark.slow
@pytest.mark.usefixtures("history")
def test_the_prompt_answers_queries_and_commands(cache: Cache) -> None:
    with open_prompt(cache, "--format", "csv", "-p", "name=app:1", "--no-header", "--timeout", "1s") as terminal:
        assert terminal.ask("SELECT name, complete FROM image_usage;") == "app:1,1\n"
        assert terminal.ask("SELECT ';', :name -- a comment;\n;") == "    ...> ;\n;,app:1\n"
        assert terminal.ask("SELECT nme FROM image_usage;") == (
            "cachedb: no such column: nme: did you mean name?, in line 1:\n"
            "  SELECT nme FROM image_usage;\n         ^^^\n"
        )
        assert terminal.ask("DELETE FROM images;") == "cachedb: only read-only queries are allowed: use SELECT\n"
        assert "took over 1 s" in terminal.ask(f"{ENDLESS.format('count(*)')};")
        assert "image_usage," in terminal.ask(".views")
        assert ".exit" in terminal.ask(".help")
        assert terminal.ask(".schema garbage").startswith("digest,TEXT,")
        assert terminal.ask(".schema nowhere") == "cachedb: there is no view 'nowhere': `cachedb sql` lists the views\n"
        assert (terminal.ask(""), terminal.ask(";")) == ("", "")
        cache.tag("app:1", "app:2")
        assert terminal.ask("SELECT count(*) FROM images;") == "2\n", "each query sees the newest state"
        terminal.send(".exit\n")
        assert terminal.process.wait(timeout=120) == 0


@pytest.mark.slow
def test_the_prompt_keeps_a_private_history(cache: Cache, history: Path) -> None:
    with open_prompt(cache) as terminal:
        terminal.ask("SELECT 1\nAS one;")
        terminal.send("\x04")
        assert terminal.process.wait(timeout=120) == 0
    assert (history.read_text(), history.stat().st_mode & 0o777) == ("SELECT 1 AS one;\n", 0o600)
    history.chmod(0o644)
    with open_prompt(cache) as terminal:
        terminal.send("\x10")  # the previous line
        terminal.read_until("AS one;")
        terminal.send("\n")
        terminal.read_until(PROMPT)
        assert history.stat().st_mode & 0o777 == 0o600
        history.unlink()
        history.symlink_to(history.parent / "other")
        terminal.ask("SELECT 2;")
    assert not (history.parent / "other").exists()


@pytest.mark.slow
def test_a_long_history_is_shortened(cache: Cache, history: Path) -> None:
    history.parent.mkdir(parents=True)
    history.write_text("".join(f"SELECT {number};\n" for number in range(2_001)))
    with open_prompt(cache):
        assert history.read_text().splitlines()[0] == "SELECT 1001;"


@pytest.mark.slow
@pytest.mark.usefixtures("history")
def test_an_interrupt_cancels_the_query_or_the_line_and_not_the_prompt(cache: Cache) -> None:
    with open_prompt(cache) as terminal:
        terminal.send(f"{ENDLESS.format('count(*)')};\n")
        assert wait_until(lambda: os.sched_getscheduler(terminal.process.pid) == os.SCHED_IDLE)
        terminal.interrupt_until(PROMPT)
        terminal.send("SELECT a line\n")
        terminal.read_until("...> ")
        terminal.interrupt_until(PROMPT)
        terminal.send("SELECT 'an' || 'swer';\n")
        terminal.read_until("answer")
        terminal.read_until(PROMPT)
        assert os.sched_getscheduler(terminal.process.pid) == os.SCHED_OTHER
        terminal.send("\x04")
        assert terminal.process.wait(timeout=120) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("history")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("SELECT name FROM image_us", "image_usage"),
        ("SELECT name FROM image_usage AS u WHERE u.freed_s", "u.freed_size"),
        ("SELECT unique_s", "unique_size"),
        ("SELECT image_usage.freed_s", "image_usage.freed_size"),
        ("selec", "select"),
        (".vie", ".views"),
        (".schema garb", "garbage"),
    ],
)
def test_a_tab_completes_views_columns_and_keywords(cache: Cache, typed: str, completed: str) -> None:
    with open_prompt(cache) as terminal:
        terminal.send(f"{typed}\t")
        terminal.read_until(completed)


def test_without_a_terminal_the_views_are_listed(cachedb: Run, cache: Cache, history: Path) -> None:
    assert "image_usage  " in cachedb("sql", input="SELECT 1;").stdout
    assert not history.exists()
