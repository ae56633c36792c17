"""Heartbeats: late is not lost, and the controller's own absence is nobody's death."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.controller.detector import AwakeClock, DetectorConfig, Heartbeats, Watch

CONFIG = DetectorConfig()


def beating(intervals: list[float]) -> tuple[Heartbeats, float]:
    beats, now = Heartbeats(CONFIG, 0.0), 0.0
    for interval in intervals:
        now += interval
        beats.beat(now)
    return beats, now


def test_a_regular_node_is_missed_after_the_base_time() -> None:
    beats, now = beating([0.25] * 100)
    assert beats.deadline == pytest.approx(now + CONFIG.base_s)


def test_one_late_heartbeat_makes_the_next_one_harmless() -> None:
    beats, _ = beating([0.25] * 100 + [1.4])
    assert beats.patience_s > 2.0


def test_lateness_is_forgotten_slowly() -> None:
    late, _ = beating([0.25] * 50 + [1.4])
    soon, _ = beating([0.25] * 50 + [1.4] + [0.25] * 8)
    long_after, _ = beating([0.25] * 50 + [1.4] + [0.25] * 400)
    assert late.patience_s > soon.patience_s > CONFIG.base_s
    assert long_after.patience_s == CONFIG.base_s


@given(st.lists(st.floats(0.0, 60.0), max_size=60))
def test_patience_stays_within_its_bounds(intervals: list[float]) -> None:
    beats, _ = beating(intervals)
    assert CONFIG.base_s <= beats.patience_s <= CONFIG.most_s


@pytest.mark.parametrize("jitter", [0.05, 0.2, 0.5])
def test_a_jittery_node_is_not_lost(jitter: float) -> None:
    chance = random.Random(7)
    beats, now = Heartbeats(CONFIG, 0.0), 0.0
    for _ in range(2000):
        now += 0.25 + chance.expovariate(1 / jitter) * 0.5
        assert now <= beats.deadline
        beats.beat(now)


def test_a_stalled_controller_stretches_time() -> None:
    clock = AwakeClock(CONFIG, 100.0)
    assert clock.observe(100.1) == pytest.approx(100.1)
    assert clock.observe(160.1) == pytest.approx(100.1 + CONFIG.stall_s)
    assert clock.observe(160.2) == pytest.approx(100.2 + CONFIG.stall_s)
    assert clock.observe(150.0) == pytest.approx(100.2 + CONFIG.stall_s)


def test_the_watch_names_who_is_overdue_once() -> None:
    watch = Watch(CONFIG)
    for name in ("a", "b", "c"):
        watch.add(name, 0.0)
    watch.beat("a", 1.0)
    watch.remove("c")
    assert watch.judge(1.4) == (["b"], [])
    assert watch.judge(1.6) == ([], [("b", 1.6)])
    assert watch.judge(2.4) == (["a"], [])
    assert watch.judge(60.0) == ([], [("a", 59.0)])
    watch.add("b", 61.0)
    assert watch.silence("b", 61.5) == 0.5
    assert watch.silence("a", 61.5) is None
    assert watch.judge(64.0) == ([], [("b", 3.0)])


def test_a_node_whose_keeper_answers_is_waited_for_longer_in_that_silence_alone() -> None:
    watch = Watch(CONFIG)
    watch.add("a", 0.0)
    watch.excuse("a")  # of nobody's doubt
    assert watch.judge(1.0) == (["a"], [])
    watch.excuse("a")
    assert watch.judge(5.9) == ([], [])
    watch.beat("a", 5.95)
    assert watch.judge(6.1) == ([], [])
    watch.remove("a")
    watch.add("b", 20.0)
    assert watch.judge(21.0) == (["b"], [])
    watch.excuse("b")
    assert watch.judge(26.1) == ([], [("b", pytest.approx(6.1))])


def test_a_node_that_was_excused_is_soon_missed_when_it_falls_silent_again() -> None:
    watch = Watch(CONFIG)
    watch.add("a", 0.0)
    assert watch.judge(1.0).doubtful == ["a"]
    watch.excuse("a")
    now = 1.2
    for _ in range(1000):
        watch.beat("a", now)
        assert watch.judge(now) == ([], [])
        now += 0.25
    assert watch.judge(now - 0.25 + CONFIG.base_s + 0.01).overdue


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["add", "remove", "beat", "excuse"]), st.floats(0, 2))),
)
def test_the_watch_agrees_with_looking_at_everybody(events: list[tuple[str, str, float]]) -> None:
    watch, plain, now = Watch(CONFIG), dict[str, Heartbeats](), 0.0
    for name, what, wait in events:
        now += wait
        if what == "add":
            watch.add(name, now)
            plain[name] = Heartbeats(CONFIG, now)
        elif what == "remove":
            watch.remove(name)
            plain.pop(name, None)
        elif what == "excuse":
            watch.excuse(name)
            if name in plain and plain[name].doubted:
                plain[name].excused = True
        else:
            watch.beat(name, now)
            if name in plain:
                plain[name].beat(now)
        lost = {name for name, beats in plain.items() if beats.deadline <= now}
        plain = {name: beats for name, beats in plain.items() if name not in lost}
        doubtful = {name for name, beats in plain.items() if not beats.doubted and beats.due <= now}
        found = watch.judge(now)
        assert {name for name, _ in found.overdue} == lost
        assert set(found.doubtful) == doubtful
        for name in doubtful:
            plain[name].doubted = True
