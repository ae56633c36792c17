"""At which step the next permit is, by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from outlast import messages as m
from outlast.controller.pace import ECHO_S, MOST_MARGIN_FACTOR, Next, Pace
from outlast.controller.progress import Progress
from outlast.controller.settings import CheckpointConfig, MachineConfig

PLAIN = MachineConfig(2, every_steps=10)
FINAL = MachineConfig(2, every_steps=10, checkpoint=CheckpointConfig("s3://b/p"))
STEP_S = 1.0


def at(step: int, total: int | None = 100, now: float = 0.0) -> Progress:
    progress = Progress(now)
    progress.heartbeat(m.Heartbeat("n", None, {0: step, 1: step}, {0: STEP_S}, total=total), now)
    return progress


def planned(config: MachineConfig = PLAIN) -> Pace:
    pace = Pace(config, lambda _: 7.0)
    first = pace.next(at(1), 0.0)
    assert first is not None
    assert first.replan
    assert not first.hold
    pace.planned = True
    return pace


def step_of(permit: Next | None) -> int | None:
    return None if permit is None else permit.step


def test_permits_are_near_and_multiples() -> None:
    pace = planned()
    assert pace.next(at(5), 0.0) is None
    permit = pace.next(at(7), 0.0)
    assert permit is not None
    assert (permit.step, permit.replan, permit.hold) == (10, False, False)
    assert permit.deadline > 120.0
    assert step_of(pace.next(at(17), 0.0)) == 20


def test_automatic_ones_follow_the_interval() -> None:
    pace = Pace(MachineConfig(2), lambda _: 7.0)
    pace.planned = True
    assert step_of(pace.next(at(3), 0.0)) == 5
    pace.copied(5)
    assert pace.next(at(7), 0.0) is None
    assert step_of(pace.next(at(9), 0.0)) == 12


def test_without_an_object_tier_the_last_step_needs_none() -> None:
    assert planned().next(at(97), 0.0) is None


def test_with_one_ranks_are_held_at_the_last_boundary() -> None:
    pace = planned(FINAL)
    permit = pace.next(at(97), 0.0)
    assert permit is not None
    assert (permit.step, permit.hold) == (100, True)


def test_a_lacking_plan_is_made_at_the_last_boundary_too() -> None:
    pace = Pace(FINAL, lambda _: 7.0)
    permit = pace.next(at(100), 0.0)
    assert permit is not None
    assert (permit.step, permit.replan, permit.hold) == (100, True, False)
    pace.planned = True
    permit = pace.next(at(100), 0.0)
    assert permit is not None
    assert (permit.step, permit.replan, permit.hold) == (100, False, True)


def test_the_same_step_is_permitted_again_once_all_have_answered() -> None:
    pace = planned(FINAL)
    pace.next(at(100), 0.0)
    pace.called_off(100, {0, 1}, 0.0)
    assert pace.next(at(100), 1.0) is None
    pace.answered(100, 0)
    pace.answered(90, 1)
    assert pace.next(at(100), 1.0) is None
    pace.answered(100, 1)
    assert step_of(pace.next(at(100), 1.0)) == 100


def taken(every: Callable[[int], bool], boundaries: int, **config: Any) -> list[int]:
    """Steps of snapshots of a script whose gradients wait before all steps but those of ``every``, as ranks answer."""
    pace, permit, found, sound = planned(replace(MachineConfig(2), **config)), None, [], []
    for done in range(1, boundaries):
        sound = [*sound[-1:], done] if every(done) else sound
        if permit is not None and done == permit.step:
            rhythm = (sound[1], sound[1] - sound[0]) if len(sound) == 2 else None
            if every(done):
                pace.copied(done, rhythm)
                found.append(done)
            else:
                pace.missed("accumulating: no optimizer step since the last boundary", 0.0, rhythm)
                pace.called_off(done, set(), 0.0)
            permit = None
        permit = permit or pace.next(at(done, 10**6), 0.0)
    return found


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32])
def test_boundaries_at_which_no_gradients_wait_are_found(every: int) -> None:
    for phase in {0, 1 % every, every // 2, every - 1}:
        steps = taken(lambda done, phase=phase: done % every == phase, 40 * every + 100)
        gaps = [later - before for before, later in pairwise([0, *steps, 40 * every + 100])]
        assert max(gaps[:3]) <= 3 * every + 20, (every, phase, steps)
        assert max(gaps[3:]) <= every + 12, (every, phase, steps)


@pytest.mark.parametrize("lengths", [(3, 5), (2, 2, 7), (4, 4, 4, 1), (1, 6)])
def test_they_are_found_without_a_steady_rhythm(lengths: tuple[int, ...]) -> None:
    ends = set(itertools.accumulate(itertools.islice(itertools.cycle(lengths), 2000)))
    steps = taken(ends.__contains__, 2000)
    assert max(later - before for before, later in pairwise([0, *steps, 2000])) <= 200, lengths


@pytest.mark.parametrize("every", [7, 10, 25, 100])
@pytest.mark.parametrize("sums", [1, 2, 3, 5, 8, 10, 16, 64])
def test_every_so_many_steps_means_the_next_at_which_no_gradients_wait(every: int, sums: int) -> None:
    for phase in {0, 1 % sums, sums // 2, sums - 1}:
        steps = taken(lambda done, phase=phase: done % sums == phase, 20 * (every + sums), every_steps=every)
        gaps = [later - before for before, later in pairwise(steps)]
        assert max(gaps[2:]) < every + 2 * sums, (phase, steps)
        assert sum(gaps[2:]) / len(gaps[2:]) <= max(every, sums) + sums / 2, (phase, steps)


@pytest.mark.parametrize("every", [None, 10])
@pytest.mark.parametrize(("before", "sums"), [(40, 8), (80, 8), (500, 4), (11, 1)])
def test_a_long_gap_at_the_beginning_is_not_taken_for_the_rhythm(every: int | None, before: int, sums: int) -> None:
    """A GradScaler skips an optimizer's first steps; something else is done before the training."""
    steps = taken(lambda done: done > before and done % sums == 0, 3000, every_steps=every)
    later = [step for step in steps if step > 3 * before + 50]
    assert max(b - a for a, b in pairwise(later)) <= 12 + 2 * sums, steps


