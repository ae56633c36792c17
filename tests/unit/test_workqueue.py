"""The order in which jobs are looked at."""

from __future__ import annotations

import threading
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.clock import ManualClock, SystemClock
from outlast_operator.workqueue import (
    FIRST_BACKOFF_S,
    LONGEST_BACKOFF_S,
    REFUSED_HOLD_S,
    Backlog,
    Ended,
    WorkQueue,
    backoff_s,
)


@pytest.fixture
def backlog() -> Backlog[str]:
    return Backlog(Random(1))


def test_a_key_waits_once_however_often_it_is_added(backlog: Backlog[str]) -> None:
    for key in ("a", "b", "a", "a"):
        backlog.add(key, 0.0)
    assert backlog.depth() == 2
    assert [backlog.take(0.0), backlog.take(0.0), backlog.take(0.0)] == ["a", "b", None]


def test_a_key_that_is_being_handled_is_handled_once_more_afterwards(backlog: Backlog[str]) -> None:
    backlog.add("a", 0.0)
    assert backlog.take(0.0) == "a"
    backlog.add("a", 1.0)
    backlog.add("a", 1.0)
    assert backlog.take(1.0) is None
    backlog.done("a", 2.0, Ended.WELL)
    assert backlog.take(2.0) == "a"
    backlog.done("a", 3.0, Ended.WELL)
    assert backlog.take(9.0) is None


def test_the_earliest_of_several_times_counts(backlog: Backlog[str]) -> None:
    backlog.add_in("a", 30.0, 0.0)
    backlog.add_in("a", 5.0, 0.0)
    backlog.add_in("a", 60.0, 0.0)
    assert backlog.next_due() == 5.0
    assert backlog.take(4.9) is None
    assert backlog.take(5.0) == "a"
    backlog.done("a", 5.0, Ended.WELL)
    assert backlog.next_due() is None


def test_handling_a_key_early_makes_its_time_void(backlog: Backlog[str]) -> None:
    backlog.add_in("a", 30.0, 0.0)
    backlog.add("a", 1.0)
    assert backlog.take(1.0) == "a"
    backlog.done("a", 1.0, Ended.WELL)
    assert backlog.take(31.0) is None


def again_and_again(backlog: Backlog[str], ended: Ended) -> tuple[float, list[float]]:
    """Have "a" end so 14 times, each as soon as it is due; when it is due next, and how long it waited each time."""
    now, waits = 0.0, []
    backlog.add("a", now)
    for _ in range(14):
        assert backlog.take(now) == "a"
        backlog.done("a", now, ended)
        due = backlog.next_due()
        assert due is not None
        waits.append(due - now)
        now = due
    return now, waits


def test_failures_double_the_wait_and_success_forgets_them(backlog: Backlog[str]) -> None:
    now, waits = again_and_again(backlog, Ended.FAILED)
    for failures, wait in enumerate(waits, 1):
        most = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (failures - 1))
        assert most / 2 <= wait <= most
    assert waits[-1] >= LONGEST_BACKOFF_S / 2
    assert backlog.take(now) == "a"
    backlog.done("a", now, Ended.WELL)
    assert backlog.failures("a") == 0


def test_events_do_not_cut_a_back_off_short_but_another_spec_does(backlog: Backlog[str]) -> None:
    backlog.add("a", 0.0)
    backlog.take(0.0)
    backlog.done("a", 0.0, Ended.FAILED, at_least_s=20.0)
    backlog.add("a", 1.0)
    assert backlog.take(1.0) is None
    backlog.add_in("a", 2.0, 1.0)
    assert backlog.take(4.0) is None
    backlog.renew("a", 5.0)
    assert backlog.take(5.0) == "a"


def test_what_is_refused_is_tried_again_as_late_but_does_not_keep_events_waiting(backlog: Backlog[str]) -> None:
    now, _ = again_and_again(backlog, Ended.REFUSED)
    assert backlog.take(now) == "a"
    backlog.done("a", now, Ended.REFUSED)
    assert backlog.next_due() - now >= LONGEST_BACKOFF_S / 2  # type: ignore[operator]
    backlog.add("a", now + 0.1)
    assert backlog.take(now + 0.1) is None
    assert backlog.take(now + REFUSED_HOLD_S) == "a"


