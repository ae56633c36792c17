"""Which Pods a running job gets, and which are let go: the roster of one pass. Pure.

Every Pod that does not count any more is replaced at once under an index that was never used; the old one need not be
gone for that, since the runtime's attempts fence it. Exactly one head is in force. There are never more Pods that count
than wanted; who goes when fewer are wanted is the controller's choice (nodes that have ``left``), and the operator's
only among Pods that no controller knows.

Pods that end, or are lost with their machine, soon after they were made would be made over and over: in each place the
first is replaced at once, the next ones after 10 s, doubling to 5 minutes. A Pod notes whose place it takes, and how
many ended soon there before it. Ended Pods are kept for ten minutes: those that have no successor yet, and for their
logs 20 others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from outlast import kube
from outlast_operator import podspec
from outlast_operator.heard import LEFT
from outlast_operator.machines import lost_since, why_lost
from outlast_operator.model import Action, Create, Delete, Happening
from outlast_operator.pods import Pod
from outlast_operator.sight import Sight

YOUNG_S = 60.0
"""A Pod that ended, or was lost with its machine, within so many seconds counts as one that cannot live."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 300.0
SETTLE_S = 5.0
"""A node Pod that ended by itself gets no successor for so long: at the job's end it may be quicker than the news."""
KEPT_S = 600.0
MOST_KEPT = 20
"""Ended Pods that have a successor, and are kept for their logs alone."""
MOST_TOLD = 5
"""Replacements of one pass that get an Event each."""


@dataclass(frozen=True)
class Roster:
    """``head``: the head Pod in force from now on, None: there is none; ``next_pod``: the next free index;
    ``again_at``: when a pause ends. What the API server refuses (``sight.trouble``) is asked for again, and not counted
    as made."""

    head: str | None
    next_pod: int
    creates: tuple[Action, ...] = ()
    deletes: tuple[Action, ...] = ()
    happenings: tuple[Happening, ...] = ()
    again_at: float | None = None


@dataclass
class _Draft:
    """A roster in the making."""

    next_pod: int
    creates: list[Action] = field(default_factory=list)
    deletes: list[Action] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def take_index(self) -> int:
        index, self.next_pod = self.next_pod, self.next_pod + 1
        return index


def next_index(sight: Sight) -> int:
    """The least index that was never used, as far as anybody knows."""
    return max(sight.old.next_pod, sight.highest_index + 1)


def full_roster(sight: Sight) -> Roster:
    """The Pods of a job that runs."""
    draft = _Draft(next_index(sight))
    begins = not sight.old.head
    head = _head(sight, draft)
    _nodes(sight, draft)
    _let_go(sight, draft, head)
    if begins and draft.creates:
        draft.happenings = [Happening("Normal", "PodsMade", _made_text(sight, draft))]
    draft.waits += [at for at in sight.silent.values() if at > sight.now]
    if sight.doubt_ends is not None:
        draft.waits.append(sight.doubt_ends)
    return _roster(sight, draft, head)


def head_alone(sight: Sight) -> Roster:
    """A head for the nodes that there are, which are left as they are; any other head goes."""
    draft = _Draft(next_index(sight))
    head = _head(sight, draft)
    others = [pod for pod in sight.pods if pod.role == kube.HEAD_ROLE and pod.name != head]
    draft.deletes = [_delete(pod) for pod in others if not pod.ended and not pod.deleting]
    return _roster(sight, draft, head)


def _roster(sight: Sight, draft: _Draft, head: str | None) -> Roster:
    return Roster(
        head,
        draft.next_pod if sight.trouble is None else next_index(sight),
        tuple(draft.creates),
        tuple(draft.deletes),
        () if sight.trouble is not None else tuple(draft.happenings),
        min(draft.waits, default=None),
    )


def empty_roster(sight: Sight) -> tuple[Action, ...]:
    """Every Pod is given back; what has ended is not kept either."""
    return tuple(Delete("Pod", pod.name, pod.uid) for pod in sight.pods if not pod.deleting)


# --- the head -------------------------------------------------------------------------------------------------------


def _head(sight: Sight, draft: _Draft) -> str | None:
    """The one in force stays; else one that an earlier pass made, and was cut short; else a new one."""
    if sight.head is not None:
        return sight.head.name
    heads = [pod for pod in sight.live if pod.role == kube.HEAD_ROLE]
    if heads:
        return heads[-1].name
    before = max((pod for pod in sight.pods if pod.role == kube.HEAD_ROLE), key=lambda pod: pod.index, default=None)
    pause = _paused_until(sight, before)
    if pause > sight.now:
        draft.waits.append(pause)
        return sight.old.head
    index = draft.take_index()
    name = kube.pod_name(sight.name, kube.HEAD_ROLE, index)
    draft.creates.append(Create(podspec.head_pod(sight.job, sight.settings, index, _notes(sight, before))))
    if sight.old.head:
        why = sight.lost.get(sight.old.head, "is gone")
        draft.happenings.append(Happening("Warning", "HeadReplaced", f"{name} replaces {sight.old.head}, which {why}"))
    return name if sight.trouble is None else sight.old.head


# --- the nodes ------------------------------------------------------------------------------------------------------


