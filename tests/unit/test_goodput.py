"""The ledger adds up, whatever is moved afterwards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.telemetry.goodput import LOST, Ledger, RecoveryRecord

ACCOUNTS = ("train", *LOST)


def test_a_run_with_one_fault() -> None:
    ledger = Ledger(10.0)
    ledger.enter("start", 12.0)
    ledger.enter("train", 13.0)
    assert ledger.move("detect", 1.5, 33.0) == 1.5  # found out at 33 that it broke at 31.5
    ledger.enter("stop", 33.0)
    ledger.enter("recompute", 34.0)
    ledger.enter("train", 36.0)
    ledger.move("snapshot_stall", 0.25, 44.0)
    ledger.close(44.0)
    assert ledger.seconds(99.0) == {
        "train": 18.5 + 7.75,
        "detect": 1.5,
        "stop": 1.0,
        "start": 1.0,
        "restore": 0.0,
        "recompute": 2.0,
        "snapshot_stall": 0.25,
        "idle": 2.0,
    }
    assert ledger.goodput(99.0) == pytest.approx(26.25 / 34.0)
    assert ledger.to_json(99.0)["lost_s"]["detect"] == 1.5


def test_no_more_is_moved_than_there_is() -> None:
    ledger = Ledger(0.0, "train")
    assert ledger.move("detect", 10.0, 2.0) == 2.0
    assert ledger.move("detect", -1.0, 2.0) == 0.0
    assert ledger.seconds(2.0)["train"] == 0.0


def test_goodput_is_unknown_before_anything_was() -> None:
    assert Ledger(5.0).goodput(5.0) is None


@given(
    st.lists(
        st.tuples(st.sampled_from(ACCOUNTS), st.booleans(), st.floats(0.0, 100.0), st.floats(-5.0, 200.0)), max_size=40
    )
)
def test_accounts_add_up_to_the_wall_time(changes: list[tuple[str, bool, float, float]]) -> None:
    ledger, now = Ledger(0.0), 0.0
    for account, moving, wait, seconds in changes:
        now += wait
        if moving:
            ledger.move(account, seconds, now)  # type: ignore[arg-type]
        else:
            ledger.enter(account, now)  # type: ignore[arg-type]
    totals = ledger.seconds(now + 1.0)
    assert sum(totals.values()) == pytest.approx(now + 1.0)
    assert min(totals.values()) >= -1e-9


def test_a_record_is_told_without_the_controllers_clock() -> None:
    record = RecoveryRecord("hang", "no progress", 3, fault_at=12345.6, detect_s=10.00049, total_s=11.5)
    told = record.to_json()
    assert "fault_at" not in told
    assert told["detect_s"] == 10.0
    assert told["kind"] == "hang"
    assert told["lost_steps"] is None
