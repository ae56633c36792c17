"""Amounts as people write them: bytes (``8Gi``, ``200Mi``) and durations (``10m``, ``1h30m``).

Parsers and their inverses, then the field types of ``outlast.api`` made of them. A parsed value is a plain ``int`` of
bytes or ``float`` of seconds, and is written back in the spelling that people use. Every ``ValueError`` names the
value, says what is allowed and, where it can be guessed, what was meant.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PlainSerializer, PlainValidator, WithJsonSchema

Auto = Literal["auto"]

_BINARY: dict[str, int] = {unit: 1024 ** (power + 1) for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))}
_DECIMAL: dict[str, int] = {unit: 1000 ** (power + 1) for power, unit in enumerate(("k", "M", "G", "T", "P", "E"))}
_BYTE_UNITS = {"": 1, **_DECIMAL, **_BINARY}
_SECOND_UNITS = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}

_BYTES = re.compile(r"(\d+(?:\.\d+)?)([kMGTPE]|[KMGTPE]i)?")
_LOOSE_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtpe])(i?)(?:b|bytes?)?", re.IGNORECASE)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern})+")
_LOOSE_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|)[a-z]*", re.IGNORECASE)

_MIN_MEMORY = 1024**2
LONGEST_S = 100 * 365 * 86400


def parse_bytes(value: str | int) -> int:
    """Bytes out of ``8Gi`` (powers of 1024), ``8G`` (powers of 1000) or a whole number. Raises ValueError.

    Source: Kubernetes, resource.Quantity; a part of a byte is rounded up as there, milli-bytes are refused.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _BYTES.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{_shown(value)} is no amount of bytes: write 8Gi, 512Mi or 8G{_meant(_guess_bytes(value))}")
    return math.ceil(Fraction(match[1]) * _BYTE_UNITS[match[2] or ""])


def format_bytes(count: int) -> str:
    """The shortest exact spelling in binary units: ``8589934592`` is ``8Gi``; what is no multiple stays a number."""
    for unit, size in reversed(_BINARY.items()):
        if count and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


