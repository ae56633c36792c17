"""The objects beside a job's Pods: those that are lacking, or not as they should be. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from outlast import kube
from outlast_operator import objects
from outlast_operator.model import Action, Apply, Create, Object
from outlast_operator.sight import Sight


def lacking(sight: Sight, head: str | None) -> Iterator[Action]:
    """What makes them so; the Secret first: Pods cannot start without it. ``head``: the head Pod in force from now on,
    to which the Service leads."""
    job = sight.job
    there = sight.owned.get(("Secret", kube.secret_name(sight.name)))
    token = objects.kept_token(there)
    secret = objects.secret(job, token or sight.new_token)
    if there is None:
        # Not applied: if the cache were behind, the token of Pods that run would be overwritten.
        yield Create(secret)
    elif not objects.agrees(secret, there):
        yield Apply(secret)
    wanted: list[Object] = [objects.network_policy(job, sight.settings), objects.disruption_budget(job)]
    if head is not None:
        wanted.append(objects.service(job, head))
    for one in wanted:
        if not objects.agrees(one, sight.owned.get((one["kind"], one["metadata"]["name"]))):
            yield Apply(one)
