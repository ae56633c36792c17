"""What a Pod object says, as values: where it is, how it is, and what keeps it from starting. Pure.

An obstacle's ``reason`` is Kubernetes' own word, one for each state that repeats: a container that cannot pull its
image goes back and forth between ErrImagePull and ImagePullBackOff, one that crashes between Error and
CrashLoopBackOff; a condition that followed them would change every few seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from outlast import kube
from outlast_operator.model import Object
from outlast_operator.timestamps import read_or_none

IMAGE_PULL = "ImagePullBackOff"
_STEADY: Mapping[str, str] = {"ErrImagePull": IMAGE_PULL}
_HOPELESS = frozenset(
    {
        IMAGE_PULL,
        "ErrImageNeverPull",
        "InvalidImageName",
        "ImageInspectError",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "CrashLoopBackOff",
    }
)
"""Reasons of waiting containers that somebody must mend; others (ContainerCreating) pass."""
OUT_OF_MEMORY, CRASHING = "OOMKilled", "CrashLoopBackOff"
UNSCHEDULABLE = "Unschedulable"
_CRASHES = 2
"""Restarts after which a container that is not ready counts as crashing, whatever it does at the moment."""
SETTLED_S = 300.0
"""What a container that has run so long died of before keeps nothing from starting: the longest pause between two
restarts of one that crashes."""


@dataclass(frozen=True)
class Obstacle:
    """Why a Pod does not start. ``passes``: waiting may help."""

    pod: str
    reason: str
    message: str
    passes: bool = False


@dataclass(frozen=True)
class Pod:
    """``index`` -1: a name that is none of ours. ``made_at``: by the API server's clock; ``ended_at``: when it Failed
    or Succeeded, as its machine's clock says, but not in the future; ``why``: reason and message of its phase;
    ``obstacles``: why it is not ready; ``replaces``, ``ended_soon``: see ``outlast.kube``.
    """

    name: str
    uid: str
    role: str
    index: int
    phase: str
    deleting: bool
    machine: str
    ready: bool
    made_at: float
    ended_at: float | None
    why: str
    obstacles: tuple[Obstacle, ...]
    replaces: str
    ended_soon: int

    @property
    def ended(self) -> bool:
        """Whether no container of it will run again."""
        return self.phase in ("Failed", "Succeeded")

    @property
    def is_node(self) -> bool:
        return self.role == kube.NODE_ROLE


def pod_of(obj: Object, now: float) -> Pod:
    """``obj`` as it is read here; ``now``: wall seconds."""
    metadata, status = obj["metadata"], obj.get("status", {})
    name, phase = metadata["name"], status.get("phase") or "Pending"
    noted = metadata.get("annotations") or {}
    times = str(noted.get(kube.ENDED_SOON_ANNOTATION, ""))
    made_at = read_or_none(metadata.get("creationTimestamp")) or 0.0
    return Pod(
        name=name,
        uid=metadata.get("uid", ""),
        role=(metadata.get("labels") or {}).get(kube.ROLE_LABEL, ""),
        index=index_of(name),
        phase=phase,
        deleting=bool(metadata.get("deletionTimestamp")),
        machine=obj.get("spec", {}).get("nodeName") or "",
        ready=_condition(status, "Ready").get("status") == "True",
        made_at=made_at,
        ended_at=min(now, _ended_at(status, made_at)) if phase in ("Failed", "Succeeded") else None,
        why=": ".join(text for text in (status.get("reason"), status.get("message")) if text),
        obstacles=() if phase in ("Failed", "Succeeded") else tuple(_obstacles(name, obj, now)),
        replaces=str(noted.get(kube.REPLACES_ANNOTATION, "")),
        ended_soon=int(times) if times.isascii() and times.isdigit() else 0,
    )


def index_of(name: str) -> int:
    """The index in a Pod's name; -1 when it has none."""
    try:
        return kube.pod_index(name)
    except ValueError:
        return -1


def owner_uid(obj: Object) -> str:
    """Who controls the object; "" when nobody does."""
    owners = obj["metadata"].get("ownerReferences") or ()
    return next((owner.get("uid", "") for owner in owners if owner.get("controller")), "")


