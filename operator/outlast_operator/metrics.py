"""The operator's figures for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from outlast_operator.model import Object
from outlast_operator.refusals import Verb

PREFIX = "outlast_operator"
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


Gauges = Mapping[str, tuple[str, Callable[[], float]]]
"""What each shows, and how it is read, by name."""


class Metrics:
    """What is counted; ``gauges`` are read when somebody asks."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(f"{PREFIX}_reconciles", "Passes over jobs.", registry=self.registry)
        self.errors = Counter(f"{PREFIX}_errors", "Passes that failed, by kind.", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            f"{PREFIX}_reconcile_seconds", "How long passes took.", buckets=_SECONDS, registry=self.registry
        )
        self.api_calls = Counter(
            f"{PREFIX}_api_calls",
            "Requests to the API server.",
            ["verb", "resource", "status"],
            registry=self.registry,
        )
        self.polls = Counter(
            f"{PREFIX}_controller_polls", "Questions to jobs' controllers.", ["result"], registry=self.registry
        )
        self.events_dropped = Counter(f"{PREFIX}_events_dropped", "Events not written.", registry=self.registry)

    def called(self, verb: Verb, resource: str, status: int) -> None:
        """A request to the API server was answered; 0: was not."""
        self.api_calls.labels(verb, resource, str(status)).inc()

    def polled(self, result: str) -> None:
        """A controller answered or did not."""
        self.polls.labels(result).inc()

    def read_from(self, gauges: Gauges, jobs: Callable[[], list[Object]]) -> None:
        """Show these, and jobs by phase."""
        self.registry.register(_Gauges(gauges, jobs))


class _Gauges(Collector):
    def __init__(self, gauges: Gauges, jobs: Callable[[], list[Object]]) -> None:
        self._gauges, self._jobs = gauges, jobs

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, (text, read) in self._gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=read())
        phases = GaugeMetricFamily(f"{PREFIX}_jobs", "TrainingJobs, by phase.", labels=["phase"])
        tally = Tally((job.get("status") or {}).get("phase", "New") for job in self._jobs())
        for phase, count in sorted(tally.items()):
            phases.add_metric([phase], count)
        yield phases
