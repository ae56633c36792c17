"""What can be broken on purpose, and when: ``KIND@STEP:TARGET`` (pure).

::

    rank-crash@20:1             SIGKILL rank 1 before step 20 (steps count from 0)
    rank-error@20:1             rank 1 raises RuntimeError there
    hang@20:1                   SIGSTOP rank 1
    straggler@20:1*3            rank 1 takes three times as long for each step from there on
    node-loss@20:2              kill all of the node that has seat 2, and wipe its memory files
    node-pause@20:2             SIGSTOP all of it; SIGCONT once it was given up and the job runs on
    node-leave@20:2             SIGTERM to it: it has its grace period to hand over, then it is taken away
    node-join@20                one more node, empty
    corrupt@20:2/header         flip bytes in the newest images of seat 2's node: header, data, parity or trailer
    keeper-crash@20:2           SIGKILL that node's keeper alone
    agent-crash@20:2            SIGKILL that node's agent alone
    controller-crash@20         SIGKILL the controller
    head-loss@20                SIGKILL Ray's head and with it the controller

``@STEP.copy``, ``@STEP.encode`` and ``@STEP.restart`` instead of ``@STEP`` mean: while the first snapshot's copy, the
first encoding of parity or the first recovery at or after that step is under way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from outlast.errors import RequestError
from outlast.faults import (
    NODE_KINDS,
    RANK_KINDS,
    Kind,
    Part,
    check_target,
    member,
    noun_of,
    part_of,
    wrong,
)

__all__ = [
    "ANSWERED_KINDS",
    "NODE_KINDS",
    "RANK_KINDS",
    "Fault",
    "Kind",
    "Part",
    "Phase",
    "boundary_steps",
    "check_faults",
    "due",
    "in_order",
    "parse_fault",
]


class Phase(StrEnum):
    """What must be under way for the fault to happen."""

    BOUNDARY = "boundary"
    COPY = "copy"
    ENCODE = "encode"
    RESTART = "restart"


ANSWERED_KINDS = frozenset({Kind.RANK_ERROR, Kind.STRAGGLER})
"""Kinds that the rank itself carries out when the gate tells it to: they need a rank that asks."""

PERFORMING_ORDER = (Kind.CORRUPT, *(kind for kind in Kind if kind is not Kind.CORRUPT))
"""The order of faults of one moment: bytes are flipped before anything dies of the others."""

DEFAULT_FACTOR = 3.0

_SYNTAX = re.compile(
    r"(?P<kind>[a-z-]+)@(?P<step>\d+)(\.(?P<phase>[a-z]+))?(:(?P<target>\d+)(\*(?P<factor>[0-9.]+))?(/(?P<part>[a-z]+))?)?"
)


@dataclass(frozen=True)
class Fault:
    """One thing to break, once. ``target`` is a rank, a seat, or None where the kind has none."""

    kind: Kind
    step: int
    target: int | None = None
    phase: Phase = Phase.BOUNDARY
    factor: float | None = None
    part: Part | None = None

    def __str__(self) -> str:
        phase = "" if self.phase is Phase.BOUNDARY else f".{self.phase}"
        target = "" if self.target is None else f":{self.target}"
        factor = "" if self.factor is None else f"*{self.factor:g}"
        part = "" if self.part is None else f"/{self.part}"
        return f"{self.kind}@{self.step}{phase}{target}{factor}{part}"


def parse_fault(text: str) -> Fault:
    """Read ``KIND@STEP[.PHASE][:TARGET[*FACTOR][/PART]]``.

    Raises RequestError naming what is wrong with ``text`` and what is allowed.
    """
    found = _SYNTAX.fullmatch(text.strip())
    if not found:
        raise _wrong(text, "it is not KIND@STEP:TARGET, such as rank-crash@20:1")
    kind = member(Kind, found["kind"], _given(text), "kind")
    fault = Fault(
        kind=kind,
        step=int(found["step"]),
        target=None if found["target"] is None else int(found["target"]),
        phase=Phase.BOUNDARY if found["phase"] is None else _phase(found["phase"], text),
        factor=_factor(kind, found["factor"], text),
        part=part_of(kind, found["part"], _given(text)),
    )
    _check_shape(fault, text)
    return fault


def check_faults(faults: Iterable[Fault], seats: int, procs: int) -> None:
    """Refuse a target that a job of ``seats`` nodes with ``procs`` ranks each does not have. Raises RequestError."""
    for fault in faults:
        if fault.target is None:
            continue
        noun = noun_of(fault.kind)
        count = seats * procs if noun == "rank" else seats
        if fault.target >= count:
            raise _wrong(str(fault), f"there is no {noun} {fault.target}: the job has {noun}s 0 to {count - 1}")


def boundary_steps(faults: Iterable[Fault]) -> tuple[int, ...]:
    """The steps before which ranks must ask the gate, ascending."""
    return tuple(sorted({fault.step for fault in faults if fault.phase is Phase.BOUNDARY}))


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """``faults`` of one moment in the order in which to perform them."""
    return sorted(faults, key=lambda fault: PERFORMING_ORDER.index(fault.kind))


def due(faults: Iterable[Fault], phase: Phase, step: int) -> list[Fault]:
    """Those of ``faults`` that happen now: at exactly ``step`` for a boundary, at or after theirs for other phases."""
    if phase is Phase.BOUNDARY:
        return in_order(fault for fault in faults if fault.phase is phase and fault.step == step)
    return in_order(fault for fault in faults if fault.phase is phase and fault.step <= step)


def _check_shape(fault: Fault, text: str) -> None:
    check_target(fault.kind, fault.target, _given(text), f"{fault}:0")
    if fault.kind in ANSWERED_KINDS and fault.phase is not Phase.BOUNDARY:
        raise _wrong(text, f"{fault.kind} happens between two steps: @STEP without .{fault.phase}")


def _phase(value: str, text: str) -> Phase:
    phase = member(Phase, value, _given(text), "phase", hidden=(Phase.BOUNDARY,))
    if phase is Phase.BOUNDARY:
        raise _wrong(text, "@STEP alone means the boundary before it")
    return phase


def _factor(kind: Kind, value: str | None, text: str) -> float | None:
    if kind is not Kind.STRAGGLER:
        if value is not None:
            raise _wrong(text, f"{kind} takes no factor")
        return None
    if value is None:
        return DEFAULT_FACTOR
    try:
        factor = float(value)
    except ValueError:
        factor = 0.0
    if factor <= 1.0:
        raise _wrong(text, f"the factor {value} is not a number above 1")
    return factor


def _wrong(text: str, reason: str) -> RequestError:
    return wrong(_given(text), reason)


def _given(text: str) -> str:
    return f"--fault {text}"
