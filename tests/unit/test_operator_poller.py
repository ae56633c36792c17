"""Asking controllers, over real HTTP on loopback addresses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from outlast.clock import SystemClock
from outlast_operator.model import Call, Key
from outlast_operator.poller import CallFailed, Poller, PollSettings, Target, matters, read_answer
from support.apiserver import eventually
from support.controllers import Controllers, address, serving

KEY = Key("default", "bytelm")


class Queue:
    """Counts what the poller asks for."""

    def __init__(self) -> None:
        self.changed: list[Key] = []
        self.progressed: list[Key] = []


@pytest.fixture
def controllers() -> Iterator[Controllers]:
    with serving() as served:
        yield served


@pytest.fixture
def queue() -> Queue:
    return Queue()


def start(controllers: Controllers, queue: Queue, **settings: Any) -> Poller:
    given = PollSettings(port=controllers.port, **{"wait_s": 5.0, "call_s": 1.0, "connect_s": 1.0, **settings})
    poller = Poller(given, queue.changed.append, queue.progressed.append, SystemClock(), Random(1), lambda _: None)
    poller.start()
    return poller


@pytest.fixture
def poller(controllers: Controllers, queue: Queue) -> Iterator[Poller]:
    started = start(controllers, queue)
    yield started
    started.stop()


def target(number: int, token: str = "t", pod: str = "head") -> Target:
    return Target(pod, f"uid-{pod}", address(number), token)


def heard(poller: Poller, key: Key, **fields: Any) -> None:
    def says() -> bool:
        status = poller.heard(key).status
        return status is not None and all(status.get(name) == value for name, value in fields.items())

    eventually(f"{key} says {fields}", says)


def test_what_matters_brings_a_pass_and_progress_one_in_time(
    controllers: Controllers, poller: Poller, queue: Queue
) -> None:
    controllers.add(address(1), "t", step=1)
    poller.aim(KEY, target(1))
    heard(poller, KEY, step=1)
    assert len(queue.changed) == 1
    controllers.tell(address(1), step=2)
    heard(poller, KEY, step=2)
    assert (len(queue.changed), len(queue.progressed)) == (1, 1)
    controllers.tell(address(1), phase="Recovering")
    heard(poller, KEY, phase="Recovering")
    assert len(queue.changed) == 2
    assert poller.heard(KEY).heard_at is not None


def test_a_long_poll_waits_at_the_controller(controllers: Controllers, poller: Poller) -> None:
    controllers.add(address(1), "t")
    poller.aim(KEY, target(1))
    heard(poller, KEY, step=0)
    threading.Event().wait(1.5)
    assert controllers[address(1)].asked <= 2


def test_many_events_do_not_make_many_questions(controllers: Controllers, poller: Poller) -> None:
    controllers.add(address(1), "t")
    poller.aim(KEY, target(1))
    heard(poller, KEY, step=0)
    for step in range(1, 41):
        controllers.tell(address(1), step=step)
        threading.Event().wait(0.1)
    assert controllers[address(1)].asked <= 6


def test_a_controller_that_fails_is_told_of_once_and_again_when_it_answers(
    controllers: Controllers, poller: Poller, queue: Queue
) -> None:
    controllers.add(address(1), "t")
    controllers.refuse(address(1), 2)
    poller.aim(KEY, target(1))
    eventually("the failure is known", lambda: poller.heard(KEY).failing_since is not None)
    assert "503" in poller.heard(KEY).trouble
    heard(poller, KEY, step=0)
    assert poller.heard(KEY).failing_since is None
    assert len(queue.changed) == 2


def test_another_token_is_a_failure_with_its_reason(controllers: Controllers, poller: Poller) -> None:
    controllers.add(address(1), "another")
    poller.aim(KEY, target(1))
    eventually("the failure is known", lambda: "401" in poller.heard(KEY).trouble)
    assert poller.heard(KEY).status is None


def test_what_an_earlier_head_said_is_forgotten(controllers: Controllers, poller: Poller) -> None:
    controllers.add(address(1), "t", step=7)
    poller.aim(KEY, target(1))
    heard(poller, KEY, step=7)
    poller.aim(KEY, target(2, pod="other"))
    assert (poller.heard(KEY).pod, poller.heard(KEY).status) == ("other", None)
    controllers.add(address(2), "t", step=8)
    heard(poller, KEY, step=8)
    asked = controllers[address(1)].asked
    controllers.tell(address(1), step=9)
    threading.Event().wait(0.5)
    assert controllers[address(1)].asked == asked
    poller.aim(KEY, None)
    assert poller.heard(KEY).pod == ""


@pytest.mark.parametrize("nonsense", [{"nodes": [1]}, {"nodes": {"n": 7}}, {"seq": "many"}, {"checkpoint": 3}])
def test_an_answer_that_is_not_understood_is_a_failure_and_is_asked_for_again(
    controllers: Controllers, poller: Poller, nonsense: dict[str, Any]
) -> None:
    controllers.add(address(1), "t", **nonsense)
    poller.aim(KEY, target(1))
    eventually("it is a failure, or of no meaning", lambda: poller.heard(KEY).trouble or poller.heard(KEY).status)
    controllers.tell(address(1), nodes={}, checkpoint=None, step=5)
    heard(poller, KEY, step=5)


def test_calls_reach_the_head_in_force(controllers: Controllers, poller: Poller) -> None:
    controllers.add(address(1), "t")
    with pytest.raises(CallFailed, match="no head Pod"):
        poller.call(KEY, Call("POST", "/stop"))
    poller.aim(KEY, target(1))
    poller.call(KEY, Call("POST", "/resize", {"replicas": 3}))
    poller.call(KEY, Call("DELETE", "/nodes/n-1"))
    assert controllers[address(1)].calls == [("POST", "/resize", {"replicas": 3}), ("DELETE", "/nodes/n-1", None)]


def test_a_call_that_is_refused_or_not_answered_says_so(controllers: Controllers, poller: Poller) -> None:
    controllers.add(address(1), "t")
    poller.aim(KEY, target(1))
    heard(poller, KEY, step=0)
    controllers.refuse(address(1), 1)
    with pytest.raises(CallFailed, match="503"):
        poller.call(KEY, Call("PUT", "/domains", {"m": "z"}))
    poller.aim(KEY, Target("elsewhere", "u", address(2), "t"))
    with pytest.raises(CallFailed, match=r"elsewhere: .*404"):
        poller.call(KEY, Call("PUT", "/domains", {"m": "z"}))


def test_more_jobs_than_connections_are_all_heard_and_called(controllers: Controllers, queue: Queue) -> None:
    poller = start(controllers, queue, connections=5)
    try:
        for number in range(1, 31):
            controllers.add(address(number), "t", step=number)
            poller.aim(Key("default", f"j{number}"), target(number))
        for number in range(1, 31):
            heard(poller, Key("default", f"j{number}"), step=number)
        poller.call(Key("default", "j30"), Call("POST", "/stop"))
    finally:
        poller.stop()


def test_steps_are_progress_and_states_are_not() -> None:
    status = {"phase": "Running", "step": 1, "nodes": {"n": {"state": "active", "heartbeat_age_s": 1.0}}}
    later = {"phase": "Running", "step": 9, "nodes": {"n": {"state": "active", "heartbeat_age_s": 0.2}}}
    lost = {"phase": "Running", "step": 9, "nodes": {"n": {"state": "lost", "heartbeat_age_s": 9.0}}}
    assert matters(status) == matters(later) != matters(lost)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999", "9" * 19, "9" * 5000])
def test_numbers_that_no_status_can_say_are_absent(text: str) -> None:
    """A script may report a loss that is NaN: all else that its controller says holds."""
    told = read_answer(f'{{"metrics": {{"loss": {text}}}, "step": 12, "step_s": 0.5}}'.encode())
    assert told == {"metrics": {"loss": None}, "step": 12, "step_s": 0.5}


def test_an_answer_that_is_nested_too_deeply_is_none() -> None:
    with pytest.raises(ValueError, match="nested"):
        read_answer(b"[" * 100_000 + b"]" * 100_000)
