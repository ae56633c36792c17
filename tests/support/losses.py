"""A run that fails again and again, as numbers: how much of its time is useful with one interval or another.

Failures come after the given gaps (seconds from one to the next). After each, training restarts for ``restart_s``; then
a state is begun after every interval of training, blocks for ``cost_s`` and is safe ``latency_s`` after its boundary; a
failure takes back what is not safe. A failure during a restart begins it anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from outlast.controller.intervals import IntervalChooser

Gaps = np.ndarray
Process = Callable[[np.random.Generator, int, float], Gaps]
"""(chance, how many, mean seconds) -> gaps."""


@dataclass(frozen=True)
class Costs:
    """Seconds, of one state and of a restart."""

    cost_s: float
    latency_s: float
    restart_s: float = 5.0

    @property
    def unsafe_s(self) -> float:
        """From the end of what a state costs until it is safe."""
        return max(0.0, self.latency_s - self.cost_s)


def useful_with_fixed(gaps: Gaps, interval_s: float, costs: Costs) -> float:
    """The useful share of the time with one interval for all time."""
    safe = np.floor((gaps - costs.restart_s - costs.unsafe_s) / (interval_s + costs.cost_s)).clip(0)
    return float(safe.sum() * interval_s / gaps.sum())


def best_fixed(gaps: Gaps, costs: Costs, tried: int = 300) -> tuple[float, float]:
    """The interval with the largest useful share on exactly these gaps, in hindsight, and that share.

    Tried are intervals up to 30 times shorter and longer than Young's, but none that begins a state before the last one
    is safe.
    """
    young = math.sqrt(2 * costs.cost_s * float(gaps.mean()))
    shortest = max(young / 30, costs.unsafe_s)
    intervals = np.geomspace(shortest, max(30 * young, 3 * shortest), tried)
    shares = [useful_with_fixed(gaps, float(each), costs) for each in intervals]
    index = int(np.argmax(shares))
    return float(intervals[index]), shares[index]


def useful_with_chooser(gaps: Gaps, chooser: IntervalChooser, costs: Costs) -> float:
    """The useful share with intervals that ``chooser`` chooses as it learns, asked anew whenever the time since the
    last failure has grown by a tenth."""
    began = useful = 0.0
    chooser.choice(0.0)
    for gap in gaps.tolist():
        passed = costs.restart_s
        if passed < gap:
            chooser.resumed(began + passed)
        while passed < gap:
            interval = chooser.choice(began + passed).interval_s
            period = interval + costs.cost_s
            states = max(1, int(0.1 * passed / period))
            safe = min(states, max(0, math.floor((gap - passed - costs.unsafe_s) / period)))
            useful += safe * interval
            if safe:
                chooser.observe(costs.cost_s, 0.0, costs.latency_s)
            passed += states * period
        began += gap
        chooser.failed(began)
    return useful / began


def poisson(chance: np.random.Generator, count: int, mean_s: float) -> Gaps:
    """Failures that know nothing of each other: what the model assumes."""
    return chance.exponential(mean_s, count)


def weibull(shape: float) -> Process:
    """Ageing: below 1 failures become rarer with the time since the last one, above 1 likelier."""
    return lambda chance, count, mean_s: mean_s * chance.weibull(shape, count) / math.gamma(1 + 1 / shape)


def bursts(chance: np.random.Generator, count: int, mean_s: float) -> Gaps:
    """Three failures in a row on average, 20 times nearer to each other than the mean; then a long time none."""
    first = chance.random(count) < 1 / 3
    return chance.exponential(np.where(first, 2.9 * mean_s, 0.05 * mean_s))


def changing(early: float, late: float) -> Process:
    """A rate that changes midway (by the count of failures): means of so many times ``mean_s``."""

    def gaps(chance: np.random.Generator, count: int, mean_s: float) -> Gaps:
        half = count // 2
        means = np.r_[np.full(half, early * mean_s), np.full(count - half, late * mean_s)]
        return chance.exponential(means)

    return gaps


PROCESSES: Mapping[str, Process] = {
    "poisson": poisson,
    "weibull-0.7": weibull(0.7),
    "weibull-3": weibull(3.0),
    "bursts": bursts,
    "ten-times-more": changing(3.0, 0.3),
    "ten-times-fewer": changing(0.3, 3.0),
}
MTBFS_S = (300.0, 3600.0, 6 * 3600.0, 3 * 86400.0)
COSTS = (Costs(0.005, 0.3), Costs(0.1, 2.0), Costs(2.0, 2.0), Costs(3.0, 40.0, 60.0), Costs(60.0, 120.0, 60.0))
"""Milliseconds to a minute: in memory with and without a stall, a synchronous one, and two to a store."""
