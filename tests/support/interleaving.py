"""Interleavings: two processes at one store, stepped through every order of their steps.

Each of two actors is a function that runs in a process of its own. At each of its step points the process stops,
and goes on when it is told to; between two stops it runs alone. So an order is a word of As and Bs, such as
``AABBA``: it can be printed, and run again. `every_order` finds all words there are, by running each from the start.

An order that cannot happen is not one: an actor says which lock it is about to wait for, and is not told to go on
while the other holds it. A store that has lost its lock says nothing, and then the orders that the lock kept out
are run like the others. That is what step points inside a critical section are for; while the lock is held, they
cost next to nothing, for there the other is most often waiting, and nothing branches.
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
"""Says who goes, A or B, after the steps of a word."""

PATIENCE = 30.0  # seconds that an actor may take from one stop to the next
_LIMIT = 1 << 16  # bytes of a message
_OTHER = {"A": "B", "B": "A"}


class Failed(AssertionError):
    """What went wrong, and in which order."""


class Steps:
    """An actor's end: where it stops. Before and after the block of `stepped` it runs through."""

    def __init__(self, channel: socket.socket, kinds: Collection[str]) -> None:
        self._channel = channel
        self.kinds = kinds
        self.held: set[str] = set()  # the locks that were announced
        self._last = ""  # the kind of the last point, stopped at or not
        self._stepping = False

    @contextmanager
    def stepped(self) -> Iterator[None]:
        """Step through the block: its end is a stop too, where it waits for the end of the other's."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            self._say("end", "end")
            self._wait()

    @contextmanager
    def passed_over(self) -> Iterator[None]:
        """Stop nowhere in the block but before locks."""
        kinds, self.kinds = self.kinds, ()
        try:
            yield
        finally:
            self.kinds = kinds

    def step(self, kind: str, label: str = "") -> None:
        """Stop, if points of this kind are wanted: all of them, or, as ``kind*``, the first of several in a row."""
        if self._stepping and (kind in self.kinds or (f"{kind}*" in self.kinds and kind != self._last)):
            self._say("step", f"{kind} {label}".rstrip())
            self._wait()
        self._last = kind

    def wants(self, lock: str, label: str, *, inner: bool = False) -> None:
        """Stop before waiting for a lock.

        Args:
            lock: which.
            label: what to call it.
            inner: it is taken within another, so if it is free, having it is no choice.
        """
        if self._stepping:
            self._say("inner" if inner else "wants", label, lock)
            self._wait()
            self.held.add(lock)
        self._last = ""

    def took(self, lock: str) -> None:
        """Say that a lock was had without waiting."""
        if self._stepping:
            self._say("took", "", lock)

    def released(self, lock: str) -> None:
        """Say that a lock was let go of."""
        if self._stepping:
            self._say("released", "", lock)
            self.held.discard(lock)

    def _say(self, what: str, label: str, lock: str = "") -> None:
        self._channel.send(json.dumps([what, label, lock]).encode())

    def _wait(self) -> None:
        if not self._channel.recv(1):
            os._exit(1)  # nobody is there any more


class Outcome(NamedTuple):
    """How an actor ended: with a value that JSON can hold, or with an error."""

    value: Any
    error: str  # the name of its class, or empty
    trace: str


class Zygote:
    """A process that has imported all that is needed, and is forked for each actor."""

    def __init__(self, module: str, root: Path) -> None:
        """Start it.

        Args:
            module: whose ``act(actor, directory, steps)`` does what an actor does, and whose ``warm()`` is called
                once, before the first fork, for what is slow the first time.
            root: where to import it from.
        """
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = "import sys; from tests.support.interleaving import serve; serve(sys.argv[1], int(sys.argv[2]))"
        # Sets have the same order each time, so that an order that was printed can be run again.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, module, str(theirs.fileno())],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()  # which ends it
        self._process.wait()

    def start(self, actor: str, directory: Path, kinds: Collection[str]) -> _Process:
        """Fork an actor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            request = json.dumps([actor, str(directory), sorted(kinds)]).encode()
            socket.send_fds(self._socket, [request], [theirs.fileno()])
        return _Process(ours)


def serve(module: str, descriptor: int) -> None:
    """Fork an actor for each request; the zygote's end."""
    actors = importlib.import_module(module)
    actors.warm()
    gc.freeze()  # a collection in a child would copy all that it shares with this process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    requests = socket.socket(fileno=descriptor)
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, _LIMIT, 1)
        if not request:
            return
        channel = socket.socket(fileno=descriptors[0])
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _act(actors.act, channel, *json.loads(request))
            os._exit(0)
        channel.close()


