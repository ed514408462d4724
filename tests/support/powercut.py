"""Power cuts: record what a command does to a directory, and build what a power cut may leave.

`record` runs any command under strace and turns its system calls into events. `generate_states` yields directories that
a power cut at any point may leave. `write_state` writes one of them to disk, so that a test can open and check it. This
module works for any command. The command acknowledges a step by writing ``ack 3`` and a newline, with the number of the
step, in one write to stdout or to a file outside of the directory.

The model of the file system assumes what POSIX promises, which is less than ext4 or xfs do:

- ``fsync`` of a file keeps its content, size and mode, but not its name. ``fdatasync`` does not keep the mode either.
  Both cover the changes made before the call begins, and take effect when it ends.
- ``fsync`` of a directory keeps all changes of names in it. A rename is one change: a sync of either directory keeps
  it as a whole. ext4 and xfs also keep the name of a new file that is synced, and earlier changes; the model does not.
- Any other change of a name may be lost while a later one is kept, unless both change the same name. The journals of
  ext4 and xfs keep the order.
- Any other write may be kept, lost, or torn between sectors of 512 bytes, in any order. Or only the new size is kept,
  with zeros in place of the data. A kept sector has the content that it had in memory at some moment.
- A sector is written whole or not at all, and synced data never changes by itself.

`record` raises `Unfollowed` for changes that it cannot follow: through a shared mapping, by ``io_uring``, by copies in
the kernel. To prove that it missed nothing, it applies all events and compares the result with the real directory.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import stat
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SECTOR_BYTES = 512
ROOT = 0  # the inode number of the recorded directory
_MAX_CALL_BYTES = 64 * 1024 * 1024  # of data in one system call

_REFUSED = "copy_file_range,sendfile,splice,mmap,ioctl,io_uring_setup,io_submit,openat2,mknod,mknodat,sync,syncfs"
_FOLLOWED = (
    "open,openat,creat,close,dup,dup2,dup3,fcntl,lseek,read,readv,clone,clone3,fork,vfork,chdir,fchdir,umask,"
    "write,pwrite64,writev,pwritev,pwritev2,truncate,ftruncate,fallocate,fsync,fdatasync,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "chmod,fchmod,fchmodat"
)
_CALLS_WITH_A_BEGINNING = ("fsync", "fdatasync", "close")
"""Calls that take effect, or whose coverage is decided, when they begin."""
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (.*)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")
_DESCRIPTOR = re.compile(r"(\w+)<(.*)>(?:\(deleted\))?")
_HEX = re.compile(r"(?:\\x[0-9a-f]{2})+")
_ACK = re.compile(rb"ack (\d+)\n")


class Unfollowed(Exception):
    """The command made a system call that the recorder or the model cannot follow."""


class CommandFailed(Exception):
    """The recorded command failed, or strace could not trace it."""


class Entry(NamedTuple):
    """A file, directory or symlink at a path."""

    kind: str  # file, directory or symlink
    mode: int
    content: bytes  # the data of a file, the target of a symlink
    same_as: str  # the first path of the same inode


Tree = dict[str, Entry]
"""The content of a directory: entries by relative path, parents first."""


class Inode(NamedTuple):
    """A file, directory or symlink as it was created."""

    kind: str
    mode: int
    content: bytes


class Names(NamedTuple):
    """A change of one or more directory entries in one step."""

    text: str
    changes: tuple[tuple[int, str, int | None], ...]  # directory, name, and the new inode or None


class Write(NamedTuple):
    """A write to a file."""

    text: str
    inode: int
    offset: int
    data: bytes


class Resize(NamedTuple):
    """A truncation of a file, or an extension with zeros."""

    text: str
    inode: int
    size: int


class Chmod(NamedTuple):
    """A change of a mode."""

    text: str
    inode: int
    mode: int


class SyncBegun(NamedTuple):
    """The beginning of a sync, which covers the events before it."""

    text: str
    number: int


class Synced(NamedTuple):
    """The end of a sync: what it covers is durable now."""

    text: str
    number: int
    inode: int
    with_mode: bool


class Ack(NamedTuple):
    """An acknowledgement of a step by the command."""

    text: str
    number: int


Event = Names | Write | Resize | Chmod | SyncBegun | Synced | Ack
Change = Names | Write | Resize | Chmod


class Recording(NamedTuple):
    """The changes of a command to a directory, all of which was durable when the command began."""

    inodes: dict[int, Inode]  # those at the beginning, and those that the command created
    names: dict[int, dict[str, int]]  # the names at the beginning, by directory
    events: Sequence[Event]
    end: Tree  # the content of the directory afterwards


class Cut(NamedTuple):
    """A state that a power cut may leave."""

    number: int  # in the sequence of `generate_states`
    position: int  # the number of events before the cut
    acks: tuple[int, ...]  # the steps acknowledged before the cut
    description: str
    tree: Tree


# Recording


def record(
    command: Sequence[str],
    directory: Path,
    *,
    strace: str = "strace",
    leave_out: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> Recording:
    """Run a command and record its changes below a directory.

    Args:
        command: the program and its arguments.
        directory: an existing directory; all of its content counts as durable.
        strace: the path of strace.
        leave_out: suffixes of files to ignore because a power cut never leaves them, such as SQLite's ``-shm``.
        env: the command's environment; by default, this process's.
        timeout: seconds that the command may take.

    Raises:
        Unfollowed: if the command changes the directory in a way that the recorder cannot follow.
        CommandFailed: if the command fails, or cannot be traced.
    """
    directory = directory.resolve(strict=True)
    before = read_tree(directory, leave_out)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        # -xx: strings in hexadecimal, so no string looks like syntax; -y: each descriptor with its path.
        options = ["-f", "--seccomp-bpf", "-y", "-xx", "-s", str(_MAX_CALL_BYTES), "-e", "signal=none"]
        calls = ["-e", f"trace={_FOLLOWED},{_REFUSED}"]
        process = subprocess.run(
            [strace, *options, *calls, "-o", str(trace), "--", *command],
            env=env,
            timeout=timeout,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if process.returncode:
            raise CommandFailed(f"{command[0]} ended with {process.returncode}: {process.stderr[-2000:]}")
        with trace.open(encoding="ascii") as lines:
            recording = _Reader(directory, before, leave_out).read(lines, read_tree(directory, leave_out))
    verify(recording)
    return recording


def verify(recording: Recording) -> None:
    """Raise `Unfollowed` unless the events make the real directory; otherwise the recorder missed a call."""
    made = final_state(recording)
    for path in sorted(made.keys() | recording.end.keys()):
        ours, real = made.get(path), recording.end.get(path)
        if ours != real:
            fields = [field for field in Entry._fields if getattr(ours, field, None) != getattr(real, field, None)]
            recorded, actual = ([str(getattr(entry, field, None))[:60] for field in fields] for entry in (ours, real))
            raise Unfollowed(f"{path} is not what the events make: {fields} should be {actual}, and are {recorded}")


def final_state(recording: Recording) -> Tree:
    """Return the content of the directory after all events, with no change lost."""
    disk = Disk(recording)
    for event in recording.events:
        disk.add(event)
    return disk.tree(dict.fromkeys(disk.pending, KEEP))


class _File:
    """An open file description, which descriptors share after a dup or a fork."""

    def __init__(self, inode: int, flags: str) -> None:
        self.inode, self.offset = inode, 0
        self.append = "O_APPEND" in flags


class _Reader:
    """A parser that turns a trace into events, in the order in which the calls end."""

    def __init__(self, directory: Path, before: Tree, leave_out: tuple[str, ...]) -> None:
        self._directory, self._leave_out = str(directory), leave_out
        self._cwd = os.getcwd()
        os.umask(umask := os.umask(0o077))
        self._umask = umask
        self._inodes: dict[int, Inode] = {ROOT: Inode("directory", stat.S_IMODE(directory.stat().st_mode), b"")}
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self._sizes: dict[int, int] = {}
        self._files: dict[int, dict[int, _File]] = {}  # by thread and descriptor; the threads of a process share one
        self._events: list[Event] = []
        self._begun: dict[int, int] = {}  # the running sync of each thread
        self._syncs = 0
        numbers: dict[str, int] = {}
        for path, entry in before.items():
            inode = numbers.get(entry.same_as)
            if inode is None:
                inode = numbers[path] = self._create_inode(entry.kind, entry.mode, entry.content)
            parent, name = self._locate(f"{self._directory}/{path}")
            self._names[parent][name] = inode

    def read(self, lines: Iterable[str], end: Tree) -> Recording:
        inodes, names = dict(self._inodes), {inode: dict(entries) for inode, entries in self._names.items()}
        calls = list(_parse_calls(lines))
        parents = {}
        for thread, call, arguments, result in calls:
            if call in ("clone", "clone3", "fork", "vfork") and result.isdigit():
                parents[int(result)] = (thread, "CLONE_FILES" in arguments)
        for thread, call, arguments, result in calls:
            self._register_thread(thread, parents)
            if not result:
                self._begin_call(thread, call, _split_arguments(arguments))
            elif not result.startswith(("-", "?")):
                self._call(thread, call, _split_arguments(arguments), result)
        # Only events give names to the inodes that the command created.
        for inode, made in self._inodes.items():
            inodes.setdefault(inode, made)
            if made.kind == "directory":
                names.setdefault(inode, {})
        return Recording(inodes, names, self._events, end)

    def _register_thread(self, thread: int, parents: dict[int, tuple[int, bool]]) -> None:
        """Give a new thread its parent's descriptors, and a new process a copy of them."""
        if thread in self._files:
            return
        self._files[thread] = {}
        if thread in parents:
            parent, shared = parents[thread]
            self._register_thread(parent, parents)
            self._files[thread] = self._files[parent] if shared else dict(self._files[parent])

    def _call(self, thread: int, call: str, arguments: list[str], result: str) -> None:
        match call:
            case "open":
                self._open(thread, arguments[1], arguments[2:], result)
            case "openat":
                self._open(thread, arguments[2], arguments[3:], result)
            case "creat":
                self._open(thread, "O_WRONLY|O_CREAT|O_TRUNC", arguments[1:], result)
            case "dup" | "dup2" | "dup3" | "fcntl" | "lseek" | "read" | "readv":
                self._descriptor_call(thread, call, arguments, result)
            case "write" | "pwrite64" | "writev" | "pwritev" | "pwritev2":
                self._write(thread, call, arguments, int(result))
            case "truncate" | "ftruncate":
                inode = (
                    self._find_inode_of(thread, arguments[0])
                    if call == "ftruncate"
                    else self._resolve_inode(arguments[0])
                )
                self._resize(inode, int(arguments[1]), call)
            case "fallocate":
                self._apply_fallocate(thread, arguments)
            case "fsync" | "fdatasync":
                self._end_sync(thread, call, arguments)
            case "chmod" | "fchmod" | "fchmodat":
                self._chmod(thread, call, arguments)
            case "chdir" | "fchdir":
                raise Unfollowed(f"{call}: the command changes its working directory")
            case "umask":
                self._umask = int(arguments[0], 8)
            case "close" | "clone" | "clone3" | "fork" | "vfork":
                pass  # handled before
            case _ if call in _REFUSED.split(","):
                self._refuse_change(call, arguments)
            case _:
                self._change_names(call, arguments)

    # Paths and inodes

    def _resolve_path(self, *arguments: str) -> str | None:
        """Return the absolute path that ``[folder,] "path"`` means, or None if it is outside of the directory."""
        base = self._cwd if len(arguments) == 1 else _decode(_parse_descriptor(arguments[0])[1])
        path = os.path.normpath(os.path.join(base, _decode(arguments[-1].strip('"'))))
        return path if self._is_ours(path) else None

    def _is_ours(self, path: str) -> bool:
        return path.startswith(self._directory + "/") and not path.endswith(self._leave_out or ("\0",))

    def _locate(self, path: str) -> tuple[int, str]:
        """Return the inode of a path's directory, and its name there."""
        *folders, name = path[len(self._directory) + 1 :].split("/")
        parent = ROOT
        for folder in folders:
            found = self._names.get(parent, {}).get(folder)
            if found is None or found not in self._names:
                raise Unfollowed(f"{path} is not in a recorded directory")
            parent = found
        return parent, name

    def _find(self, path: str) -> int | None:
        if path == self._directory:
            return ROOT
        parent, name = self._locate(path)
        return self._names[parent].get(name)

    def _resolve_inode(self, *arguments: str) -> int | None:
        """Return the inode of a path, or None if the path is outside of the directory."""
        path = self._resolve_path(*arguments)
        if path is None:
            return None
        inode = self._find(path)
        if inode is None or self._inodes[inode].kind == "symlink":
            raise Unfollowed(f"{path} does not exist, or is a symlink")
        return inode

    def _create_inode(self, kind: str, mode: int, content: bytes = b"") -> int:
        inode = len(self._inodes)
        self._inodes[inode] = Inode(kind, mode, content)
        self._sizes[inode] = len(content)
        if kind == "directory":
            self._names[inode] = {}
        return inode

    def _relative(self, path: str) -> str:
        return path[len(self._directory) + 1 :]

    def _set_names(self, text: str, *changes: tuple[str, int | None]) -> None:
        placed = tuple((*self._locate(path), inode) for path, inode in changes)
        for parent, name, inode in placed:
            if inode is None:
                self._names[parent].pop(name, None)
            else:
                self._names[parent][name] = inode
        self._events.append(Names(text, placed))

    # Descriptors

    def _open(self, thread: int, flags: str, mode: list[str], result: str) -> None:
        number, path = _parse_descriptor(result)
        real = _decode(path)
        if not self._is_ours(real) and real != self._directory:
            return
        if "O_TMPFILE" in flags or "SYNC" in flags:
            raise Unfollowed(f"{self._relative(real)} was opened with {flags}")
        inode = self._find(real)
        if inode is None:
            if "O_CREAT" not in flags:
                raise Unfollowed(f"{self._relative(real)} was opened, but no recorded call created it")
            inode = self._create_inode("file", int(mode[0], 8) & ~self._umask)
            self._set_names(f"create {self._relative(real)}", (real, inode))
        elif "O_TRUNC" in flags:
            self._resize(inode, 0, "truncate")
        self._files[thread][int(number)] = _File(inode, flags)

    def _descriptor_call(self, thread: int, call: str, arguments: list[str], result: str) -> None:
        files, (number, path) = self._files[thread], _parse_descriptor(arguments[0])
        if not self._is_ours(_decode(path)):
            return
        if call == "lseek":
            files[int(number)].offset = int(result)
        elif call.startswith("read"):
            files[int(number)].offset += int(result)
        elif call.startswith("dup") or arguments[1].startswith("F_DUPFD"):
            files[int(_parse_descriptor(result)[0])] = files[int(number)]

    def _find_file(self, thread: int, argument: str) -> _File | None:
        number, path = _parse_descriptor(argument)
        real = _decode(path)
        if not self._is_ours(real) and real != self._directory:
            return None
        try:
            return self._files[thread][int(number)]
        except KeyError:
            raise Unfollowed(f"{self._relative(real)} is used through a descriptor of unknown origin") from None

    def _find_inode_of(self, thread: int, argument: str) -> int | None:
        file = self._find_file(thread, argument)
        return None if file is None else file.inode

    # Content

    def _write(self, thread: int, call: str, arguments: list[str], length: int) -> None:
        file = self._find_file(thread, arguments[0])
        strings = re.findall('"(.*?)"', ",".join(arguments[1:]))
        data = b"".join(bytes.fromhex(string.replace("\\x", "")) for string in strings)
        if file is None:
            if call == "write" and (ack := _ACK.fullmatch(data)):
                self._events.append(Ack(data.decode().strip(), int(ack[1])))
            return
        data = data[:length]
        if len(data) < length or "RWF_" in arguments[-1]:
            raise Unfollowed(f"{call}: the trace lacks data, or a flag is set")
        if call.startswith("p"):
            offset = int(arguments[3])
        elif file.append:
            offset = self._sizes[file.inode]
        else:
            offset, file.offset = file.offset, file.offset + length
        self._sizes[file.inode] = max(self._sizes[file.inode], offset + length)
        where = _decode(_parse_descriptor(arguments[0])[1])
        self._events.append(Write(f"write {self._relative(where)} {offset}+{length}", file.inode, offset, data))

    def _resize(self, inode: int | None, size: int, text: str) -> None:
        if inode is not None and size != self._sizes[inode]:
            self._sizes[inode] = size
            self._events.append(Resize(f"{text} to {size}", inode, size))

    def _apply_fallocate(self, thread: int, arguments: list[str]) -> None:
        inode = self._find_inode_of(thread, arguments[0])
        if inode is None or arguments[1] == "FALLOC_FL_KEEP_SIZE":
            return
        if arguments[1] != "0":
            raise Unfollowed(f"fallocate with {arguments[1]}")
        self._resize(inode, max(self._sizes[inode], int(arguments[2]) + int(arguments[3])), "fallocate")

    def _chmod(self, thread: int, call: str, arguments: list[str]) -> None:
        where, mode = arguments[: 2 if call == "fchmodat" else 1], arguments[2 if call == "fchmodat" else 1]
        inode = self._find_inode_of(thread, where[0]) if call == "fchmod" else self._resolve_inode(*where)
        if inode is not None:
            self._events.append(Chmod(f"chmod {mode}", inode, int(mode, 8)))

    def _begin_call(self, thread: int, call: str, arguments: list[str]) -> None:
        if call == "close":
            self._files[thread].pop(int(_parse_descriptor(arguments[0])[0]), None)
        elif self._find_file(thread, arguments[0]) is not None:
            self._syncs += 1
            self._begun[thread] = self._syncs
            self._events.append(SyncBegun("sync begins", self._syncs))

    def _end_sync(self, thread: int, call: str, arguments: list[str]) -> None:
        inode = self._find_inode_of(thread, arguments[0])
        if inode is not None:
            path = self._relative(_decode(_parse_descriptor(arguments[0])[1]))
            self._events.append(Synced(f"{call} {path}", self._begun.pop(thread), inode, call == "fsync"))

    # Names

    def _change_names(self, call: str, arguments: list[str]) -> None:
        match call:
            case "rename":
                self._rename(self._resolve_path(arguments[0]), self._resolve_path(arguments[1]), "")
            case "renameat" | "renameat2":
                self._rename(
                    self._resolve_path(*arguments[:2]), self._resolve_path(*arguments[2:4]), "".join(arguments[4:])
                )
            case "link":
                self._link(self._resolve_path(arguments[0]), self._resolve_path(arguments[1]))
            case "linkat":
                if arguments[4] != "0":
                    raise Unfollowed(f"linkat with {arguments[4]}")
                self._link(self._resolve_path(*arguments[:2]), self._resolve_path(*arguments[2:4]))
            case "symlink" | "symlinkat":
                if path := self._resolve_path(*arguments[1:]):
                    inode = self._create_inode("symlink", 0o777, os.fsencode(_decode(arguments[0].strip('"'))))
                    self._set_names(f"symlink {self._relative(path)}", (path, inode))
            case "mkdir" | "mkdirat":
                if path := self._resolve_path(*arguments[:-1]):
                    inode = self._create_inode("directory", int(arguments[-1], 8) & ~self._umask)
                    self._set_names(f"mkdir {self._relative(path)}", (path, inode))
            case "unlink" | "rmdir" | "unlinkat":
                if path := self._resolve_path(*arguments[:2] if call == "unlinkat" else arguments):
                    self._set_names(f"{call} {self._relative(path)}", (path, None))
            case _:
                raise Unfollowed(call)

    def _rename(self, source: str | None, target: str | None, flags: str) -> None:
        if source is None and target is None:
            return
        if source is None or target is None or flags not in ("", "0", "RENAME_NOREPLACE", "RENAME_EXCHANGE"):
            raise Unfollowed(f"rename of {source} to {target}, {flags}")
        inode, replaced = self._find(source), self._find(target)
        if inode is None:
            raise Unfollowed(f"{source} was renamed, but no recorded call created it")
        if inode == replaced:
            return  # POSIX: a rename between two names of one file does nothing
        text = f"rename {self._relative(source)} to {self._relative(target)}"
        self._set_names(text, (source, replaced if flags == "RENAME_EXCHANGE" else None), (target, inode))

    def _link(self, source: str | None, target: str | None) -> None:
        if target is None:
            if source is not None:
                raise Unfollowed(f"{source} was linked to a path outside of the directory")
            return
        inode = None if source is None else self._find(source)
        if source is None or inode is None:
            raise Unfollowed(f"{target} was linked to a file outside of the directory")
        self._set_names(f"link {self._relative(source)} as {self._relative(target)}", (target, inode))

    def _refuse_change(self, call: str, arguments: list[str]) -> None:
        """Raise `Unfollowed` if the call would change a file in the directory."""
        if call in ("io_uring_setup", "io_submit", "sync", "syncfs"):
            raise Unfollowed(call)
        if call == "mmap" and not ("PROT_WRITE" in arguments[2] and "MAP_SHARED" in arguments[3]):
            return
        if call == "ioctl" and "FICLONE" not in arguments[1]:
            return
        place = {"copy_file_range": 2, "splice": 2, "sendfile": 0, "ioctl": 0, "mmap": 4}.get(call)
        if place is None:
            ours = self._resolve_path(*arguments[:2]) if call != "mknod" else self._resolve_path(arguments[0])
        else:
            path = _decode(_parse_descriptor(arguments[place])[1])
            ours = path if self._is_ours(path) else None
        if ours is not None:
            raise Unfollowed(f"{call} changes {self._relative(ours)}")


