"""Policies as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.controller import policy
from outlast.controller.policy import Candidate, RestartBudget, choose_seats
from outlast.snapshot.identity import Generation

OLD, NEW = Generation(1, 10, "a" * 16), Generation(1, 20, "a" * 16)


def test_the_budget_is_spent_within_its_window() -> None:
    budget = RestartBudget(max_restarts=2, window_s=100.0)
    assert budget.restart(0.0, True, None).reason is None
    assert budget.restart(10.0, True, None).reason is None
    refused = budget.restart(20.0, True, None)
    assert refused.reason is not None
    assert "2 restarts within 100 s" in refused.reason
    assert budget.restart(101.0, True, None).reason is None


def test_no_restart_is_allowed_when_none_is() -> None:
    assert RestartBudget(0, 100.0).restart(0.0, True, None).reason is not None


def test_backoff_grows_only_without_progress() -> None:
    budget = RestartBudget(100, 1e9)
    delays = [budget.restart(float(i), False, None).delay_s for i in range(9)]
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert budget.restart(100.0, True, None).delay_s == 0.0
    assert [budget.restart(100.0, False, None).delay_s for _ in range(2)] == [0.0, 1.0]


def test_the_same_error_at_the_same_step_is_the_scripts_own() -> None:
    budget = RestartBudget(100, 1e9)
    mine = (7, policy.signature("ValueError", "bad shape"))
    assert budget.restart(0.0, True, mine).reason is None
    assert budget.restart(1.0, True, (8, mine[1])).reason is None
    assert budget.restart(2.0, True, mine).reason is None
    verdict = budget.restart(3.0, True, mine)
    assert verdict.reason is not None
    assert "the script fails by itself: ValueError: bad shape" in verdict.reason


def test_signatures_ignore_what_differs_between_runs() -> None:
    one = policy.signature("RuntimeError", "cannot bind 10.0.0.1:4711 at 0x7f00aa\nmore")
    other = policy.signature("RuntimeError", "cannot bind 10.0.0.9:4712 at 0x7f11bb\nelse")
    assert one == other
    assert policy.signature("RuntimeError", "") == "RuntimeError: "


@pytest.mark.parametrize(
    ("kind", "message", "collateral"),
    [
        ("RuntimeError", "[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5", True),
        ("DistBackendError", "NCCL error: remote process exited or there was a network error", True),
        ("ConnectionResetError", "[Errno 104] Connection reset by peer", True),
        ("BrokenPipeError", "[Errno 32] Broken pipe", True),
        ("ValueError", "loss is nan", False),
        ("RuntimeError", "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", False),
    ],
)
def test_collateral_errors(kind: str, message: str, collateral: bool) -> None:
    assert policy.is_collateral(kind, message) is collateral


def nodes(*names: str, **domains: str) -> list[Candidate]:
    return [Candidate(name, domains.get(name.replace("-", "_"), name)) for name in names]


def test_a_fresh_job_is_seated_in_the_order_of_names() -> None:
    found = choose_seats({}, nodes("node-10", "node-2", "node-0", "node-1"), 3)
    assert found == {0: "node-0", 1: "node-1", 2: "node-2"}


def test_who_has_a_seat_keeps_it_and_a_spare_fills_the_gap() -> None:
    previous = {0: "node-0", 1: "node-1", 2: "node-2"}
    assert choose_seats(previous, nodes("node-0", "node-2", "node-4", "node-3"), 3) == {
        0: "node-0",
        1: "node-3",
        2: "node-2",
    }


def test_an_empty_seat_goes_to_who_holds_its_newest_images() -> None:
    candidates = [Candidate("node-0", "a"), Candidate("node-3", "b", {1: OLD}), Candidate("node-4", "c", {1: NEW})]
    assert choose_seats({0: "node-0", 1: "node-1"}, candidates, 2) == {0: "node-0", 1: "node-4"}


def test_a_new_controller_finds_the_seats_in_the_images() -> None:
    candidates = [Candidate("node-0", "a"), Candidate("node-1", "b", {0: NEW}), Candidate("node-2", "c", {1: NEW})]
    assert choose_seats({}, candidates, 2) == {0: "node-1", 1: "node-2"}


def test_a_gap_goes_to_the_domain_with_the_fewest_seats() -> None:
    candidates = [
        Candidate("node-0", "a"),
        Candidate("node-1", "b"),
        Candidate("node-3", "a"),
        Candidate("node-4", "c"),
    ]
    assert choose_seats({0: "node-0", 1: "node-1"}, candidates, 3)[2] == "node-4"


@given(st.dictionaries(st.integers(0, 9), st.integers(0, 14)), st.sets(st.integers(0, 14)), st.integers(1, 10))
def test_seating_never_seats_twice_and_keeps_who_can_stay(previous: dict[int, int], here: set[int], n: int) -> None:
    before = {
        seat: f"node-{i}"
        for seat, i in previous.items()
        if i not in list(previous.values())[: list(previous).index(seat)]
    }
    found = choose_seats(before, nodes(*(f"node-{i}" for i in here)), n)
    assert len(found) == min(n, len(here))
    assert len(set(found.values())) == len(found)
    assert all(found[seat] == node for seat, node in before.items() if seat < n and int(node[5:]) in here)


@pytest.mark.parametrize(
    ("count", "gone"),
    [
        (0, []),
        (1, ["node-9"]),
        (3, ["node-9", "node-10", "node-3"]),
        (9, ["node-9", "node-10", "node-3", "node-0", "node-5"]),
    ],
)
def test_those_without_a_seat_leave_first_then_the_highest_seats(count: int, gone: list[str]) -> None:
    assert policy.leavers({0: "node-5", 1: "node-0", 2: "node-3"}, ["node-10", "node-9"], count) == gone


@pytest.mark.parametrize(
    ("every", "first", "last", "interval_s", "step_s", "hurry", "step"),
    [
        (10, 13, None, 0.0, None, False, 20),
        (10, 20, 10, 0.0, 1.0, False, 20),
        (10, 13, 10, 0.0, 1.0, True, 13),
        (None, 3, None, 5.0, None, False, 3),
        (None, 12, 10, 5.0, 1.0, False, 15),
        (None, 12, 10, 5.0, 1.0, True, 12),
        (None, 12, 10, 0.0, 1.0, False, 12),
        (None, 12, 10, 4.9, 0.1, False, 59),
        (None, 12, 10, 5.0, None, False, 12),
    ],
)
def test_the_next_snapshot(
    every: int | None, first: int, last: int | None, interval_s: float, step_s: float | None, hurry: bool, step: int
) -> None:
    assert policy.next_snapshot(every, first, last, interval_s, step_s, hurry) == step


@pytest.mark.parametrize(
    ("step_s", "factor", "margin"), [(None, 1, 2), (10.0, 1, 2), (0.1, 1, 5), (0.1, 4, 20), (1e-6, 1, 201)]
)
def test_margins(step_s: float | None, factor: int, margin: int) -> None:
    assert policy.margin_steps(step_s, factor) == margin


@pytest.mark.parametrize(
    ("configured", "step_s", "longest_s", "timeout"),
    [
        (7.0, 100.0, 100.0, 7.0),
        (None, None, 0.0, 10.0),
        (None, 2.0, 3.0, 40.0),
        (None, 1.0, 30.0, 150.0),
        (None, 1e3, 0.0, 1800.0),
    ],
)
def test_hang_timeouts(configured: float | None, step_s: float | None, longest_s: float, timeout: float) -> None:
    assert policy.hang_timeout(configured, step_s, longest_s) == timeout


def test_stragglers_stand_out_from_the_crowd() -> None:
    even = {rank: 1.0 + 0.01 * rank for rank in range(8)}
    assert policy.stragglers(even) == {}
    assert list(policy.stragglers({**even, 3: 2.0})) == [3]
    assert policy.stragglers({0: 1.0, 1: 5.0}) == {}
    assert policy.stragglers({0: 0.0, 1: 0.0, 2: 0.0}) == {}


def test_noise_hides_nobody_but_a_real_straggler() -> None:
    noisy = {0: 0.8, 1: 1.2, 2: 1.0, 3: 0.7, 4: 1.3, 5: 1.9}
    assert policy.stragglers(noisy) == {}
    assert list(policy.stragglers({**noisy, 5: 9.0})) == [5]
