"""Containers' output as kubelets keep it: read once, or followed from Pod to Pod."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.errors import RequestError
from outlast_operator.template import main_index
from trainctl.cluster.refusals import (
    Absent,
    ClusterError,
    Forbidden,
    Invalid,
    Unauthorized,
    Unreachable,
    Unreadable,
)
from trainctl.cluster.resources import Away, JobRef, Object, core_path, role_of
from trainctl.jobview import ENDED, phase_of
from trainctl.merging import Ended, Merged
from trainctl.ranklines import instant, split_time
from trainctl.watching import Latest, live_statuses

AGAIN_S = 1.0
"""When the log of a container that runs is asked for again after it broke off."""
LAST_WORDS_S = 10.0
"""How long output is still waited for when the job has ended."""
MOST_STREAMS = 100
"""Pods that are followed at a time: each takes a connection and a thread."""


@dataclass(frozen=True)
class Container:
    """The training container of a Pod: which one it is (another after each restart), and how it is."""

    pod: str
    name: str
    id: str
    started: bool
    running: bool
    restarts: int


def container_of(pod: Object) -> Container:
    """The container whose output is the ranks', or the head's (pure)."""
    containers = pod["spec"]["containers"]
    name = containers[main_index(containers)]["name"]
    states = (pod.get("status") or {}).get("containerStatuses") or ()
    told: Mapping[str, Any] = next((state for state in states if state["name"] == name), {})
    state = told.get("state") or {}
    running = "running" in state
    return Container(
        pod=pod["metadata"]["name"],
        name=name,
        id=str(told.get("containerID") or ""),
        started=running or "terminated" in state,
        running=running,
        restarts=int(told.get("restartCount") or 0),
    )


def pod_lines(
    job: JobRef,
    container: Container,
    *,
    previous: bool = False,
    follow: bool = False,
    since: Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """A container's output, each line with its time before it. Nothing where it has not started or is gone.

    ``previous``: of the container before its last restart; ``since``: sinceSeconds or sinceTime, as the API has them.
    Raises Unreadable when it is this Pod alone that cannot be asked.
    """
    query = {
        "container": container.name,
        "timestamps": "true",
        "follow": "true" if follow else None,
        "previous": "true" if previous else None,
        **(since or {}),
    }
    path = core_path(job.namespace, "pods", container.pod, "log")
    try:
        yield from job.cluster.lines(path, query, quiet_s=None if follow else 60.0)
    except (Absent, Invalid):
        return
    except (Unreachable, Unauthorized, Forbidden):
        raise
    except ClusterError as error:
        raise Unreadable(f"Pod {container.pod} cannot be read: {error}") from error


def whole_output(job: JobRef, container: Container, since: Mapping[str, Any] | None) -> Iterator[str]:
    """All of a Pod's output that its kubelet still has: of the container before the last restart too."""
    if container.restarts:
        yield from pod_lines(job, container, previous=True, since=since)
    if container.started:
        yield from pod_lines(job, container, since=since)


