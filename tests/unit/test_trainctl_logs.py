"""Ranks' lines among a Pod's, which Pods to read, and several sources read as one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from outlast.errors import RequestError
from trainctl.logs import _check_rank, log_request
from trainctl.merging import Ended, Merged
from trainctl.podlogs import container_of
from trainctl.ranklines import (
    RankLine,
    Wanted,
    by_attempt,
    instant,
    parse_line,
    pods_of_ranks,
    shown,
    split_time,
)

T = "2026-11-27T12:00:00.5Z"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{T} [rank 3 attempt 12] step 7", RankLine(T, 3, 12, "step 7")),
        (f"{T} [rank 3 attempt 12]   indented", RankLine(T, 3, 12, "  indented")),
        (f"{T} [rank 3 attempt 12] ", RankLine(T, 3, 12, "")),
        (f"{T} [rank 0 attempt 1] [rank 9 attempt 9] quoted", RankLine(T, 0, 1, "[rank 9 attempt 9] quoted")),
        ("[rank 0 attempt 1] no time", RankLine("", 0, 1, "no time")),
        (f"{T} time=x event=own", None),
        (f"{T} said [rank 0 attempt 1] x", None),
        ("", None),
    ],
)
def test_a_ranks_line_is_known_by_its_mark(text: str, found: RankLine | None) -> None:
    assert parse_line(text) == found


def test_times_are_split_off() -> None:
    assert split_time(f"{T} a b") == (T, "a b")
    assert split_time("2026-11-27T12:00:00.123+02:00 a") == ("2026-11-27T12:00:00.123+02:00", "a")
    assert split_time("a b") == ("", "a b")


def test_times_without_their_last_zeros_are_in_order() -> None:
    times = ["2026-11-27T12:00:00Z", "2026-11-27T12:00:00.5Z", "2026-11-27T12:00:00.51Z", "2026-11-27T12:00:01Z"]
    shuffled = [times[2], times[0], times[3], times[1]]
    assert sorted(shuffled, key=instant) == times
    assert sorted(times) != times, "as text they are not"


LINES = [
    RankLine("2026-11-27T12:00:03Z", 0, 2, "d"),
    RankLine("2026-11-27T12:00:01Z", 0, 1, "a"),
    RankLine("2026-11-27T12:00:02Z", 1, 1, "b"),
    RankLine("2026-11-27T12:00:02.5Z", 0, 1, "c"),
]


@pytest.mark.parametrize(
    ("wanted", "tail", "texts"),
    [
        (Wanted(0), None, {1: "ac", 2: "d"}),
        (Wanted(None), None, {1: "abc", 2: "d"}),
        (Wanted(None, least=2), None, {2: "d"}),
        (Wanted(0, attempt=1), 1, {1: "c"}),
        (Wanted(0), 0, {1: "", 2: ""}),
        (Wanted(7), None, {}),
    ],
)
def test_lines_are_sorted_by_attempt_and_time(wanted: Wanted, tail: int | None, texts: dict[int, str]) -> None:
    found = by_attempt(LINES, wanted, tail)
    assert {attempt: "".join(line.text for line in lines) for attempt, lines in found.items()} == texts


def test_a_line_is_shown_with_what_tells_it_apart() -> None:
    line = RankLine(T, 3, 2, "x")
    assert shown(line, marked=False, timestamps=False) == "x"
    assert shown(line, marked=True, timestamps=True) == f"{T} [rank 3 attempt 2] x"
    assert shown(RankLine("", 3, 2, "x"), marked=False, timestamps=True) == "x", "of the store's lines nobody knows"


PODS = ("a", "b", "c")
LIVE = {"nodes": {name: {"node": name, "seat": seat} for name, seat in (("a", 1), ("b", None), ("c", 0))}}


@pytest.mark.parametrize(
    ("live", "procs", "rank", "pods"),
    [
        (LIVE, 1, 0, ("c",)),
        (LIVE, 1, 1, ("a",)),
        (LIVE, 4, 3, ("c",)),
        (LIVE, 4, 4, ("a",)),
        (LIVE, 1, 2, PODS),
        (None, 1, 0, PODS),
        (LIVE, 1, None, PODS),
        ({"nodes": {"gone": {"node": "gone", "seat": 0}}}, 1, 0, PODS),
    ],
)
def test_a_rank_is_looked_for_where_its_seat_is(live: Any, procs: int, rank: int | None, pods: tuple[str, ...]) -> None:
    assert pods_of_ranks(PODS, live, procs, rank) == pods


def status(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "outlast", "containerID": "c1", "restartCount": 2, "state": state, **more}]}


@pytest.mark.parametrize(
    ("about", "started", "running"),
    [
        (status({"running": {}}), True, True),
        (status({"terminated": {}}), True, False),
        (status({"waiting": {}}), False, False),
        ({}, False, False),
    ],
)
def test_the_training_container_is_the_one_that_is_called_so(about: Any, started: bool, running: bool) -> None:
    containers = [{"name": "sidecar"}, {"name": "outlast"}]
    found = container_of({"metadata": {"name": "p"}, "spec": {"containers": containers}, "status": about})
    assert (found.name, found.started, found.running) == ("outlast", started, running)
    assert container_of({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "x"}]}}).name == "x"


PLAIN = {
    "all_ranks": False,
    "head": False,
    "follow": False,
    "attempt": None,
    "previous": False,
    "tail": None,
    "since": None,
    "timestamps": False,
}


def test_without_a_rank_it_is_the_first() -> None:
    assert log_request(None, **PLAIN).rank == 0  # type: ignore[arg-type]
    assert log_request(None, **{**PLAIN, "all_ranks": True}).rank is None  # type: ignore[arg-type]
    assert log_request(2, **{**PLAIN, "since": "1m30s"}).since == {"sinceSeconds": 90}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rank", "given", "said"),
    [
        (1, {"all_ranks": True}, "RANK, --all-ranks and --head: give one of them"),
        (None, {"all_ranks": True, "head": True}, "give one of them"),
        (0, {"previous": True, "attempt": 3}, "--previous and --attempt: give one of them"),
        (0, {"previous": True, "follow": True}, "--previous and --follow"),
        (0, {"since": "yesterday"}, '--since: "yesterday" is no duration'),
    ],
)
def test_options_that_contradict_each_other(rank: int | None, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        log_request(rank, **{**PLAIN, **given})


@pytest.mark.parametrize("given", [{"attempt": 1}, {"previous": True}])
def test_an_attempt_that_is_over_may_have_had_more_ranks(given: dict[str, Any]) -> None:
    """The job was scaled down since."""
    small = {"spec": {"workers": {"replicas": 1, "procsPerWorker": 2}}}
    with pytest.raises(RequestError, match="there is no rank 2: the job has ranks 0 to 1"):
        _check_rank(small, log_request(2, **PLAIN))  # type: ignore[arg-type]
    _check_rank(small, log_request(2, **{**PLAIN, **given}))


# --- several sources as one -----------------------------------------------------------------------------------------


def test_sources_are_taken_in_the_order_of_arrival_and_tell_their_end() -> None:
    merged, gate = Merged(), threading.Event()

    def late() -> Iterator[int]:
        assert gate.wait(10)
        yield 2

    def broken() -> Iterator[int]:
        raise RequestError("no")
        yield 0

    merged.add("late", late())
    merged.add("early", iter([1]))
    assert merged.next(10) == ("early", 1)
    assert merged.next(10) == ("early", Ended())
    assert merged.next(0.01) is None
    assert merged.open == {"late"}
    gate.set()
    assert merged.next(10) == ("late", 2)
    assert merged.next(10) == ("late", Ended())
    merged.add("broken", broken())
    name, ended = merged.next(10) or ("", None)
    assert name == "broken"
    assert isinstance(ended, Ended)
    assert str(ended.error) == "no"
