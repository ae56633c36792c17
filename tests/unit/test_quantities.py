"""Amounts as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from outlast.quantities import (
    LONGEST_S,
    IntervalOrAuto,
    SecondsOrAuto,
    StepsOrAuto,
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8Gi", 8 * 1024**3),
        ("200Mi", 200 * 1024**2),
        ("1.5Gi", 3 * 512 * 1024**2),
        ("8G", 8 * 10**9),
        ("64k", 64_000),
        ("0.1Ki", 103),
        ("4096", 4096),
        (4096, 4096),
        (0, 0),
    ],
)
def test_bytes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("8GB", "did you mean 8G?"),
        ("8 gib", "did you mean 8Gi?"),
        ("64KB", "did you mean 64k?"),
        ("100m", "did you mean 100M?"),
        ("lots", "8Gi"),
        ("", "8Gi"),
        ("-1Gi", "8Gi"),
        (-1, "-1 is no amount"),
        (1.5, "1.5 is no amount"),
        (True, "True is no amount"),
        (None, "None is no amount"),
    ],
)
def test_no_bytes(text: Any, hint: str) -> None:
    with pytest.raises(ValueError, match="is no amount of bytes") as caught:
        parse_bytes(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600.0),
        ("60s", 60.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        ("250ms", 0.25),
        ("2d", 172800.0),
        ("0s", 0.0),
        ("1.5h", 5400.0),
        ("0.1s", 0.1),
        (90, 90.0),
        (0.5, 0.5),
    ],
)
def test_duration(text: str | float, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("10 min", "did you mean 10m?"),
        ("2 hours", "did you mean 2h?"),
        ("600", "did you mean 600s?"),
        ("1 Day", "did you mean 1d?"),
        ("soon", "1h30m"),
        ("", "1h30m"),
        ("-5s", "1h30m"),
        (-5, "-5 is no duration"),
        (float("inf"), "inf is no duration"),
        (float("nan"), "nan is no duration"),
        ("9" * 400 + "d", "longer than a hundred years"),
        (True, "True is no duration"),
    ],
)
def test_no_duration(text: Any, hint: str) -> None:
    with pytest.raises(ValueError, match="is no duration") as caught:
        parse_duration(text)
    assert hint in str(caught.value)


@pytest.mark.parametrize(("seconds", "text"), [(5400.0, "1h30m"), (0.0, "0s"), (0.25, "0.25s"), (61.0, "1m1s")])
def test_duration_is_written_as_people_do(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(8 * 1024**3, "8Gi"), (1536, "1536"), (0, "0"), (1024, "1Ki")])
def test_bytes_are_written_as_people_do(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(0, 2**70))
def test_bytes_survive_writing(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == count


@given(st.floats(0, LONGEST_S, allow_nan=False))
def test_durations_survive_writing(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


INTERVAL: TypeAdapter[Any] = TypeAdapter(IntervalOrAuto)


@pytest.mark.parametrize(
    ("given_value", "value", "written"),
    [
        ("auto", "auto", "auto"),
        (1, 1, 1),
        (100, 100, 100),
        ("10m", 600.0, "10m"),
        ("1h30m", 5400.0, "1h30m"),
        ("0.5s", 0.5, "0.5s"),
    ],
)
def test_an_interval_is_steps_or_seconds_or_chosen(given_value: Any, value: Any, written: Any) -> None:
    read = INTERVAL.validate_python(given_value)
    assert (read, type(read)) == (value, type(value))
    assert INTERVAL.dump_python(read) == INTERVAL.dump_python(read, mode="json") == written


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (0, "0 is no interval: write a whole number of steps, a duration such as 10m, or auto"),
        (-5, "-5 is no interval"),
        (1.5, "1.5 is no interval"),
        (10.0, "10.0 is no interval"),
        (True, "True is no interval"),
        (None, "None is no interval"),
        ("", '"" is no interval'),
        ("100", "did you mean 100 (steps) or 100s?"),
        ("10 min", "did you mean 10m?"),
        ("0s", "too short"),
        ("often", '"often" is no interval'),
        ("Auto", '"Auto" is no interval'),
        ([1], "[1] is no interval"),
    ],
)
def test_what_is_no_interval(value: Any, hint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        INTERVAL.validate_python(value)
    assert hint in str(caught.value)


@given(st.one_of(st.just("auto"), st.integers(1, 2**60), st.floats(1e-6, LONGEST_S).map(format_duration)))
def test_intervals_survive_writing(given_value: int | str) -> None:
    read = INTERVAL.validate_python(given_value)
    again = INTERVAL.validate_python(INTERVAL.dump_python(read, mode="json"))
    assert (again, type(again)) == (read, type(read))


@pytest.mark.parametrize("kind", [IntervalOrAuto, SecondsOrAuto, StepsOrAuto])
def test_auto_stays_auto(kind: Any) -> None:
    assert TypeAdapter(kind).validate_python("auto") == "auto"