class Following:
    """The output of whichever Pods are wanted, as it comes, until the job has ended.

    ``choose`` names the wanted ones of some Pods' names, given the controller's status where there is one;
    ``seen``: the time of the last line of a Pod that is known already.
    """

    def __init__(
        self,
        job: JobRef,
        role: str,
        choose: Callable[[Sequence[str], Mapping[str, Any] | None], Sequence[str]],
        seen: Mapping[str, str],
        *,
        ask_controller: bool,
    ) -> None:
        self._job, self._role, self._choose = job, role, choose
        self._seen, self._begun = dict(seen), dict[str, str]()
        self._merged, self._latest = Merged(), Latest()
        self._containers: dict[str, Container] | None = None
        self._live: Mapping[str, Any] | None = None
        self._told = not ask_controller
        """Whether it is known who has which seat, or that nobody can tell: before, no Pod is chosen."""
        self._finished: dict[str, str] = {}
        self._again: dict[str, float] = {}
        self._away = Away(pause=_do_not_wait)
        """What refuses one stream after it has given another: an API server that starts."""
        self._ended_at: float | None = None
        self._merged.add("resource", job.watch_itself())
        self._merged.add("pods", job.watch_pods())
        if ask_controller:
            self._merged.add("live", live_statuses(job, self._latest))

    def lines(self) -> Iterator[tuple[str, str]]:
        """(Pod, line with its time), each once."""
        while not self._over():
            arrived = self._merged.next(AGAIN_S)
            if arrived is not None:
                yield from self._take(*arrived)
            self._start_streams()

    def _take(self, source: str, item: Any) -> Iterator[tuple[str, str]]:
        if isinstance(item, Ended):
            self._source_ended(source, item)
        elif source == "resource":
            self._latest.put(item)
            if phase_of(item) in ENDED and self._ended_at is None:
                self._ended_at = time.monotonic()
        elif source == "pods":
            mine = [container_of(pod) for pod in item if role_of(pod) == self._role]
            self._containers = {container.pod: container for container in mine}
        elif source == "live":
            self._live, self._told = item[0] or self._live, True
        else:
            self._away.over()
            if self._is_new(source, item):
                yield source, item

    def _is_new(self, pod: str, line: str) -> bool:
        """Whether the line was not read already, before the stream under way began."""
        when, _ = split_time(line)
        begun = self._begun.get(pod)
        if when and begun and instant(when) <= instant(begun):
            return False
        self._seen[pod] = when or self._seen.get(pod, "")
        return True

    def _source_ended(self, source: str, item: Ended) -> None:
        if source in ("resource", "pods"):
            raise item.error or Absent(f'the TrainingJob "{self._job.name}" is gone')
        if source == "live":
            self._told = True
            return
        if isinstance(item.error, (Unauthorized, Forbidden)):
            self._away.wait_or_raise(item.error)
            self._again[source] = time.monotonic() + AGAIN_S
            return
        if item.error is None:
            self._away.over()
        container = (self._containers or {}).get(source)
        if container is None or not container.running:
            self._finished[source] = container.id if container else "gone"
        self._again[source] = time.monotonic() + AGAIN_S

    def _start_streams(self) -> None:
        """Begin to read what is wanted and not read yet; a container that restarted is another one."""
        now = time.monotonic()
        for container in self._wanted():
            pod = container.pod
            if pod in self._merged.open or not container.started or self._finished.get(pod) == container.id:
                continue
            if now >= self._again.get(pod, 0.0):
                self._begun[pod] = self._seen.get(pod, "")
                since = {"sinceTime": _whole_second(self._begun[pod])} if self._begun[pod] else {}
                self._merged.add(pod, pod_lines(self._job, container, follow=True, since=since))

    def _wanted(self) -> Sequence[Container]:
        """The Pods to read. Raises RequestError when they are too many to be followed."""
        if not self._told or self._containers is None:
            return ()
        wanted = self._choose(sorted(self._containers), self._live)
        if len(wanted) > MOST_STREAMS:
            raise RequestError(
                f"{len(wanted)} Pods would have to be followed, and {MOST_STREAMS} can be: name a rank, or leave out "
                "--follow"
            )
        return [self._containers[pod] for pod in wanted]

    def _over(self) -> bool:
        if self._ended_at is None or not self._told or self._containers is None:
            return False
        reading = self._merged.open - {"resource", "pods", "live"}
        unread = [one for one in self._wanted() if one.started and self._finished.get(one.pod) != one.id]
        return time.monotonic() - self._ended_at > LAST_WORDS_S or not (reading or unread)


def _do_not_wait(seconds: float) -> None:
    """Other Pods' lines come meanwhile: each stream is asked again in its time."""


def _whole_second(time: str) -> str:
    """The API takes no fractions: what comes twice is told apart by its own time."""
    second, _ = instant(time)
    return f"{second}Z"