def owned_by(objects: Iterable[Object], uid: str) -> list[Object]:
    """Those of the job with this uid, and not of an earlier one of its name."""
    return [obj for obj in objects if owner_uid(obj) == uid]


def summed_up(obstacles: Iterable[Obstacle]) -> Obstacle | None:
    """One for all: the first that waiting cannot mend, else the first; its message counts the others of its kind.

    What the API server refused is of no Pod (``pod`` is ""), and comes first.
    """
    found = sorted(obstacles, key=lambda obstacle: (obstacle.passes, obstacle.pod != "", index_of(obstacle.pod)))
    if not found or not found[0].pod:
        return found[0] if found else None
    first = found[0]
    alike = len({obstacle.pod for obstacle in found if obstacle.reason == first.reason}) - 1
    more = f" and {alike} more" if alike else ""
    return Obstacle(first.pod, first.reason, f"{first.pod}{more}: {first.message}", first.passes)


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    conditions = status.get("conditions") or ()
    return next((condition for condition in conditions if condition.get("type") == kind), {})


def _containers(status: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from status.get("initContainerStatuses") or ()
    yield from status.get("containerStatuses") or ()


def _ended_at(status: Mapping[str, Any], made_at: float) -> float:
    ends = [(container.get("state") or {}).get("terminated") or {} for container in _containers(status)]
    times = [read_or_none(end.get("finishedAt")) for end in ends]
    known = [time for time in times if time is not None]
    return max(known) if known else read_or_none(status.get("startTime")) or made_at


def _obstacles(pod: str, obj: Object, now: float) -> Iterator[Obstacle]:
    status = obj.get("status", {})
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        reason = scheduled.get("reason") or UNSCHEDULABLE
        yield Obstacle(pod, reason, scheduled.get("message") or "no machine takes it", passes=True)
    limits = _memory_limits(obj)
    for container in _containers(status):
        found = _container_obstacle(pod, container, limits.get(container.get("name", ""), ""), now)
        if found is not None:
            yield found


def _memory_limits(obj: Object) -> dict[str, str]:
    containers = obj.get("spec", {}).get("containers") or ()
    limits = {
        one.get("name", ""): ((one.get("resources") or {}).get("limits") or {}).get("memory") for one in containers
    }
    return {name: str(limit) for name, limit in limits.items() if limit}


def _settled(container: Mapping[str, Any], now: float) -> bool:
    """Whether it is ready, or has run for a while."""
    running = (container.get("state") or {}).get("running") or {}
    since = read_or_none(running.get("startedAt"))
    return bool(container.get("ready")) or (since is not None and now - since >= SETTLED_S)


def _container_obstacle(pod: str, container: Mapping[str, Any], memory_limit: str, now: float) -> Obstacle | None:
    if _settled(container, now):
        return None
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    last = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    name, reason = container.get("name", ""), waiting.get("reason", "")
    reason = _STEADY.get(reason, reason)
    if last.get("reason") == OUT_OF_MEMORY:
        limit = f" ({memory_limit})" if memory_limit else ""
        text = f"container {name} was killed for want of memory: raise its memory limit{limit}, or lower what it uses"
        return Obstacle(pod, OUT_OF_MEMORY, text)
    crashing = bool(last) and last.get("exitCode") != 0 and container.get("restartCount", 0) >= _CRASHES
    if reason == CRASHING or crashing:
        return Obstacle(pod, CRASHING, _how_it_ended(name, container, last))
    if reason in _HOPELESS:
        return Obstacle(pod, reason, f"container {name}: {waiting.get('message') or reason}")
    return None


def _how_it_ended(name: str, container: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    code, times = last.get("exitCode"), container.get("restartCount", 0)
    said = (last.get("message") or "").strip()
    how = f"ended with exit code {code}" if code is not None else "ends again and again"
    return f"container {name} {how}, {times} restarts{f': {said}' if said else ''}; `kubectl logs --previous` has more"