def _parse_calls(lines: Iterable[str]) -> Iterator[tuple[int, str, str, str]]:
    """Yield thread, call, arguments and result of each call, in the order in which the calls end.

    `_CALLS_WITH_A_BEGINNING` are also yielded when they begin, with an empty result: a sync covers only what happened
    before it began, and another thread may reuse a descriptor's number before the close of it ends.
    """
    unfinished: dict[int, str] = {}
    for line in lines:
        number, _, text = line.rstrip("\n").partition(" ")
        thread, text = int(number), text.lstrip()
        if text.endswith(" <unfinished ...>"):
            unfinished[thread] = text.removesuffix(" <unfinished ...>")
            begun, _, arguments = unfinished[thread].partition("(")
            if begun in _CALLS_WITH_A_BEGINNING:
                yield thread, begun, arguments, ""
            continue
        resumed = _RESUMED.fullmatch(text)
        if resumed and thread in unfinished:
            text = unfinished.pop(thread) + resumed[1]
        call = _CALL.fullmatch(text)
        if call:
            if not resumed and call[1] in _CALLS_WITH_A_BEGINNING:
                yield thread, call[1], call[2], ""
            yield thread, call[1], call[2], call[3]


def _split_arguments(arguments: str) -> list[str]:
    return arguments.split(", ")


