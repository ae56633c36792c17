"""How often does this job fail? A prior from the literature, updated by what happens and by what does not. Pure.

Times between failures are taken for exponential with a rate that may change. The estimate is a mixture of experts, each
a Gamma posterior of the rate (``shape`` failures in ``exposure`` seconds, so that the time to the next failure is
Lomax distributed): one for each combination of

- where it starts: powers of ten around what is typical, since a first run of a new script, a busy cluster or a
  test with injected faults fails a thousand times as often as a machine that trains undisturbed;
- how many failures it remembers: few follows a change, many averages well. Forgetting is counted in failures, not in
  seconds (West and Harrison, Bayesian Forecasting and Dynamic Models, 1997, "discount factors"), so that one set of
  experts serves rates of one an hour and one a month alike.

Experts are weighted by how well they foretold the times between failures, and silence speaks against those that
expected a failure by now. A small part of the weight is handed out anew after every failure (Herbster and Warmuth,
Tracking the Best Expert, 1998), so that an expert that was wrong for long is heard again when the rate changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

SPREAD: Mapping[float, float] = {0.1: 0.1, 1.0: 0.4, 10.0: 0.25, 100.0: 0.15, 1e3: 0.07, 1e4: 0.03}
"""Multiples of the typical rate -> how likely they are beforehand. The mean is far above the middle on purpose: a job
that turns out to be quiet has lost little by being careful at first."""
MEMORIES: Sequence[float] = (4.0, 16.0, 64.0, math.inf)
"""Failures that an expert remembers."""
SHARED = 0.02
"""The part of the weight that is handed out anew after each failure."""
SHORTEST_GAP_S = 1e-3
"""Failures at the same moment count as so far apart, so that their rate stays finite."""


class FailureRate:
    """Failures a second, from a prior and what was seen. Time begins with the first call that says what time it is.

    ``typical``: the rate in the middle of the prior, in failures a second; ``weight``: how many failures the prior
    counts for; ``spread``: as SPREAD, ``{1.0: 1.0}`` for a job whose rate is known.
    """

    def __init__(self, typical: float, weight: float = 1.0, spread: Mapping[float, float] = SPREAD) -> None:
        if not (0 < typical < math.inf and 0 < weight < math.inf):
            raise ValueError(f"a rate and its weight must be positive and finite, not {typical} and {weight}")
        pairs = [(multiple, share, memory) for multiple, share in spread.items() for memory in MEMORIES]
        total = sum(share for _, share, _ in pairs)
        self._first = [share / total for _, share, _ in pairs]
        self._weights = list(self._first)
        self._shapes = [weight] * len(pairs)
        self._exposures = [weight / (typical * multiple) for multiple, _, _ in pairs]
        self._keep = [1.0 - 1.0 / memory for _, _, memory in pairs]
        self._last: float | None = None
        self._began: float | None = None
        self.count = 0

    def failed(self, now: float) -> None:
        """The job failed at ``now``: once for all that is lost together and costs one restart."""
        gap = max(SHORTEST_GAP_S, self._silence(now))
        densities = [
            math.log(shape / (exposure + gap)) - shape * math.log1p(gap / exposure)
            for shape, exposure in zip(self._shapes, self._exposures, strict=True)
        ]
        self._reweigh(densities)
        self._weights = [
            (1.0 - SHARED) * weight + SHARED * first for weight, first in zip(self._weights, self._first, strict=True)
        ]
        self._shapes = [keep * shape + 1.0 for keep, shape in zip(self._keep, self._shapes, strict=True)]
        self._exposures = [keep * exposure + gap for keep, exposure in zip(self._keep, self._exposures, strict=True)]
        self._last = now
        self.count += 1

    def rate(self, now: float) -> float:
        """Failures a second to be expected at ``now``."""
        gap = self._silence(now)
        total = mean = 0.0
        for weight, shape, exposure in zip(self._weights, self._shapes, self._exposures, strict=True):
            surviving = weight * (exposure / (exposure + gap)) ** shape
            total += surviving
            mean += surviving * shape / (exposure + gap)
        return mean / total if total > 0 else 1.0 / gap

    def paused(self, seconds: float) -> None:
        """So many of the seconds since the last failure do not count: there was nothing that could fail."""
        if self._last is not None and self._began is not None:
            self._last += max(0.0, seconds)
            self._began += max(0.0, seconds)

    def to_json(self, now: float) -> dict[str, float | int]:
        """For /status: failures seen, seconds watched, and the rate as failures a day."""
        rate = self.rate(now)
        watched = 0.0 if self._began is None else max(0.0, now - self._began)
        return {"failures": self.count, "watched_s": round(watched, 1), "per_day": round(rate * 86400, 6)}

    def _silence(self, now: float) -> float:
        if self._last is None:
            self._last = self._began = now
        return max(0.0, now - self._last)

    def _reweigh(self, logs: Sequence[float]) -> None:
        """Multiply the weights by exp(logs); the largest is taken out first, so that none but the hopeless vanish."""
        top = max(logs)
        products = [weight * math.exp(log - top) for weight, log in zip(self._weights, logs, strict=True)]
        total = sum(products)
        self._weights = [product / total for product in products]
