"""What a controller leaves to the next one in the same folder, beyond what that one learns from the agents: values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Nodes that are wanted. ``min_replicas`` None: the job may not train with fewer."""

    replicas: int
    min_replicas: int | None
    spares: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Times are wall seconds. ``began``: when the job's first controller did; ``started``: when its first rank did;
    ``restarts``: those that count against the budget; ``errors``: (steps done, signature, how often) of crashes of the
    script's; ``size``: what was asked for last, None: what the job says; ``shedding``: nodes that are too many for it
    have yet to leave.
    """

    began: float | None = None
    started: float | None = None
    restarts: tuple[float, ...] = ()
    errors: tuple[tuple[int, str, int], ...] = ()
    size: Size | None = None
    shedding: bool = False
