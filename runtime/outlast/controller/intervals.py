"""How often to snapshot and to checkpoint, chosen from what it costs and how often the job fails. Pure.

One state costs C = ``stall`` (training blocked) + ``background`` (steps made longer while it is written) seconds of
training and is safe ``latency`` seconds after its boundary. With failures at rate r, M = 1/r apart on average, and
tau seconds of training from one state to the next, the loss to first order is, as a share of the time,

    C / tau + r * (tau / 2 + latency + restart)

whose least is at tau = sqrt(2 C M) (Young, A first order approximation to the optimum checkpoint interval, CACM
17(9), 1974). Daly (A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006,
equation 37) has the terms that count where C is not small against M:

    tau = sqrt(2 C M) * (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C   for C < 2M, else tau = M

The latency changes the loss, not its least; but the next state is not begun before the last one is safe, which bounds
tau from below and decides it alone where a state costs next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from outlast.controller.failure_rate import FailureRate

HOUR = 3600.0
NODE_FAILURE = 1 / (4000 * HOUR)
"""Failures a second and node that a job begins with: 419 unforeseen interruptions in 54 days on 2,048 nodes are one in
6,300 node-hours (The Llama 3 Herd of Models, 2024, section 3.3.4); about 105 restarts in two months on 124 nodes are
one in 1,700 (OPT, 2022, section 2.5)."""
BEYOND_PARITY = 0.02
"""Of such failures, those that take more nodes of a group than its parity replaces: an assumption."""
WHOLE_JOB = 1 / (30 * 24 * HOUR)
"""Failures a second in which all memory is lost, whatever the size: power, maintenance, eviction; an assumption."""


@dataclass(frozen=True)
class Bounds:
    """What the interval keeps to, whatever the formula says.

    ``shortest_s`` and ``longest_s``: seconds of training between two states. ``most_overhead``: the share of the time
    that they may cost, so that a burst of failures does not make them the only thing that is done. ``least_share``: of
    its latency that a state counts as costing at least, since processors and networks are others' too even where no
    step was seen to be longer. ``latency_slack``: multiples of the latency between the boundaries of two states.
    """

    shortest_s: float = 0.0
    longest_s: float = 600.0
    most_overhead: float = 0.25
    least_share: float = 0.01
    latency_slack: float = 1.05


@dataclass(frozen=True)
class Choice:
    """``interval_s``: seconds of training from one state to the next; ``expected_loss``: the share of the time, 0 to 1,
    that goes into states, lost work and restarts; ``inputs``: what it was chosen from; ``bounds``: those that decided
    ("unmeasured", "shortest", "latency", "overhead", "longest"), none where the formula did."""

    interval_s: float
    expected_loss: float
    inputs: Mapping[str, float]
    bounds: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For /status."""
        return {
            "interval_s": round(self.interval_s, 3),
            "expected_loss": float(f"{self.expected_loss:.4g}"),
            "inputs": {name: float(f"{value:.6g}") for name, value in self.inputs.items()},
            "bounds": list(self.bounds),
        }


def daly_interval(cost_s: float, mtbf_s: float) -> float:
    """The interval with the least loss, in seconds of training (Daly 2006, equation 37; see the module's text)."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    half = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + half / 3 + half * half / 9) - cost_s


def expected_loss(interval_s: float, cost_s: float, latency_s: float, restart_s: float, rate: float) -> float:
    """The share of the time that is lost, 0 to 1, with exponential failures at ``rate`` a second.

    Daly's complete model (2006, section 3), with the time until a state is safe beyond its own cost counted as part of
    the restart: after a failure, the first state is safe after restart, interval and latency, and each further one an
    interval and a cost later. To first order this is the sum in the module's text.
    """
    if rate <= 0:
        return cost_s / (interval_s + cost_s) if interval_s + cost_s > 0 else 0.0
    before = rate * (restart_s + max(0.0, latency_s - cost_s))
    period = rate * (interval_s + cost_s)
    if period <= 0:
        return -math.expm1(-before)
    if before + period > 700:
        return 1.0
    return min(1.0, max(0.0, 1.0 - rate * interval_s * math.exp(-before) / math.expm1(period)))


class Smoothed:
    """A cost as it is now: the median of the last three observations, smoothed, so that one outlier counts for
    nothing, and a cost that changed is believed from its second time on."""

    GAIN = 0.25

    def __init__(self) -> None:
        self.value = 0.0
        self.count = 0
        self._last: list[float] = []

    def observe(self, value: float) -> None:
        """One more. Values that are no amount (negative, infinite, nan) are not taken."""
        if not 0 <= value < math.inf:
            return
        self._last = [*self._last[-2:], value]
        self.count += 1
        self.value += max(self.GAIN, 1 / self.count) * (median(self._last) - self.value)


class Lengthening:
    """How much longer steps take while something goes on in the background, from the steps' own times."""

    def __init__(self) -> None:
        self._clear = Smoothed()
        self._busy = Smoothed()

    def step(self, seconds: float, busy: bool) -> None:
        """A step took so long; ``busy``: with it under way for the most part."""
        (self._busy if busy else self._clear).observe(seconds)

    def background_s(self, steps: float) -> float:
        """Training time lost by ``steps`` steps beside it; 0.0 until steps of both kinds were seen."""
        if not self._clear.count or not self._busy.count:
            return 0.0
        return max(0.0, self._busy.value - self._clear.value) * max(0.0, steps)