def parse_duration(value: str | float) -> float:
    """Seconds out of ``90s``, ``10m``, ``1h30m``, ``250ms``, ``2d``, or a number, which counts seconds.

    Raises ValueError, also for more than a hundred years, which no clock and no lock would wait for.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        seconds = Fraction(value)
    elif isinstance(value, str) and _DURATION.fullmatch(value):
        parts = _DURATION_PART.findall(value)
        seconds = sum((Fraction(number) * _SECOND_UNITS[unit] for number, unit in parts), Fraction(0))
    else:
        raise ValueError(f"{_shown(value)} is no duration: write 90s, 10m or 1h30m{_meant(_guess_duration(value))}")
    if seconds > LONGEST_S:
        raise ValueError(f"{_shown(value)} is no duration: it is longer than a hundred years")
    return float(seconds)


def format_duration(seconds: float) -> str:
    """The spelling that ``parse_duration`` reads back exactly: ``5400.0`` is ``1h30m``, ``0.25`` is ``0.25s``."""
    if seconds != int(seconds):
        return f"{Decimal(repr(seconds)):f}s"
    hours, rest = divmod(int(seconds), 3600)
    parts = ((hours, "h"), (rest // 60, "m"), (rest % 60, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


def _shown(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _meant(guess: str | None) -> str:
    return f"; did you mean {guess}?" if guess else ""


def _guess_bytes(value: object) -> str | None:
    match = _LOOSE_BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return None
    unit = match[2].upper() + "i" if match[3] else match[2].upper().replace("K", "k")
    return match[1] + unit


def _guess_duration(value: object) -> str | None:
    match = _LOOSE_DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    return match[1] + (match[2].lower() or "s") if match else None


def _steps_or_auto(value: Any) -> int | Auto:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError(f"{_shown(value)} is no number of steps: write auto or a whole number of at least 1")


def _duration_or_auto(value: Any) -> float | Auto:
    if value == "auto":
        return "auto"
    try:
        return _positive(parse_duration(value))
    except ValueError as error:
        raise ValueError(f"{error}; or write auto") from error


def _write_duration_or_auto(value: float | Auto) -> str:
    return "auto" if value == "auto" else format_duration(value)


def _interval_or_auto(value: Any) -> int | float | Auto:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, str) and _DURATION.fullmatch(value):
        return _positive(parse_duration(value))
    guess = f"{value} (steps) or {value}s" if isinstance(value, str) and value.isdecimal() else _guess_duration(value)
    wanted = "a whole number of steps, a duration such as 10m, or auto"
    raise ValueError(f"{_shown(value)} is no interval: write {wanted}{_meant(guess)}")


def _write_interval_or_auto(value: float | Auto) -> int | str:
    return format_duration(value) if isinstance(value, float) else value


def _positive(seconds: float) -> float:
    if seconds <= 0:
        raise ValueError(f"{seconds:g} s is too short: must be more than 0s")
    return seconds


def _enough_memory(count: int) -> int:
    if count < _MIN_MEMORY:
        raise ValueError(f"{count} bytes is too little: must be at least {format_bytes(_MIN_MEMORY)}")
    return count


def _schema(number: str, text: str, message: str) -> WithJsonSchema:
    """What Kubernetes calls int-or-string: a whole number of which the CEL expression ``number`` holds, or text of
    which ``text`` does; ``message``: what to write instead.
    """
    return WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": _LONGEST,
            "x-kubernetes-int-or-string": True,
            "x-kubernetes-validations": [{"rule": f"type(self) == int ? {number} : {text}", "message": message}],
        }
    )


_LONGEST = 64
"""Characters of an amount in a resource: far more than any needs, and no number of so many overflows."""
_IS_DURATION = r"self.matches(r'^([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+$')"
_IS_POSITIVE_DURATION = f"({_IS_DURATION} && self.matches('[1-9]'))"
_IS_BYTES = r"self.matches(r'^[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?$')"
_IS_ENOUGH_MEMORY = f"({_IS_BYTES} && !quantity(self).isLessThan(quantity('{format_bytes(_MIN_MEMORY)}')))"
_POSITIVE = "a duration of more than 0s, such as 90s, 10m or 1h30m"

Seconds = Annotated[
    float,
    PlainValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    _schema("self >= 0", _IS_DURATION, "write 90s, 10m or 1h30m"),
]
"""A duration of 0 or more, in seconds."""

PositiveSeconds = Annotated[
    float,
    PlainValidator(parse_duration),
    AfterValidator(_positive),
    PlainSerializer(format_duration, return_type=str),
    _schema("self > 0", _IS_POSITIVE_DURATION, f"write {_POSITIVE}"),
]
"""A duration of more than 0, in seconds."""

SecondsOrAuto = Annotated[
    float | Auto,
    PlainValidator(_duration_or_auto),
    PlainSerializer(_write_duration_or_auto, return_type=str),
    _schema("self > 0", f"self == 'auto' || {_IS_POSITIVE_DURATION}", f"write {_POSITIVE}, or auto"),
]
"""A duration of more than 0, in seconds, or ``"auto"``: chosen by measurement."""

StepsOrAuto = Annotated[
    int | Auto,
    PlainValidator(_steps_or_auto),
    _schema("self >= 1", "self == 'auto'", "write auto or a whole number of steps, at least 1"),
]
"""A number of steps, at least 1, or ``"auto"``: chosen by measurement."""

IntervalOrAuto = Annotated[
    int | float | Auto,
    PlainValidator(_interval_or_auto),
    PlainSerializer(_write_interval_or_auto, return_type=int | str),
    _schema(
        "self >= 1",
        f"self == 'auto' || {_IS_POSITIVE_DURATION}",
        "write a whole number of steps, at least 1, a duration of more than 0s, such as 10m, or auto",
    ),
]
"""An ``int`` of steps, a ``float`` of seconds, or ``"auto"``: chosen by measurement."""

MemoryBytes = Annotated[
    int,
    PlainValidator(parse_bytes),
    AfterValidator(_enough_memory),
    PlainSerializer(format_bytes, return_type=str),
    _schema(
        f"self >= {_MIN_MEMORY}",
        _IS_ENOUGH_MEMORY,
        f"write {format_bytes(_MIN_MEMORY)} or more, such as 8Gi, 512Mi or 8G",
    ),
]
"""An amount of memory of at least 1Mi, in bytes."""