def test_the_oldest_wait_is_known(backlog: Backlog[str]) -> None:
    assert backlog.oldest(9.0) == 0.0
    backlog.add("a", 1.0)
    backlog.add("b", 5.0)
    assert backlog.oldest(9.0) == 8.0


@given(st.integers(1, 80))
def test_back_off_is_bounded(failures: int) -> None:
    assert FIRST_BACKOFF_S / 2 <= backoff_s(failures, Random(failures)) <= LONGEST_BACKOFF_S


_ENDS = {"done": Ended.WELL, "fail": Ended.FAILED, "refuse": Ended.REFUSED}


class _Model:
    """What a backlog owes: every key that was touched since it was last taken must come again."""

    def __init__(self) -> None:
        self.owed: set[int] = set()
        self.busy: set[int] = set()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add_in", "renew", "take", "done", "fail", "refuse", "wait"]), st.integers(0, 3)
        )
    )
)
def test_nothing_is_lost_and_nothing_is_handled_twice_at_once(steps: list[tuple[str, int]]) -> None:
    backlog: Backlog[int] = Backlog(Random(0))
    model, now = _Model(), 0.0
    for what, key in steps:
        if what == "take":
            taken = backlog.take(now)
            if taken is not None:
                assert taken not in model.busy
                model.busy.add(taken)
                model.owed.discard(taken)
        elif what in _ENDS:
            if key in model.busy:
                model.busy.discard(key)
                backlog.done(key, now, _ENDS[what])
                if what != "done":
                    model.owed.add(key)
        elif what == "wait":
            now += key
        else:
            {"add": backlog.add, "renew": backlog.renew, "add_in": lambda k, n: backlog.add_in(k, 3.0, n)}[what](
                key, now
            )
            model.owed.add(key)
    for key in model.busy:
        backlog.done(key, now, Ended.WELL)
    now += 2 * LONGEST_BACKOFF_S
    seen = set()
    while (taken := backlog.take(now)) is not None:
        seen.add(taken)
        backlog.done(taken, now, Ended.WELL)
    assert model.owed <= seen


def test_threads_share_a_queue_without_handling_a_key_twice_at_once() -> None:
    queue: WorkQueue[int] = WorkQueue(SystemClock(), Random(1))
    handled, busy, lock, clashes = [0] * 5, set[int](), threading.Lock(), list[int]()
    enough = threading.Event()

    def work() -> None:
        while (key := queue.take()) is not None:
            with lock:
                if key in busy:
                    clashes.append(key)
                busy.add(key)
            with lock:
                busy.discard(key)
                handled[key] += 1
                if min(handled) >= 50:
                    enough.set()
            queue.done(key)
            queue.add(key)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for key in range(5):
        queue.add(key)
    assert enough.wait(20)
    queue.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert not clashes


def test_a_thread_wakes_for_a_key_that_becomes_due() -> None:
    queue: WorkQueue[str] = WorkQueue(SystemClock(), Random(1))
    taken: list[str | None] = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    queue.add_in("a", 0.1)
    thread.join(5)
    assert taken == ["a"]


def test_a_thread_waits_for_a_key_that_is_due_in_a_thousand_years() -> None:
    queue: WorkQueue[str] = WorkQueue(SystemClock(), Random(1))
    queue.add_in("later", 3e10)
    taken: list[str | None] = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    queue.add("now")
    thread.join(5)
    assert taken == ["now"]


def test_a_closed_queue_lets_threads_go() -> None:
    queue: WorkQueue[str] = WorkQueue(ManualClock(), Random(1))
    queue.add("a")
    queue.close()
    assert queue.take() is None


def test_times_far_away_that_nearer_ones_replace_are_not_kept(backlog: Backlog[str]) -> None:
    """A job with a deadline of weeks, which is looked at every few seconds."""
    for at in range(5000):
        backlog.add_in("a", 1e6, float(at))
        backlog.add_in("a", 0.5, float(at))
        assert backlog.take(at + 0.5) == "a"
        backlog.done("a", at + 0.5, Ended.WELL)
    assert len(backlog._due) < 100
    backlog.add_in("a", 10.0, 5000.0)
    assert backlog.next_due() == 5010.0
