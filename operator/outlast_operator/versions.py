"""Whether an operator and a training image may work together: one minor version apart at most. Pure."""

from __future__ import annotations

import re

_VERSION = re.compile(r"(\d+)\.(\d+)(\..*)?")


def skew(operator: str, runtime: str) -> str:
    """Why the two are too far apart, and what to do; "" when they are not, or when it cannot be told."""
    ours, theirs = _VERSION.match(operator), _VERSION.match(runtime)
    if ours is None or theirs is None:
        return ""
    here, there = (int(ours[1]), int(ours[2])), (int(theirs[1]), int(theirs[2]))
    if here[0] == there[0] and abs(here[1] - there[1]) <= 1:
        return ""
    remedy = "upgrade the training image" if there < here else "upgrade the operator"
    return (
        f"the operator is version {operator}, the training image has {runtime}: they work together when at most one "
        f"minor version apart; {remedy}"
    )