def _parse_descriptor(argument: str) -> tuple[str, str]:
    """Return the number and the path of a descriptor as strace writes it, or the number and nothing."""
    found = _DESCRIPTOR.fullmatch(argument)
    return (found[1], found[2]) if found else (argument, "")


def _decode(escaped: str) -> str:
    return os.fsdecode(_HEX.sub(lambda run: os.fsdecode(bytes.fromhex(run[0].replace("\\x", ""))), escaped))


# What a power cut leaves


class Fate(NamedTuple):
    """The effect of a power cut on a change that was not synced."""

    text: str
    sectors: frozenset[int] | None  # the kept sectors of a write; None for all
    lost: bool = False  # whether the whole change is lost


KEEP = Fate("kept", None)
DROP = Fate("lost", frozenset(), lost=True)
ZERO = Fate("only its size is kept", frozenset())

Fates = Mapping[int, Fate]
"""Fates by the position of the change among the events; a change that is not here is lost."""


class Disk:
    """The durable state after some events, and the pending changes, which are not durable."""

    def __init__(self, recording: Recording) -> None:
        self._inodes = recording.inodes
        self._content = {number: inode.content for number, inode in recording.inodes.items()}
        self._modes = {number: inode.mode for number, inode in recording.inodes.items()}
        self._names = {inode: dict(names) for inode, names in recording.names.items()}
        self._begun: dict[int, int] = {}  # the number of events before each running sync
        self._count = 0
        self.pending: dict[int, Change] = {}
        self.acks: tuple[int, ...] = ()

    def add(self, event: Event) -> None:
        """Apply the next event."""
        match event:
            case Ack():
                self.acks += (event.number,)
            case SyncBegun():
                self._begun[event.number] = self._count
            case Synced():
                self._sync(event, self._begun.pop(event.number))
            case _:
                self.pending[self._count] = event
        self._count += 1

    def _sync(self, sync: Synced, before: int) -> None:
        covered: dict[int, Change] = {}
        wanted: set[tuple[int, str]] = set()
        # Backwards: keeping a change of a name also keeps the earlier changes of that name.
        for number, change in reversed(list(self.pending.items())):
            if number >= before:
                continue
            if isinstance(change, Names):
                keys = _changed_names(change)
                if any(parent == sync.inode for parent, _ in keys) or keys & wanted:
                    wanted |= keys
                    covered[number] = change
            elif change.inode == sync.inode and (sync.with_mode or not isinstance(change, Chmod)):
                covered[number] = change
        fates = dict.fromkeys(covered, KEEP)
        self._content[sync.inode] = self._content_left(sync.inode, covered, fates)
        for number, change in sorted(covered.items()):
            if isinstance(change, Names):
                _set_names(self._names, change)
            elif isinstance(change, Chmod):
                self._modes[change.inode] = change.mode
            del self.pending[number]

    def tree(self, fates: Fates) -> Tree:
        """Return the directory that is left if the pending changes have these fates."""
        names = self._names
        modes: dict[int, int] = {}
        changed: defaultdict[int, dict[int, Change]] = defaultdict(dict)
        if any(isinstance(change, Names) for change in self.pending.values()):
            names = {inode: dict(entries) for inode, entries in names.items()}
        lost: set[tuple[int, str]] = set()
        for number, change in self.pending.items():
            kept = not fates.get(number, DROP).lost
            if isinstance(change, Names):
                # Changes of one name stay in order: after one is lost, all later ones are lost.
                if kept and not _changed_names(change) & lost:
                    _set_names(names, change)
                else:
                    lost |= _changed_names(change)
            elif isinstance(change, Chmod):
                if kept:
                    modes[change.inode] = change.mode
            else:
                changed[change.inode][number] = change
        contents = {inode: self._content_left(inode, changes, fates) for inode, changes in changed.items()}

        tree: Tree = {}
        first: dict[int, str] = {}

        def walk(folder: int, path: str, above: frozenset[int]) -> None:
            for name, inode in sorted(names[folder].items()):
                if inode in above:
                    continue  # renames of folders, some kept and some lost, have made a cycle
                place = f"{path}{name}"
                kind = self._inodes[inode].kind
                content = contents.get(inode, self._content[inode])
                mode = modes.get(inode, self._modes[inode])
                tree[place] = Entry(kind, mode, content, first.setdefault(inode, place))
                if kind == "directory":
                    walk(inode, f"{place}/", above | {inode})

        walk(ROOT, "", frozenset((ROOT,)))
        return tree

    def _content_left(self, inode: int, changes: Mapping[int, Change], fates: Fates) -> bytes:
        """Return a file's content if its changes, in their order, have these fates."""
        durable = self._content[inode]
        if not any(isinstance(change, (Write, Resize)) for change in changes.values()):
            return durable
        memory, left = bytearray(durable), bytearray(durable)
        for number, change in sorted(changes.items()):
            fate = fates.get(number, DROP)
            if isinstance(change, Write):
                end = change.offset + len(change.data)
                _extend(memory, change.offset)
                memory[change.offset : end] = change.data
                if fate is ZERO:
                    _extend(left, end)
                for begin, stop in _ranges(change, fate):
                    # A sector goes to the disk as it is in memory, with its bytes outside of this write.
                    _extend(left, min(begin, len(memory)))
                    left[begin:stop] = memory[begin : min(stop, len(memory))] + left[min(stop, len(memory)) : stop]
            elif isinstance(change, Resize):
                for content in (memory, left) if not fate.lost else (memory,):
                    del content[change.size :]
                    _extend(content, change.size)
        return bytes(left)


