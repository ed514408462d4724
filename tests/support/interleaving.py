"""Interleavings: step two processes that share a store through every order of their steps.

Each of the two actors is a function that runs in its own process. The process stops at each step point, and goes on
when the test tells it to. Between two stops it runs alone. So an order is a word of As and Bs, such as ``AABBA``: a
test can print it and run it again. `every_order` finds all words: it runs each of them from the start.

Orders that a lock prevents are left out: an actor announces the lock that it is about to take, and does not go on
while the other actor holds it. If the code under test no longer takes the lock, no actor announces it, and the orders
that the lock prevented run too. Step points inside a critical section are there to find these orders. They cost
little while the lock works: the other actor usually waits for the lock, so there is no choice of who goes next.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

__all__ = ["Choose", "Failed", "Order", "Outcome", "Steps", "Zygote", "every_order", "run", "serve"]

Choose = Callable[[str], str]
"""Choose which actor goes next, A or B, after the steps of a word."""

STEP_SECONDS = 30.0  # seconds that an actor may take from one stop to the next
_MESSAGE_BYTES = 1 << 16
_OTHER = {"A": "B", "B": "A"}


class Failed(AssertionError):
    """An order failed; the message says how and names the order."""


class Steps:
    """The actor's side of the stepping: where it stops. It stops only inside the block of `stepped`."""

    def __init__(self, channel: socket.socket, kinds: Collection[str]) -> None:
        self._channel = channel
        self.kinds = kinds
        self.held: set[str] = set()  # the locks that the actor announced and has not released
        self._last = ""  # the kind of the last step point, whether the actor stopped there or not
        self._stepping = False

    @contextmanager
    def stepped(self) -> Iterator[None]:
        """Step through the block; stop at its end too, until the other actor is at the end of its own block."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            self._send("end", "end")
            self._wait()

    @contextmanager
    def without_stops(self) -> Iterator[None]:
        """Stop only before locks during the block."""
        kinds, self.kinds = self.kinds, ()
        try:
            yield
        finally:
            self.kinds = kinds

    def step(self, kind: str, label: str = "") -> None:
        """Stop if points of this kind are wanted: all, or with ``kind*`` the first of several in a row."""
        if self._stepping and (kind in self.kinds or (f"{kind}*" in self.kinds and kind != self._last)):
            self._send("step", f"{kind} {label}".rstrip())
            self._wait()
        self._last = kind

    def announce_lock(self, lock: str, label: str, *, inner: bool = False) -> None:
        """Announce a lock, and stop before taking it.

        Args:
            lock: its name.
            label: a description of the step.
            inner: the actor takes it inside another lock, so the actor goes on at once if the lock is free.
        """
        if self._stepping:
            self._send("inner" if inner else "wants", label, lock)
            self._wait()
            self.held.add(lock)
        self._last = ""

    def report_taken(self, lock: str) -> None:
        """Report that the actor took a lock without waiting."""
        if self._stepping:
            self._send("took", "", lock)

    def report_released(self, lock: str) -> None:
        """Report that the actor released a lock."""
        if self._stepping:
            self._send("released", "", lock)
            self.held.discard(lock)

    def _send(self, what: str, label: str, lock: str = "") -> None:
        self._channel.send(json.dumps([what, label, lock]).encode())

    def _wait(self) -> None:
        if not self._channel.recv(1):
            os._exit(1)  # the test has closed its end


class Outcome(NamedTuple):
    """How an actor ended: with a value that JSON can hold, or with an error."""

    value: Any
    error: str  # the name of the error's class, or empty
    trace: str  # the traceback, or empty


class Zygote:
    """A process that has imported all modules, and its forks, which run the actors of one order after another.

    A fork serves again, because the first operation in a fork takes five times as long as later ones.
    """

    def __init__(self, module: str, root: Path) -> None:
        """Start the process.

        Args:
            module: a module with ``act(actor, directory, steps)``, which does the actor's work, and ``warm()``, which
                is called once before the first fork and does whatever is slow the first time.
            root: the folder to import it from.
        """
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = "import sys; from tests.support.interleaving import serve; serve(sys.argv[1], int(sys.argv[2]))"
        # A fixed hash seed gives sets the same order each time, so a printed order can be run again.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, module, str(theirs.fileno())],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self._free: list[socket.socket] = []  # to the forks that run no actor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in (self._socket, *self._free):
            channel.close()  # this ends the process at the other end
        self._process.wait()

    def start(self, actor: str, directory: Path, kinds: Collection[str]) -> _Process:
        """Let a fork run an actor."""
        channel = self._free.pop() if self._free else self._fork()
        channel.settimeout(STEP_SECONDS)
        channel.send(json.dumps([actor, str(directory), sorted(kinds)]).encode())
        return _Process(channel, self._free)

    def _fork(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._socket, [b"fork"], [theirs.fileno()])
        return ours


def serve(module: str, descriptor: int) -> None:
    """Fork for each request, in the zygote's process, until the socket is closed."""
    actors = importlib.import_module(module)
    actors.warm()
    gc.freeze()  # a collection in a child would copy the pages that it shares with this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the children
    requests = socket.socket(fileno=descriptor)
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 1)
        if not request:
            return
        channel = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            while wanted := channel.recv(_MESSAGE_BYTES):
                _act(actors.act, channel, *json.loads(wanted))
            os._exit(0)
        channel.close()