def _nodes(sight: Sight, draft: _Draft) -> None:
    live = [pod for pod in sight.live if pod.is_node]
    draft.deletes += [_delete(pod) for pod in surplus(sight, live)]
    settling = [pod.ended_at + SETTLE_S for pod in sight.nodes if _just_ended(sight, pod) and pod.ended_at is not None]
    draft.waits += settling
    missing = sight.wanted - len(live) - len(settling)
    if missing <= 0:
        return
    victims = _victims(sight, missing)
    for victim in [*victims, *[None] * (missing - len(victims))]:
        pause = _paused_until(sight, victim)
        if pause > sight.now:
            draft.waits.append(pause)
            continue
        index = draft.take_index()
        draft.creates.append(Create(podspec.node_pod(sight.job, sight.settings, index, _notes(sight, victim))))
        if victim is not None and len(draft.happenings) < MOST_TOLD:
            name = kube.pod_name(sight.name, kube.NODE_ROLE, index)
            text = f"{name} replaces {victim.name}, which {sight.lost[victim.name]}"
            draft.happenings.append(Happening("Warning", "PodReplaced", text))


def _just_ended(sight: Sight, pod: Pod) -> bool:
    if pod.phase != "Succeeded" or pod.deleting or pod.ended_at is None:
        return False
    return sight.now < pod.ended_at + SETTLE_S


def surplus(sight: Sight, live: Sequence[Pod]) -> list[Pod]:
    """The node Pods to delete because fewer are wanted, newest first; those the controller knows it must name."""
    excess = len(live) - sight.wanted
    if excess <= 0:
        return []
    if sight.heard is None:
        free = [] if sight.old.controller.identity else list(live)
    else:
        known = sight.heard.states
        free = [pod for pod in live if pod.name not in known]
    return sorted(free, key=lambda pod: pod.index, reverse=True)[:excess]


def _victims(sight: Sight, count: int) -> list[Pod]:
    """The lost node Pods that new ones are made for: those in whose places there are none yet, the last lost first."""
    left = {name for name, state in (sight.heard.states if sight.heard else {}).items() if state == LEFT}
    done = left | {pod.replaces for pod in sight.nodes}
    lost = [pod for pod in sight.nodes if pod.name in sight.lost and pod.name not in done]
    return sorted(lost, key=lambda pod: (pod.deleting, -(pod.ended_at or sight.now), -pod.index))[:count]


def _gone_at(sight: Sight, pod: Pod) -> float | None:
    """When ``pod`` ended, or was lost with its machine; None: in another way, or not at all."""
    if pod.ended_at is not None:
        return pod.ended_at
    machine = sight.machines.get(pod.machine)
    if machine is None or pod.name not in sight.lost or not why_lost(machine):
        return None
    since = lost_since(machine)
    return sight.now if since is None else max(pod.made_at, min(sight.now, since))


def _ended_soon(sight: Sight, pod: Pod | None) -> int:
    """How many in the place of ``pod`` have ended soon, one after the other up to it."""
    gone_at = None if pod is None else _gone_at(sight, pod)
    young = pod is not None and gone_at is not None and gone_at - pod.made_at < YOUNG_S
    return pod.ended_soon + 1 if pod is not None and young else 0


def _paused_until(sight: Sight, before: Pod | None) -> float:
    """When a Pod may be made in the place of ``before``; 0: at once."""
    pauses = _ended_soon(sight, before) - 1
    gone_at = None if before is None else _gone_at(sight, before)
    if gone_at is None or pauses < 1:
        return 0.0
    return gone_at + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(pauses - 1, 10))


def _notes(sight: Sight, before: Pod | None) -> dict[str, str]:
    """The annotations of a Pod that is made in the place of ``before``."""
    if before is None:
        return {}
    count = _ended_soon(sight, before)
    return {kube.REPLACES_ANNOTATION: before.name, **({kube.ENDED_SOON_ANNOTATION: str(count)} if count else {})}


# --- who goes -------------------------------------------------------------------------------------------------------


def _let_go(sight: Sight, draft: _Draft, head: str | None) -> None:
    """Pods that do not count are deleted, with their own grace, so that they go when their machine returns."""
    left = {name for name, state in (sight.heard.states if sight.heard else {}).items() if state == LEFT}
    ended = [pod for pod in sight.pods if pod.ended and not pod.deleting]
    followed = {pod.replaces for pod in sight.pods}
    kept = sorted(ended, key=lambda pod: (pod.name in followed, -(pod.ended_at or 0.0)))
    kept = kept[: sum(pod.name not in followed for pod in ended) + MOST_KEPT]
    for pod in sight.pods:
        if pod.deleting or pod.name == head:
            continue
        if pod.ended:
            until = (pod.ended_at or 0.0) + KEPT_S
            if pod.name in left or pod not in kept or until <= sight.now:
                draft.deletes.append(_delete(pod))
            else:
                draft.waits.append(until)
        elif pod.name in sight.lost or not pod.is_node:
            draft.deletes.append(_delete(pod))


def _delete(pod: Pod) -> Delete:
    return Delete("Pod", pod.name, pod.uid)


def _made_text(sight: Sight, draft: _Draft) -> str:
    names = [action.object["metadata"]["name"] for action in draft.creates if isinstance(action, Create)]
    heads = [name for name in names if name.startswith(f"{sight.name}-{kube.HEAD_ROLE}-")]
    return f"made {', '.join(heads) or 'no head'} and {len(names) - len(heads)} node Pods"
