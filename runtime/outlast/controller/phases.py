"""The phases of a job and the ways between them, as data."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Where the job is.

    ==========  ====================================================================================
    GATHERING   nodes join; nothing has been started by this controller
    STOPPING    every node is told to stop; answers are awaited
    WAITING     all have stopped; a backoff passes, or a node is missing
    STARTING    ranks start and load; not all are ready
    RUNNING     all ranks are ready
    DIAGNOSING  something is wrong; its cause, or the stacks of hung ranks, are awaited for a moment
    FINISHING   the outcome is known; the driver ends everything
    ==========  ====================================================================================
    """

    GATHERING = "gathering"
    STOPPING = "stopping"
    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    DIAGNOSING = "diagnosing"
    FINISHING = "finishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    SUSPENDED = "suspended"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.GATHERING: frozenset({Phase.STOPPING, Phase.RUNNING, Phase.FINISHING}),
    Phase.STOPPING: frozenset({Phase.STOPPING, Phase.WAITING, Phase.STARTING, Phase.FINISHING}),
    Phase.WAITING: frozenset({Phase.STOPPING, Phase.STARTING, Phase.FINISHING}),
    Phase.STARTING: frozenset({Phase.RUNNING, Phase.DIAGNOSING, Phase.STOPPING, Phase.FINISHING}),
    Phase.RUNNING: frozenset({Phase.DIAGNOSING, Phase.STOPPING, Phase.FINISHING}),
    Phase.DIAGNOSING: frozenset({Phase.STOPPING, Phase.FINISHING}),
    Phase.FINISHING: frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.STOPPED, Phase.SUSPENDED}),
    Phase.SUCCEEDED: frozenset(),
    Phase.FAILED: frozenset(),
    Phase.STOPPED: frozenset(),
    Phase.SUSPENDED: frozenset(),
}

LIVE = frozenset({Phase.STARTING, Phase.RUNNING, Phase.DIAGNOSING})
"""An attempt's ranks may be alive."""

PREPARING = frozenset({Phase.STOPPING, Phase.WAITING})
"""The next attempt is being prepared."""

OVER = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.STOPPED, Phase.SUSPENDED})

SHOWN: dict[Phase, str] = {
    Phase.GATHERING: "Pending",
    Phase.STOPPING: "Starting",
    Phase.WAITING: "Pending",
    Phase.STARTING: "Starting",
    Phase.RUNNING: "Running",
    Phase.DIAGNOSING: "Recovering",
    Phase.FINISHING: "Running",
    Phase.SUCCEEDED: "Succeeded",
    Phase.FAILED: "Failed",
    Phase.STOPPED: "Stopped",
    Phase.SUSPENDED: "Suspended",
}
"""What people are told; Recovering instead, when it is not the first start."""