def _act(
    act: Callable[[str, Path, Steps], object], channel: socket.socket, actor: str, directory: str, kinds: list[str]
) -> None:
    channel.send(str(os.getpid()).encode())
    try:
        outcome = Outcome(act(actor, Path(directory), Steps(channel, kinds)), "", "")
    except Exception as error:
        outcome = Outcome(None, type(error).__name__, traceback.format_exc()[-_MESSAGE_BYTES // 4 :])
    channel.send(json.dumps(["outcome", *outcome]).encode())


class _Process:
    """The test's side of a running actor."""

    def __init__(self, channel: socket.socket, free: list[socket.socket]) -> None:
        self._channel, self._free = channel, free
        self._pid = 0
        self.wanted = ""  # the lock that the actor stopped before
        self.inner = False  # whether the actor takes that lock inside another
        self.held: set[str] = set()
        self.label = ""  # the description of the step after the stop
        self.ended = False  # whether the actor is at the end of its block
        self.outcome: Outcome | None = None

    def begin(self) -> None:
        """Wait until the actor is at its first stop."""
        self._pid = int(self._channel.recv(_MESSAGE_BYTES))
        self._receive()

    def go(self) -> None:
        """Let the actor run to its next stop or to the end of its block."""
        if self.wanted:
            self.held.add(self.wanted)
            self.wanted = ""
        self._channel.send(b"g")
        self._receive()

    def finish(self) -> Outcome:
        """Let the actor run from the end of its block to its own end, and return how it ended."""
        while self.outcome is None:
            self.go()
        return self.outcome

    def _receive(self) -> None:
        while True:
            message = self._channel.recv(_MESSAGE_BYTES)
            if not message:
                raise EOFError("an actor died")
            what, label, *more = json.loads(message)
            if what == "outcome":
                self.ended, self.outcome = True, Outcome(label, *more)
                return
            (lock,) = more
            if what == "took":
                self.held.add(lock)
            elif what == "released":
                self.held.discard(lock)
            else:
                self.label, self.ended = label, what == "end"
                self.wanted, self.inner = lock, what == "inner"
                return

    def close(self) -> None:
        """Kill the actor's process if the actor has not ended; otherwise let it run another actor."""
        if self.outcome is not None:
            self._free.append(self._channel)
            return
        self._channel.close()
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


class Order(NamedTuple):
    """An order that ran to its end."""

    word: str  # which actor went, step by step
    free: str  # for each step, who could have gone: A, B or * for both
    labels: list[str]  # for each step, the description of its first action
    outcomes: tuple[Outcome, Outcome]

    def __str__(self) -> str:
        """Return the word and a line for each of its steps."""
        steps = "\n".join(f"  {who}: {label}" for who, label in zip(self.word, self.labels, strict=True))
        return f"order {self.word}\n{steps}"


def run(
    zygote: Zygote,
    actors: tuple[str, str],
    directory: Path,
    kinds: Collection[str],
    *,
    choose: Choose,
    at_stop: Callable[[], None] = lambda: None,
) -> Order:
    """Run two actors in one order.

    Args:
        zygote: forks the actors.
        actors: their names.
        directory: the directory that they share.
        kinds: of the step points at which they stop.
        choose: returns who goes next when both can; it is called with the word so far.
        at_stop: called after each step, while both actors are stopped, to check what a crash would leave.

    Raises:
        Failed: if an actor dies or does not reach its next stop, or if ``at_stop`` raises an error.
    """
    done, free, labels = "", "", []
    processes: dict[str, _Process] = {}
    try:
        for who, actor in zip("AB", actors, strict=True):
            processes[who] = zygote.start(actor, directory, kinds)
            processes[who].begin()
        while able := _ready_actors(processes):
            who = choose(done) if able == "*" else able
            done, free = done + who, free + able
            labels.append(processes[who].label)
            processes[who].go()
            while processes[who].inner and who in _ready_actors(processes).replace("*", "AB"):
                processes[who].go()
            at_stop()
        if not all(process.ended for process in processes.values()):
            raise EOFError("each waits for a lock that the other holds")
        first, second = (processes[who].finish() for who in "AB")
        return Order(done, free, labels, (first, second))
    except (AssertionError, EOFError, OSError) as error:
        steps = "\n".join(f"  {who}: {label}" for who, label in zip(done, labels, strict=False))
        where = ", ".join(f"{who} at {process.label!r}" for who, process in processes.items())
        raise Failed(f"{actors} in the order {done}: {error or type(error).__name__} ({where})\n{steps}") from error
    finally:
        for process in processes.values():
            process.close()


def _ready_actors(processes: dict[str, _Process]) -> str:
    """Return who can go: A, B, * for both, or an empty string."""
    first, second = processes["A"], processes["B"]
    able = [
        not mine.ended and (not mine.wanted or mine.wanted not in other.held)
        for mine, other in ((first, second), (second, first))
    ]
    return {(True, True): "*", (True, False): "A", (False, True): "B", (False, False): ""}[able[0], able[1]]


def every_order(run_chosen: Callable[[Choose], Order], seed: int | None = None) -> Iterator[Order]:
    """Run every order once, each from the start; a caller that wants a sample stops iterating early.

    Args:
        run_chosen: runs one order; it calls its argument to choose who goes next.
        seed: run the orders in a random sequence, the same for the same seed; by default, depth first.
    """
    chance = random.Random(seed)
    closed: set[str] = set()  # prefixes of words; all orders that begin with them have run
    while "" not in closed:
        switch_rate = chance.choice((0.1, 0.3, 0.5))  # some orders often change from one actor to the other

        def choose(prefix: str, switch_rate: float = switch_rate) -> str:
            who = "A"
            if seed is not None and prefix:
                who = prefix[-1] if chance.random() >= switch_rate else _OTHER[prefix[-1]]
            elif seed is not None:
                who = chance.choice("AB")
            return who if prefix + who not in closed else _OTHER[who]

        order = run_chosen(choose)
        yield order
        closed.add(order.word)
        for at in reversed(range(len(order.word))):
            prefix, able = order.word[:at], order.free[at].replace("*", "AB")
            if not all(prefix + who in closed for who in able):
                break
            closed.difference_update(prefix + who for who in able)
            closed.add(prefix)
