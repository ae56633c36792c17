"""What a job's controller is told. Pure; each is repeated by later passes until the controller's status shows it."""

from __future__ import annotations

from collections.abc import Iterator

from outlast_operator.heard import LEFT, LOST
from outlast_operator.machines import domain_of
from outlast_operator.model import Call
from outlast_operator.sight import Sight

MOST_FORGOTTEN = 32
"""Nodes that one pass has the controller forget."""


def calls(sight: Sight) -> tuple[Call, ...]:
    """Everything to tell a controller that answers."""
    if not sight.answering:
        return ()
    return (*_domains(sight), *_size(sight), *_forgotten(sight))


def _domains(sight: Sight) -> Iterator[Call]:
    """The failure domains of machines whose nodes wait to be placed."""
    unplaced = sight.heard.unplaced if sight.heard is not None else ()
    label = sight.job.spec.workers.failure_domain
    known = {name: domain_of(sight.machines[name], label) for name in unplaced if name in sight.machines}
    if known:
        yield Call("PUT", "/domains", known)


def _size(sight: Sight) -> Iterator[Call]:
    """The numbers of the resource, when the controller has others, or has to name who leaves."""
    if sight.heard is None or not sight.heard.workers:
        return
    told, workers = sight.heard.workers, sight.job.spec.workers
    wanted = {"wanted": workers.replicas, "least": workers.least}
    if "wanted_spares" in told:
        wanted["wanted_spares"] = workers.spares
    differs = any(sight.heard.count(told, name) != number for name, number in wanted.items())
    states = sight.heard.states
    live = [pod for pod in sight.live if pod.is_node and pod.name in states]
    staying = [pod for pod in live if states[pod.name] != "leaving"]
    if differs or len(staying) > workers.replicas + workers.spares:
        body = {"replicas": workers.replicas, "minReplicas": workers.min_replicas, "spares": workers.spares}
        yield Call("POST", "/resize", body)


def _forgotten(sight: Sight) -> Iterator[Call]:
    """Nodes that are no more, and whose Pods are gone: they cannot come back."""
    there = {pod.name for pod in sight.pods}
    states = sight.heard.states if sight.heard is not None else {}
    gone = sorted(name for name, state in states.items() if state in (LEFT, LOST) and name not in there)
    for name in gone[:MOST_FORGOTTEN]:
        yield Call("DELETE", f"/nodes/{name}")