def _changed_names(change: Names) -> set[tuple[int, str]]:
    return {(parent, name) for parent, name, _ in change.changes}


def _set_names(names: dict[int, dict[str, int]], change: Names) -> None:
    for parent, name, inode in change.changes:
        if inode is None:
            names[parent].pop(name, None)
        else:
            names[parent][name] = inode


def _sectors(write: Write) -> range:
    return range(write.offset // SECTOR_BYTES, (write.offset + len(write.data) + SECTOR_BYTES - 1) // SECTOR_BYTES)


def _ranges(write: Write, fate: Fate) -> Iterator[tuple[int, int]]:
    sectors = _sectors(write)
    if fate.sectors is None:
        yield sectors.start * SECTOR_BYTES, sectors.stop * SECTOR_BYTES
    else:
        yield from (
            (sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES) for sector in sectors if sector in fate.sectors
        )


def _extend(content: bytearray, size: int) -> None:
    if len(content) < size:
        content.extend(bytes(size - len(content)))


# The choice of states


def generate_states(recording: Recording, seed: int, count: int | None = None) -> Iterator[Cut]:
    """Yield states that a power cut may leave; no two have the same content and acknowledgements.

    The sequence depends only on the arguments. Each round visits every position among the events, or a sample if fewer
    states are wanted, and each position gets another plan than in the round before.

    Args:
        recording: the recording of a command.
        seed: of the random choices.
        count: the number of states; None for all, until many rounds find no new one.
    """
    choices = random.Random(seed)
    seen: set[bytes] = set()
    rounds = barren = 0
    while barren < 100 and (count is None or len(seen) < count):
        found = len(seen)
        disk = Disk(recording)
        visited = set(range(len(recording.events) + 1))
        if count is not None and count - found < len(visited):
            visited = set(choices.sample(sorted(visited), count - found))
        for position in range(len(recording.events) + 1):
            if position in visited:
                name, fates = _make_plan(disk.pending, rounds + position, choices)
                tree = disk.tree(fates)
                key = hash_tree(tree, disk.acks)
                if key not in seen:
                    yield Cut(len(seen), position, disk.acks, _describe(recording, position, name, fates, disk), tree)
                    seen.add(key)
            if position < len(recording.events):
                disk.add(recording.events[position])
        rounds += 1
        barren = barren + 1 if len(seen) == found else 0


def hash_tree(tree: Tree, acks: tuple[int, ...] = ()) -> bytes:
    """Return a hash of the content of a directory and of the acknowledged steps."""
    hasher = hashlib.blake2b(repr(acks).encode(), digest_size=16)
    for path, entry in tree.items():
        hasher.update(f"{path}\0{entry.kind}\0{entry.mode}\0{entry.same_as}\0{len(entry.content)}\0".encode())
        if entry.same_as == path:
            hasher.update(entry.content)
    return hasher.digest()


def _make_plan(pending: Mapping[int, Change], number: int, choices: random.Random) -> tuple[str, Fates]:
    """Return a plan, which is a name and a fate for each change, by its number."""
    names = {place: KEEP for place, change in pending.items() if isinstance(change, Names)}
    data = {place: KEEP for place in pending if place not in names}
    plans: list[Callable[[], tuple[str, Fates]]] = [
        lambda: ("no unsynced change is kept", {}),
        lambda: ("all changes are kept", {**names, **data}),
        lambda: ("all names and no data", names),
        lambda: ("all data and no names", data),
        lambda: ("all names and sizes, with zeros as data", {**names, **dict.fromkeys(data, ZERO)}),
        lambda: _prefix_plan(pending, choices),
        lambda: _random_plan("names kept, data at random", pending, choices, keep=names),
        lambda: _random_plan("data kept, names at random", pending, choices, keep=data),
        lambda: _random_plan("at random", pending, choices, keep={}),
    ]
    for place in pending:
        plans.append(lambda place=place: ("one change is lost", {**names, **data, place: DROP}))  # type: ignore[misc]
        plans.append(lambda place=place: ("one change is kept", _with_earlier(pending, place)))  # type: ignore[misc]
    return plans[number % len(plans)]()


def _with_earlier(pending: Mapping[int, Change], place: int) -> Fates:
    """Return fates that keep one change and the earlier changes of its names."""
    fates = {place: KEEP}
    change = pending[place]
    wanted = _changed_names(change) if isinstance(change, Names) else set()
    for number, earlier in reversed(list(pending.items())):
        if number < place and isinstance(earlier, Names) and _changed_names(earlier) & wanted:
            wanted |= _changed_names(earlier)
            fates[number] = KEEP
    return fates


def _prefix_plan(pending: Mapping[int, Change], choices: random.Random) -> tuple[str, Fates]:
    places = list(pending)
    cut = choices.randint(0, len(places))
    fates = dict.fromkeys(places[:cut], KEEP)
    if cut < len(places):
        fates[places[cut]] = _choose_fate(pending[places[cut]], choices, 0.5)
    return "all changes up to a random one", fates


def _random_plan(name: str, pending: Mapping[int, Change], choices: random.Random, keep: Fates) -> tuple[str, Fates]:
    share = choices.choice((0.1, 0.5, 0.9))
    return name, {place: keep.get(place) or _choose_fate(change, choices, share) for place, change in pending.items()}


def _choose_fate(change: Change, choices: random.Random, share: float) -> Fate:
    if not isinstance(change, Write):
        return KEEP if choices.random() < share else DROP
    drawn = choices.random()
    if drawn < share * 0.7:
        return KEEP
    if drawn < share:
        sectors = frozenset(sector for sector in _sectors(change) if choices.random() < 0.5)
        return Fate(f"torn, {len(sectors)} of {len(_sectors(change))} sectors", sectors)
    return choices.choice((DROP, ZERO))


def _describe(recording: Recording, position: int, name: str, fates: Fates, disk: Disk) -> str:
    last = recording.events[position - 1].text if position else "nothing"
    lines = [f"after event {position}, {last}: {name}"]
    for place, change in disk.pending.items():
        lines.append(f"  {place}: {change.text}: {fates.get(place, DROP).text}")
    return "\n".join(lines)


# Directories


def read_tree(directory: Path, leave_out: tuple[str, ...] = ()) -> Tree:
    """Return the content of a directory, without the files that have one of the suffixes."""
    tree: Tree = {}
    first: dict[tuple[int, int], str] = {}

    def walk(folder: Path) -> None:
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            if path.name.endswith(leave_out or ("\0",)):
                continue
            status, place = path.lstat(), str(path.relative_to(directory))
            same_as = first.setdefault((status.st_dev, status.st_ino), place)
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                tree[place] = Entry("symlink", mode, os.fsencode(os.readlink(path)), same_as)
            elif stat.S_ISDIR(status.st_mode):
                tree[place] = Entry("directory", mode, b"", same_as)
                walk(path)
            else:
                tree[place] = Entry("file", mode, path.read_bytes(), same_as)

    walk(directory)
    return tree


def memory_folder() -> Path | None:
    """Return a folder in memory, or None if this process cannot write to it."""
    folder = Path("/dev/shm")
    return folder if os.access(folder, os.W_OK) else None


def write_state(tree: Tree, directory: Path) -> None:
    """Create a directory with the content of a state; hard links become hard links again."""
    directory.mkdir()
    for place, entry in tree.items():
        path = f"{directory}/{place}"
        if entry.kind == "directory":
            os.mkdir(path, entry.mode)
            os.chmod(path, entry.mode | stat.S_IRWXU)
        elif entry.same_as != place:
            os.link(f"{directory}/{entry.same_as}", path)
        elif entry.kind == "symlink":
            os.symlink(entry.content, path)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                file.write(entry.content)
                os.fchmod(descriptor, entry.mode)


def remove_state(directory: Path) -> None:
    """Remove a state's directory, if it exists."""
    shutil.rmtree(directory, ignore_errors=True)
