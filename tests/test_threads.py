"""Work in several threads: the order of items and results, progress, failures, and stopping."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from cachedb import threads
from cachedb.progress import Advance, sum_progress
from cachedb.threads import ThreadGroup, at_low_priority, in_threads, report_in_thread
from tests.conftest import run_python
from tests.support.interrupts import interrupts


def test_results_come_in_the_order_of_the_items() -> None:
    second = threading.Event()

    def work(item: int, _: Advance) -> int:
        if item == 0:
            assert second.wait(60)
        elif item == 1:
            second.set()
        return -item

    assert in_threads(work, range(50), sum_progress(0, None), threads=2) == [-item for item in range(50)]
    assert in_threads(work, [], sum_progress(0, None)) == []


def test_an_item_is_taken_only_when_a_thread_is_free() -> None:
    taken: list[int] = []
    done: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            assert len(taken) - len(done) < 3
            taken.append(item)
            yield item

    def work(item: int, _: Advance) -> None:
        done.append(item)

    in_threads(work, items(), sum_progress(0, None), threads=3)
    assert sorted(done) == taken == list(range(20))


def test_the_first_failure_is_raised_and_the_others_stop_when_they_report_progress() -> None:
    begun = threading.Event()
    stopped: list[BaseException] = []

    def work(item: int, advance: Advance) -> None:
        if item:
            assert begun.wait(60)
            raise KeyError(item)
        begun.set()
        end = time.monotonic() + 60  # it should be stopped long before
        try:
            while time.monotonic() < end:
                advance(1)
        except BaseException as error:
            stopped.append(error)
            raise

    with pytest.raises(KeyError):
        in_threads(work, range(10), sum_progress(0, None), threads=2)
    assert "cancelled" in str(stopped[0])


def test_an_error_of_the_iterator_of_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        in_threads(lambda item, _: item, items(), sum_progress(0, None))


@pytest.mark.slow
def test_an_interrupt_is_raised_even_if_its_signal_did_not_end_the_wait() -> None:
    interrupted, caller = threading.Event(), threading.get_ident()
    in_time = list[bool]()

    def interrupt(_number: int, _frame: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def work(_: int, __: Advance) -> None:
        while sys._current_frames()[caller].f_code is not ThreadGroup._await_end.__code__:
            time.sleep(0)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)  # to this thread, so the caller keeps waiting
        in_time.append(interrupted.wait(10))

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_threads(work, [1], sum_progress(0, None))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert in_time == [True]


def test_more_interrupts_leave_no_thread_behind() -> None:
    with interrupts() as sent, pytest.raises(KeyboardInterrupt):
        in_threads(lambda _, __: sent.send(), [1], sum_progress(0, None))
    assert sent.outlived == [False]


def test_a_child_that_a_signal_handler_forks_does_not_wait_for_threads() -> None:
    output = run_python(
        """
        import os, signal, threading, time
        from cachedb.threads import in_threads

        children, caller = [], threading.main_thread().ident

        def fork(*_):
            if not children:
                children.append(os.fork())
                if not children[0]:
                    signal.alarm(60)  # ends the child if it waits
                    raise KeyboardInterrupt

        def work(*_):
            while not children:
                signal.pthread_kill(caller, signal.SIGUSR1)
                time.sleep(0.01)

        signal.signal(signal.SIGUSR1, fork)
        try:
            in_threads(work, [1], lambda _: None)
        except KeyboardInterrupt:
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]))
        """
    )
    assert output == "7\n"


def test_progress_is_the_sum_over_all_threads() -> None:
    reports: list[tuple[int, int]] = []
    report = sum_progress(10, lambda *now: reports.append(now))
    in_threads(lambda item, advance: advance(item), [1, 2, 3, 4], report, threads=2)
    assert reports[-1] == (10, 10)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)


def test_progress_beside_a_block_is_reported_in_order_without_delaying_the_block() -> None:
    begun, go_on = threading.Event(), threading.Event()
    reports: list[int] = []

    def progress(number: int) -> None:
        begun.set()
        assert go_on.wait(60)
        reports.append(number)

    with report_in_thread(progress) as tell:
        assert tell
        for number in range(1000):
            tell(number)
            begun.wait(60)
        go_on.set()
    assert reports == sorted(reports)
    assert 1 < len(reports) < 100
    with report_in_thread(None) as tell:
        assert tell is None


@pytest.mark.parametrize("at", ["the next call", "the end"])
def test_an_error_of_progress_beside_a_block_ends_the_block(at: str) -> None:
    raised = threading.Event()

    def progress() -> None:
        raised.set()
        raise KeyError

    reached = False
    with pytest.raises(KeyError), report_in_thread(progress) as tell:  # noqa: PT012
        assert tell
        tell()
        assert raised.wait(60)
        while at == "the next call":
            tell()
        reached = True
    assert reached is (at == "the end")


# Priority


def test_work_at_low_priority_leaves_the_priority_of_its_caller() -> None:
    def read_priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = read_priority()
    assert at_low_priority(read_priority) == min(before + 10, 19)
    assert read_priority() == before
    with pytest.raises(KeyError):
        at_low_priority(dict[str, int]().popitem)


def test_work_at_low_priority_is_done_by_its_caller_if_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "start", lambda _: False)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert at_low_priority(threading.get_native_id) == threading.get_native_id()
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