def test_who_never_answers_is_not_waited_for_for_ever() -> None:
    pace = planned(FINAL)
    pace.next(at(100), 0.0)
    pace.called_off(100, {1}, 0.0)
    assert pace.next(at(100), ECHO_S - 0.1) is None
    assert step_of(pace.next(at(100), ECHO_S)) == 100


def test_a_wanted_hold_is_taken_at_the_next_possible_step() -> None:
    pace = planned()
    pace.hold = True
    permit = pace.next(at(11), 0.0)
    assert permit is not None
    assert (permit.step, permit.hold) == (13, True)


def test_permits_that_come_too_late_are_given_earlier() -> None:
    pace = planned()
    for _ in range(8):
        pace.missed("late", 0.0)
    pace.hurry = True
    permit = pace.next(at(20), 0.0)
    assert step_of(permit) == 20 + 2 * MOST_MARGIN_FACTOR


def test_errors_are_followed_by_growing_pauses() -> None:
    pace = planned()
    pace.missed("OSError: no space", 0.0)
    assert not pace.planned
    assert pace.next(at(17), 0.9) is None
    assert pace.next(at(17), 1.0) is not None
    pace.missed("OSError: no space", 10.0)
    assert pace.next(at(27), 11.9) is None


def test_a_new_controller_gives_permits_of_the_old_one_time() -> None:
    pace = Pace(PLAIN, lambda _: 7.0, adopted=True)
    assert pace.next(at(0), 0.0) is None
    assert pace.next(at(30), 0.0) is None
    assert pace.next(at(45), 0.0) is not None
