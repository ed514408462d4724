"""System calls of a victim cut off or made to fail, one after the other, by strace."""

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
"""The system calls that change what is on a disk, or who has a lock."""

FALLIBLE = CHANGES.replace(",flock", "")
"""Those that a full or failing disk makes fail."""


class CannotTrace(Exception):
    """strace is not allowed to trace here."""


@contextmanager
def zygote(command: list[str], directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that forks a victim for each line it reads: it prints the victim's number, and its status."""
    with subprocess.Popen(
        command, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        process.kill()


def inject(strace: str, zygote: subprocess.Popen[str], victim: str, injection: str, calls: str = CHANGES) -> int:
    """Have a victim do its work under an injection, and return its exit status.

    Args:
        strace: the program.
        zygote: that forks the victim.
        victim: the line that says what it is to do.
        injection: in strace's words, such as ``signal=SIGKILL:when=3`` or ``error=ENOSPC:when=3+``.
        calls: the system calls that are counted.

    Raises:
        CannotTrace: if the kernel does not allow it.
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
