"""What is said of a rank that the kernel killed for want of memory."""

from __future__ import annotations

import pathlib
import signal
from types import SimpleNamespace
from typing import cast

import pytest

from outlast.agent.oom import MemoryKills
from outlast.agent.rank_news import RankNews
from outlast.agent.ranks import Rank, Ranks
from outlast.agent.reactor import Reactor
from outlast.clock import ManualClock
from outlast.controller.faults import rank_symptom
from outlast.messages.events import RankExited
from outlast.snapshot.identity import Attempt

V2, V1 = ("memory.events", "memory.max"), ("memory/memory.oom_control", "memory/memory.limit_in_bytes")


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
@pytest.mark.parametrize(("limit", "told"), [("2147483648", "limit of 2Gi"), ("max", "limit,"), ("9223372036854771712", "limit,")])  # fmt: skip
def test_a_kill_of_the_kernels_is_told_at_its_time(
    tmp_path: pathlib.Path, files: tuple[str, str], limit: str, told: str
) -> None:
    counts, limits = (tmp_path / name for name in files)
    counts.parent.mkdir(exist_ok=True)
    counts.write_text("low 0\noom 3\noom_kill 1\n")
    limits.write_text(limit + "\n")
    kills = MemoryKills(tmp_path)
    assert kills.why(0.0) == "", "what was before is not this process"
    counts.write_text("low 0\noom 3\noom_kill 2\n")
    assert "out of memory" in (why := kills.why(10.0))
    assert told in why
    assert kills.why(10.5) == why, "one that was killed with it"
    assert kills.why(16.0) == ""


def test_a_kill_that_was_noticed_before_explains_no_later_death(tmp_path: pathlib.Path) -> None:
    """Of a worker of a DataLoader: its rank ends by itself, and another is killed by hand hours later."""
    counts = tmp_path / V2[0]
    counts.write_text("oom_kill 0\n")
    kills = MemoryKills(tmp_path)
    counts.write_text("oom_kill 1\n")
    assert kills.why(10.0), "a rank ended by itself: it is asked all the same"
    assert kills.why(3600.0) == ""
    counts.write_text("oom_kill 2\n")
    kills.begin()
    assert kills.why(3600.5) == ""


def test_where_nothing_counts_nothing_is_said(tmp_path: pathlib.Path) -> None:
    assert MemoryKills(tmp_path).why(0.0) == ""


def test_it_is_the_cause_also_of_a_rank_that_was_to_be_stopped() -> None:
    exited = RankExited("n", Attempt(1, "a"), 0, signal=9, why="out of memory: raise its limit")
    symptom = rank_symptom(exited, 40, 0.0, being_stopped=True)
    assert symptom.text == "rank 0 on n was ended by SIGKILL, out of memory: raise its limit"
    assert not symptom.collateral


def test_a_kill_is_told_of_its_rank_though_another_says_hello_meanwhile(tmp_path: pathlib.Path) -> None:
    """The kernel counts the kill before the process is gone."""
    counts = tmp_path / V2[0]
    counts.write_text("oom_kill 1\n")
    kills = MemoryKills(tmp_path)
    news = RankNews("n", cast(Reactor, SimpleNamespace(after=lambda *_: None)), lambda _: None, ManualClock(), kills)
    kills.begin()
    killed = SimpleNamespace(exit=None, killed=False, connected=True, why="")
    begun = SimpleNamespace(rank=1, connected=False, speaker_pid=0)
    ranks = cast(
        Ranks, SimpleNamespace(members={0: killed, 1: begun}, restore=None, ending=False, attempt=Attempt(1, "a"))
    )
    counts.write_text("oom_kill 2\n")
    news.said(ranks, 1, {"op": "hello", "pid": 7})
    killed.exit = SimpleNamespace(signal=signal.SIGKILL)
    news.exited(ranks, cast(Rank, killed))
    assert "out of memory" in killed.why
