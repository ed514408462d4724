"""Completion in real shells, and how to install it."""

from __future__ import annotations

import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachedb import Cache
from tests.conftest import Run
from tests.support import make
from tests.support.command_server import CommandServer

MADE = make.image(1, 2, compression="gzip")
COMPLETE = """
compopt() { :; }
eval "$(cachedb completion bash)"
COMP_WORDBREAKS=$' \\t\\n"\\'><=;|&(:'
complete -p cachedb >/dev/null || exit 1
while IFS= read -r COMP_LINE; do
    COMP_POINT=${#COMP_LINE}
    COMPREPLY=()
    _cachedb_completion cachedb
    echo "${COMPREPLY[@]}"
done
"""


@pytest.fixture
def environment(cache: Cache, command_server: CommandServer, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a shell that finds `cachedb` and a cache with two names of one image."""
    make.save(cache, "app:1", MADE)
    cache.tag("app:1", "app:12")
    program = tmp_path / "bin" / "cachedb"
    program.parent.mkdir()
    command_server.write_program(program)
    return {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "CACHEDB_DIR": str(cache.directory),
        "HOME": str(tmp_path),
    }


@pytest.fixture
def complete(environment: dict[str, str], peer: Callable[[str], str]) -> Iterator[Callable[[str], list[str]]]:
    """Yield a function that returns bash's completions of a line."""
    command = [peer("bash"), "--norc", "-c", COMPLETE]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as bash:

        def ask(line: str) -> list[str]:
            assert bash.stdin
            assert bash.stdout
            bash.stdin.write(f"{line}\n")
            return bash.stdout.readline().split()

        yield ask
        bash.communicate()
    assert bash.returncode == 0


@pytest.mark.slow
def test_bash_completes_commands_names_and_digests(
    environment: dict[str, str], complete: Callable[[str], list[str]], tmp_path: Path
) -> None:
    assert complete("cachedb ex") == ["exists", "export"]
    with Cache.open(environment["CACHEDB_DIR"]) as cache:
        cache.tag("app:1", "localhost:5000/app:2")
        assert complete("cachedb rm localhost:5000/") == ["5000/app:2"]
        assert complete("cachedb rm localhost:5000/app:") == ["2"], "bash keeps the text up to the last colon"
        cache.remove_manifest("localhost:5000/app:2")
    assert complete("cachedb im") == ["import"], "hidden commands are not completed"
    assert complete("cachedb manifest ") == ["app:1", "app:12"]
    assert complete("cachedb rmi ") == ["app:1", "app:12"]
    assert complete("cachedb image rm ") == ["app:1", "app:12"]
    assert complete("cachedb show app:1") == ["1", "12"], "bash keeps the text before the colon"
    assert complete("cachedb rm app:1 a") == ["app:1", "app:12"]
    prefix = MADE.digest[:12]
    assert complete(f"cachedb blob cat {prefix}") == [MADE.digest.partition(":")[2]]
    assert complete("cachedb report largest-i") == ["largest-images"]
    assert complete("cachedb report largest-images -p l") == ["limit="]
    assert complete("cachedb report largest-images ") == ["20"]
    assert complete("cachedb report added-by app:1 app:12") == ["12"]
    assert complete("cachedb report added-by app:1 app:1 ") == []
    assert complete("cachedb report freed-by app:1 app:12 a") == ["app:1", "app:12"]
    assert complete("cachedb report added-by -p over=") == ["app:1", "app:12"], "bash keeps the text before ="
    assert complete("cachedb report added-by -p over=app:1") == ["1", "12"]
    assert complete("cachedb report added-by -p over=app:1 ap") == ["app:1", "app:12"]
    assert complete("cachedb report for-platform lin") == ["linux/amd64"]
    assert complete("cachedb report absent -p ") == []
    assert complete("cachedb sql -p ") == []
    assert complete("cachedb sql --schema image_us") == ["image_usage"]
    assert complete("cachedb sql image_us") == []
    assert complete(f"cachedb --dir {shlex.quote(str(tmp_path))}/absent show ") == []
    assert not (tmp_path / "absent").exists()


@pytest.mark.slow
def test_a_new_interpreter_completes(environment: dict[str, str]) -> None:
    """The other tests complete in forks of a process that has imported everything."""
    asked = {"_CACHEDB_COMPLETE": "bash_complete", "COMP_WORDS": "cachedb show app:1"}
    command = [sys.executable, "-m", "cachedb"]
    printed = subprocess.run(command, env={**environment, **asked}, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["plain,app:1", "plain,app:12"]


def type_in_zsh(zsh: str, environment: dict[str, str], typed: str) -> str:
    """Type a text with a tab in an interactive zsh; return the completed line."""
    master, slave = pty.openpty()
    settings = {**environment, "TERM": "dumb", "PS1": "", "ZDOTDIR": environment["HOME"]}
    # The option -d skips /etc/zsh/zshrc, which calls `compinit` on Debian.
    process = subprocess.Popen(
        [zsh, "-d", "-i"], stdin=slave, stdout=slave, stderr=slave, env=settings, start_new_session=True
    )
    os.close(slave)
    # Control-A goes to the start of the line, and `print` shows the rest of it instead of running it.
    os.write(master, f"{typed}\x01print -r -- '<'\x05'>'; exit\n".encode())
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(master)
    process.wait()
    (line,) = re.findall(r"^<(.*?) ?>\r?$", shown.decode(), re.MULTILINE)
    return str(line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "zshrc",
    [
        'eval "$(cachedb completion zsh)"',
        'autoload -Uz compinit && compinit -i\neval "$(cachedb completion zsh)"',
        'eval "$(cachedb completion zsh)"\nautoload -Uz compinit && compinit -i',
    ],
    ids=["without compinit", "after compinit", "before compinit"],
)
def test_zsh_completes_commands_names_and_digests(
    environment: dict[str, str], peer: Callable[[str], str], tmp_path: Path, zshrc: str
) -> None:
    zsh = peer("zsh")
    (tmp_path / ".zshrc").write_text(f"setopt no_beep\n{zshrc}\n")
    assert type_in_zsh(zsh, environment, "cachedb exi\t") == "cachedb exists"
    assert type_in_zsh(zsh, environment, "cachedb show app:12\t") == "cachedb show app:12"
    # That is the common prefix of app:1 and app:12.
    assert type_in_zsh(zsh, environment, "cachedb show ap\t") == "cachedb show app:1"
    digest = MADE.digest
    assert type_in_zsh(zsh, environment, f"cachedb blob cat {digest[:12]}\t") == f"cachedb blob cat {digest}"


@pytest.mark.parametrize(
    ("shell", "advice"),
    [
        ("/bin/bash", 'add `eval "$(cachedb completion bash)"` to ~/.bashrc'),
        ("/usr/bin/zsh", 'add `eval "$(cachedb completion zsh)"` to ~/.zshrc'),
        ("/usr/bin/fish", "run `cachedb completion fish > ~/.config/fish/completions/cachedb.fish`"),
        ("/bin/dash", "name bash, zsh or fish"),
        ("", "name bash, zsh or fish"),
    ],
)
def test_completion_without_a_shell_says_how_to_install_it(
    cachedb: Run, monkeypatch: pytest.MonkeyPatch, shell: str, advice: str
) -> None:
    monkeypatch.setenv("SHELL", shell)
    done = cachedb("completion")
    message = f"cachedb: no shell is given: {advice}; see `cachedb completion --help`\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(cachedb: Run, shell: str) -> None:
    assert "_CACHEDB_COMPLETE" in cachedb("completion", shell).stdout
