"""What can be broken on purpose, and how people write it (pure, light: the command line reads it too).

A fault of a running job happens at once and is written ``KIND:TARGET``, after ``local.faults``, which also says when::

    rank-crash:1          SIGKILL rank 1
    hang:1                SIGSTOP rank 1
    node-loss:2           kill all of the node that has seat 2, and wipe its memory files
    node-leave:2          tell it to go, as before a machine is taken away: it hands over within its grace period
    corrupt:2/header      flip bytes in the newest images of seat 2's node: header, data, parity or trailer
    keeper-crash:2        SIGKILL that node's keeper alone
    agent-crash:2         SIGKILL that node's agent alone
    controller-crash      SIGKILL the controller
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from outlast.errors import RequestError


class Kind(StrEnum):
    """What is done to the target."""

    RANK_CRASH = "rank-crash"
    RANK_ERROR = "rank-error"
    HANG = "hang"
    STRAGGLER = "straggler"
    NODE_LOSS = "node-loss"
    NODE_PAUSE = "node-pause"
    NODE_LEAVE = "node-leave"
    NODE_JOIN = "node-join"
    CORRUPT = "corrupt"
    KEEPER_CRASH = "keeper-crash"
    AGENT_CRASH = "agent-crash"
    CONTROLLER_CRASH = "controller-crash"
    HEAD_LOSS = "head-loss"


class Part(StrEnum):
    """Which bytes of a node's images are flipped."""

    HEADER = "header"
    DATA = "data"
    PARITY = "parity"
    TRAILER = "trailer"


RANK_KINDS = frozenset({Kind.RANK_CRASH, Kind.RANK_ERROR, Kind.HANG, Kind.STRAGGLER})
NODE_KINDS = frozenset(
    {Kind.NODE_LOSS, Kind.NODE_PAUSE, Kind.NODE_LEAVE, Kind.CORRUPT, Kind.KEEPER_CRASH, Kind.AGENT_CRASH}
)
AT_ONCE = frozenset(
    {
        *{Kind.RANK_CRASH, Kind.HANG, Kind.NODE_LOSS, Kind.NODE_LEAVE, Kind.CORRUPT},
        *{Kind.KEEPER_CRASH, Kind.AGENT_CRASH, Kind.CONTROLLER_CRASH},
    }
)
"""Kinds that a running job is asked for: its own agents and controller carry them out."""

_E = TypeVar("_E", bound=StrEnum)

_SYNTAX = re.compile(r"(?P<kind>[a-z-]+)(:(?P<target>\d+)(/(?P<part>[a-z]+))?)?")


@dataclass(frozen=True)
class AtOnce:
    """One thing to break now. ``target`` is a rank, a seat, or None where the kind has none."""

    kind: Kind
    target: int | None = None
    part: Part | None = None

    def __str__(self) -> str:
        target = "" if self.target is None else f":{self.target}"
        return f"{self.kind}{target}" + ("" if self.part is None else f"/{self.part}")


def parse_at_once(text: str) -> AtOnce:
    """Read ``KIND[:TARGET[/PART]]``. Raises RequestError naming what is wrong with ``text`` and what is allowed."""
    given = f"the fault {text.strip() or '(none)'}"
    found = _SYNTAX.fullmatch(text.strip())
    if not found:
        raise wrong(given, "it is not KIND:TARGET, such as rank-crash:1")
    kind = member(Kind, found["kind"], given, "kind")
    if kind not in AT_ONCE:
        raise wrong(given, f"a running job can be asked for {names(sorted(AT_ONCE))}, not for this")
    target = None if found["target"] is None else int(found["target"])
    check_target(kind, target, given, f"{kind}:0")
    return AtOnce(kind, target, part_of(kind, found["part"], given))


def check_target(kind: Kind, target: int | None, given: str, example: str) -> None:
    """Whether a kind has the target that it needs, as in ``example``. Raises RequestError."""
    needs = kind in RANK_KINDS or kind in NODE_KINDS
    if needs and target is None:
        raise wrong(given, f"{kind} needs a {noun_of(kind)}: {example}")
    if not needs and target is not None:
        raise wrong(given, f"{kind} takes no target")


def noun_of(kind: Kind) -> str:
    """What its target is."""
    return "rank" if kind in RANK_KINDS else "seat"


def part_of(kind: Kind, value: str | None, given: str) -> Part | None:
    """The part that is meant, data where none is named. Raises RequestError."""
    if kind is not Kind.CORRUPT:
        if value is not None:
            raise wrong(given, f"{kind} takes no part")
        return None
    return Part.DATA if value is None else member(Part, value, given, "part")


def member(cls: type[_E], value: str, given: str, noun: str, hidden: Collection[_E] = ()) -> _E:
    """The member of that value. Raises RequestError that lists them, but for the ``hidden``."""
    try:
        return cls(value)
    except ValueError:
        known = names(one for one in cls if one not in hidden)
        raise wrong(given, f"unknown {noun} {value}: one of {known}") from None


def names(values: Iterable[StrEnum]) -> str:
    """For people."""
    return ", ".join(value.value for value in values)


def wrong(given: str, reason: str) -> RequestError:
    """The error for a fault that is none, as it was ``given``."""
    return RequestError(f"{given}: {reason}")