def _act(
    act: Callable[[str, Path, Steps], object], channel: socket.socket, actor: str, directory: str, kinds: list[str]
) -> None:
    channel.send(str(os.getpid()).encode())
    try:
        outcome = Outcome(act(actor, Path(directory), Steps(channel, kinds)), "", "")
    except Exception as error:
        outcome = Outcome(None, type(error).__name__, traceback.format_exc()[-_LIMIT // 4 :])
    channel.send(json.dumps(["outcome", *outcome]).encode())


class _Process:
    """A running actor, seen from outside."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._pid = 0
        self.wanted = ""  # the lock that it stopped to wait for
        self.inner = False  # whether that is within another
        self.held: set[str] = set()
        self.label = ""  # of the stop
        self.ended = False
        self.outcome: Outcome | None = None

    def begin(self) -> None:
        """Let it come to its first stop."""
        self._channel.settimeout(PATIENCE)
        self._pid = int(self._channel.recv(_LIMIT))
        self._hear()

    def go(self) -> None:
        """Let it run to its next stop, which the end of its block is too."""
        if self.wanted:
            self.held.add(self.wanted)
            self.wanted = ""
        self._channel.send(b"g")
        self._hear()

    def finish(self) -> Outcome:
        """Let it run from the end of its block to its own."""
        while self.outcome is None:
            self.go()
        return self.outcome

    def _hear(self) -> None:
        while True:
            message = self._channel.recv(_LIMIT)
            if not message:
                raise EOFError("it died")
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
        """End it, wherever it is."""
        self._channel.close()
        if self.outcome is None and self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


class Order(NamedTuple):
    """An order that was run to its end."""

    word: str  # who went, step by step
    free: str  # for each step, who could have gone: A, B or * for both
    labels: list[str]  # of each step: what was done first in it
    outcomes: tuple[Outcome, Outcome]

    def __str__(self) -> str:
        """The word, and what it means."""
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
        zygote: to fork them from.
        actors: their names.
        directory: that they share.
        kinds: of the points they stop at.
        choose: is asked who goes, with the word so far, where both can.
        at_stop: is called whenever both have stopped, to look at what a crash would leave.

    Raises:
        Failed: with the order, if an actor dies or comes to no stop, or if ``at_stop`` finds something wrong.
    """
    done, free, labels = "", "", []
    processes: dict[str, _Process] = {}
    try:
        for who, actor in zip("AB", actors, strict=True):
            processes[who] = zygote.start(actor, directory, kinds)
            processes[who].begin()
        while able := _able(processes):
            who = choose(done) if able == "*" else able
            done, free = done + who, free + able
            labels.append(processes[who].label)
            processes[who].go()
            while processes[who].inner and who in _able(processes).replace("*", "AB"):
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


def _able(processes: dict[str, _Process]) -> str:
    """Say who can go: A, B, * for both, or nobody."""
    first, second = processes["A"], processes["B"]
    able = [
        not mine.ended and (not mine.wanted or mine.wanted not in other.held)
        for mine, other in ((first, second), (second, first))
    ]
    return {(True, True): "*", (True, False): "A", (False, True): "B", (False, False): ""}[able[0], able[1]]


def every_order(run_chosen: Callable[[Choose], Order], seed: int | None = None) -> Iterator[Order]:
    """Run all the orders there are, each once and each from the start; whoever wants a sample stops early.

    Args:
        run_chosen: runs one order, in which its argument says who goes.
        seed: take them at random, but the same for the same seed; by default, depth first.
    """
    chance = random.Random(seed)
    closed: set[str] = set()  # the beginnings of which all orders were run
    while "" not in closed:
        often = chance.choice((0.1, 0.3, 0.5))  # some orders change often from one to the other, some rarely

        def choose(begun: str, often: float = often) -> str:
            who = "A"
            if seed is not None and begun:
                who = begun[-1] if chance.random() >= often else _OTHER[begun[-1]]
            elif seed is not None:
                who = chance.choice("AB")
            return who if begun + who not in closed else _OTHER[who]

        order = run_chosen(choose)
        yield order
        closed.add(order.word)
        for at in reversed(range(len(order.word))):
            begun, able = order.word[:at], order.free[at].replace("*", "AB")
            if not all(begun + who in closed for who in able):
                break
            closed.difference_update(begun + who for who in able)
            closed.add(begun)