@dataclass
class IntervalChooser:
    """Chooses one tier's interval from what is told. ``restart_s`` is expected until restarts were seen."""

    failures: FailureRate
    bounds: Bounds = field(default_factory=Bounds)
    restart_s: float = 10.0

    def __post_init__(self) -> None:
        self._stall, self._background, self._latency = Smoothed(), Smoothed(), Smoothed()
        self._restart = Smoothed()
        self._down_since: float | None = None

    def observe(self, stall_s: float, background_s: float, latency_s: float) -> None:
        """A state is safe. ``stall_s``: training was blocked; ``background_s``: steps took longer in all (0.0 when
        unknown); ``latency_s``: from its boundary until it was safe."""
        self._down_since = None  # whoever was not told that training goes on learns it here
        self._stall.observe(stall_s)
        self._background.observe(background_s)
        self._latency.observe(latency_s)

    def failed(self, now: float) -> None:
        """Work since this tier's last state is lost. Another failure before training went on loses no more of it, so
        that it changes the time to restart and not the rate."""
        if self._down_since is None:
            self._down_since = now
            self.failures.failed(now)

    def resumed(self, now: float) -> None:
        """Training goes on after a failure, or begins; the time between was no time to fail in."""
        if self._down_since is not None:
            seconds = max(0.0, now - self._down_since)
            self._down_since = None
            self._restart.observe(seconds)
            self.failures.paused(seconds)

    def choice(self, now: float) -> Choice:
        """The interval to keep to now."""
        latency, rate = self._latency.value, self.failures.rate(now)
        restart = self._restart.value if self._restart.count else self.restart_s
        cost = max(self._stall.value + self._background.value, self.bounds.least_share * latency)
        inputs = {
            "failures_per_day": rate * 86400,
            "stall_s": self._stall.value,
            "background_s": self._background.value,
            "latency_s": latency,
            "restart_s": restart,
            "observed": float(self._latency.count),
        }
        interval, bounds = self._bounded(daly_interval(cost, 1 / rate), cost, latency)
        return Choice(interval, expected_loss(interval, cost, latency, restart, rate), inputs, bounds)

    def _bounded(self, best: float, cost: float, latency: float) -> tuple[float, tuple[str, ...]]:
        """The interval within the bounds, and which of them decided. The lower ones win over the upper one."""
        bounds = self.bounds
        if not self._latency.count:
            return bounds.shortest_s, ("unmeasured",)
        lower = {
            "shortest": bounds.shortest_s,
            "latency": bounds.latency_slack * latency - self._stall.value,
            "overhead": cost * (1 / bounds.most_overhead - 1),
        }
        name = max(lower, key=lambda each: lower[each])
        if lower[name] > min(best, bounds.longest_s):
            return lower[name], (name,)
        if best > bounds.longest_s:
            return bounds.longest_s, ("longest",)
        return best, ()


def memory_chooser(nodes: int) -> IntervalChooser:
    """For snapshots of a job of so many nodes: every restart loses the work since the last one."""
    return IntervalChooser(FailureRate(max(1, nodes) * NODE_FAILURE), Bounds(longest_s=600.0), restart_s=5.0)


def object_chooser(nodes: int) -> IntervalChooser:
    """For checkpoints: only what takes more than parity replaces loses the work since the last one."""
    rate = WHOLE_JOB + BEYOND_PARITY * max(1, nodes) * NODE_FAILURE
    return IntervalChooser(FailureRate(rate), Bounds(shortest_s=60.0, longest_s=HOUR), restart_s=60.0)
