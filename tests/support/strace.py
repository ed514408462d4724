"""Kill a victim at a system call, or make a system call of it fail, with strace."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CHANGES = (
    "link,linkat,symlink,symlinkat,rename,renameat,renameat2,unlink,unlinkat,fsync,fdatasync,write,pwrite64,writev,"
    "pwritev,ftruncate,fallocate,copy_file_range,sendfile,mkdir,mkdirat,rmdir,flock,chmod,fchmod,fchmodat"
)
"""The system calls that change a file system, and flock."""

FALLIBLE = CHANGES.replace(",flock", "")
"""The system calls that may fail on a full or failing disk."""


class CannotTrace(Exception):
    """The kernel does not let strace trace."""


@contextmanager
def start_zygote(command: list[str], directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that forks a victim for each line of stdin, and prints its ID and exit status."""
    with subprocess.Popen(
        command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        process.kill()


def inject(strace: str, zygote: subprocess.Popen[str], victim: str, injection: str, calls: str = CHANGES) -> int:
    """Let a victim do its work while strace injects a fault; return the victim's exit status.

    Args:
        strace: the path of strace.
        zygote: the process that forks the victim.
        victim: the line for the zygote, which says what the victim does.
        injection: in strace's syntax, such as ``signal=SIGKILL:when=3`` or ``error=ENOSPC:when=3+``.
        calls: the system calls that ``when`` counts.

    Raises:
        CannotTrace: if the kernel does not let strace trace.
    """
    to, answers = _pipes(zygote)
    to.write(f"{victim}\n")
    number = answers.readline().strip()
    command = [strace, "-f", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={calls}:{injection}"]
    with subprocess.Popen([*command, "-p", number], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        attached = tracer.stderr.readline()
        if "attached" not in attached:
            os.kill(int(number), signal.SIGKILL)
            answers.readline()
            raise CannotTrace(attached.strip())
        to.write("\n")
        status = int(answers.readline())
        tracer.stderr.read()
    return status


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout
