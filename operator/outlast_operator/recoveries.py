"""What the job recovers from, or has: words for the condition Recovering, out of the controller's records. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outlast_operator.sight import Sight
from outlast_operator.verdict import Word

RECOVERED, WENT_ON = "Recovered", "WentOn"
"""Reasons once a recovery is over: from a fault, or after a planned change such as another size."""
HEAD_LOST = "HeadLost"
_GATHERED = "the head was lost: the next one has gathered the nodes"
FIRST_STEP = "FirstStep"
"""Ranks run again; what the recovery cost is known when they have done a step that is new."""
NOT_RECOVERED = "NotRecovered"
"""The job has ended, was suspended or has given back its nodes before that."""


def under_way(sight: Sight) -> Word:
    """What the job recovers from."""
    last = _last(sight)
    known = sight.condition("Recovering")
    if sight.head is not None and sight.heard is None and known is not None and known.status == "True":
        return Word(known.reason, known.message)
    if sight.head is None and not sight.old.head:
        return Word("Recovering", "the job's Pods are made again")
    if sight.head is None or sight.heard is None or not (sight.heard.started or last):
        return Word(HEAD_LOST, "the head was lost: the next one gathers the nodes")
    if last.get("cause") and last.get("total_s") is None:
        return Word(camel(str(last.get("kind") or "")) or "Recovering", str(last["cause"]))
    lost = known is not None and known.status == "True" and known.reason == HEAD_LOST
    return Word(HEAD_LOST, "the head was lost: ranks start again") if lost else Word("Recovering", "ranks start again")


def last_one(sight: Sight, trains: bool) -> Word:
    """The last recovery, once it is over; the condition keeps what a controller said that is no more. ``trains``: so
    does the job, or did to its end; if it does not, a recovery that had no end yet has none."""
    last = _last(sight)
    if isinstance(last.get("total_s"), int | float):
        lost = f", {last['lost_steps']} steps lost" if last.get("lost_steps") is not None else ""
        reason = WENT_ON if last.get("planned") else RECOVERED
        return Word(reason, f"{last.get('cause', '')} ({last['total_s']:.1f} s{lost})")
    if last.get("cause"):
        return Word(FIRST_STEP if trains else NOT_RECOVERED, str(last["cause"]))
    known = sight.condition("Recovering")
    if known is None:
        return Word("NothingLost")
    if known.status == "False":
        return Word(known.reason, known.message)
    message = _GATHERED if known.reason == HEAD_LOST and trains else known.message
    return Word(RECOVERED if trains else NOT_RECOVERED, message)


def camel(cause: str) -> str:
    """``node-lost`` is ``NodeLost``."""
    return "".join(part[:1].upper() + part[1:] for part in cause.split("-"))


def _last(sight: Sight) -> Mapping[str, Any]:
    records = sight.heard.status.get("recoveries") if sight.heard is not None else None
    last = records[-1] if isinstance(records, list | tuple) and records else {}
    return last if isinstance(last, Mapping) else {}
