"""The event log and the metrics log: what is said is kept, in order and exactly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from outlast.clock import ManualClock
from outlast.telemetry import events, lines
from outlast.telemetry.events import RECENT, EventLog, LogEvent, read_events
from outlast.telemetry.lines import TAIL, LineFile, last_object, parse, read_lines
from outlast.telemetry.metrics_log import MetricsLog, StepMetrics, read_metrics


def open_log(path: Path) -> EventLog:
    return EventLog(path, "demo", ManualClock())


def test_event_has_all_fields_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "events.jsonl"
    log = open_log(path)
    event = log.append("node-lost", "node-2 is silent", attempt=3, fields={"node": "node-2", "silent_s": 1.5})
    assert (event.seq, event.job, event.attempt, event.time) == (1, "demo", 3, 1_700_000_000.0)
    assert read_events(path) == [event]
    assert list(next(read_lines(path))) == ["time", "seq", "kind", "job", "attempt", "text", "fields"]


def test_seq_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first = open_log(path)
    for number in range(3):
        first.append("k", str(number))
    second = open_log(path)
    assert second.seq == 3
    assert second.append("k", "3").seq == 4
    assert [event.text for event in second.after(1)] == ["1", "2", "3"]
    assert [event.text for event in second.after(3)] == ["3"]
    assert second.after(4) == []
    assert [event.seq for event in second.after(0, limit=2)] == [1, 2]


def test_old_events_come_from_the_file(tmp_path: Path) -> None:
    log = open_log(tmp_path / "events.jsonl")
    for number in range(RECENT + 10):
        log.append("k", str(number))
    assert [event.seq for event in log.after(0, limit=3)] == [1, 2, 3]
    assert [event.seq for event in log.after(RECENT)] == list(range(RECENT + 1, RECENT + 11))


def long_log(path: Path, count: int) -> EventLog:
    """Texts of all lengths, and a torn line now and then."""
    log = open_log(path)
    for number in range(count):
        log.append("k", "x" * (number * 37 % 150) if number % 1000 else "x" * 3 * events.REACH)
        if number % 777 == 0:
            with path.open("ab") as file:
                file.write(b'{"time": 1, "se\n')
    return log


@pytest.mark.parametrize("restarted", [False, True])
def test_pages_equal_the_whole(tmp_path: Path, restarted: bool) -> None:
    path = tmp_path / "events.jsonl"
    log = long_log(path, 2 * RECENT)
    if restarted:
        log = open_log(path)
    whole = read_events(path)
    assert [event.seq for event in whole] == list(range(1, 2 * RECENT + 1))
    for limit in (1, 300, 1000):
        for seq in range(0, len(whole), limit if limit > 1 else 97):
            assert log.after(seq, limit) == whole[seq : seq + limit]


def test_a_page_reads_little_more_than_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = long_log(tmp_path / "events.jsonl", 5 * RECENT)
    parsed: list[bytes] = []
    counted = lambda line: parsed.append(line) or parse(line)  # noqa: E731
    for module in (events, lines):
        monkeypatch.setattr(module, "parse", counted, raising=False)
    assert [event.seq for event in log.after(3 * RECENT, limit=100)] == list(range(3 * RECENT + 1, 3 * RECENT + 101))
    assert 100 <= len(parsed) < 300
    parsed.clear()
    assert [event.seq for event in log.after(0, limit=3)] == [1, 2, 3]
    assert len(parsed) < 30


@pytest.mark.parametrize("torn", [b'{"time": 1, "se', b"\xff\xfe", b"[1, 2]\n"])
def test_torn_last_line_is_skipped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    open_log(path).append("k", "whole")
    with path.open("ab") as file:
        file.write(torn)
    log = open_log(path)
    assert log.append("k", "next").seq == 2
    assert [event.text for event in read_events(path)] == ["whole", "next"]


def test_last_object_is_found_behind_a_very_long_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with LineFile(path) as file:
        file.append({"n": 1, "text": "x" * 3 * TAIL})
        file.append({"n": 2, "text": "y" * 2 * TAIL})
    with path.open("ab") as raw:
        raw.write(b"torn" * TAIL)
    last = last_object(path)
    assert last is not None
    assert last["n"] == 2
    assert last_object(tmp_path / "absent") is None


def test_nothing_non_finite_breaks_a_line(tmp_path: Path) -> None:
    log = open_log(tmp_path / "events.jsonl")
    event = log.append("k", "t", fields={"a": math.nan, "b": [math.inf], "c": {"d": -math.inf}})
    assert event.fields == {"a": "nan", "b": ["inf"], "c": {"d": "-inf"}}
    assert LogEvent.from_json(event.to_json()) == event


def test_metrics_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    value = 0.1 + 0.2
    log = MetricsLog(path)
    assert log.append(StepMetrics(1, 1, 0, {"loss": value, "step": 99, "tokens": 2**60}))
    assert log.append(StepMetrics(2, 1, 0, {"loss": math.nan}))
    first, second = read_metrics(path)
    assert (first.metrics["loss"], first.step, first.metrics["tokens"]) == (value, 1, 2**60)
    assert math.isnan(float(second.metrics["loss"]))


def test_metrics_of_a_repeated_step_belong_to_their_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    lines = [StepMetrics(step, 1, 0, {"loss": 1.0}) for step in (1, 2, 2, 1, 3)]
    assert [log.append(line) for line in lines] == [True, True, False, False, True]
    again = MetricsLog(path)
    assert again.last == lines[-1]
    assert not again.append(StepMetrics(3, 1, 0, {"loss": 2.0}))
    assert again.append(StepMetrics(2, 2, 0, {"loss": 2.0}))
    assert [(line.attempt, line.step) for line in read_metrics(path)] == [(1, 1), (1, 2), (1, 3), (2, 2)]
