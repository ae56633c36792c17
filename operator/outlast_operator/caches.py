"""All caches together: what a change means for which job, and what one job looks like.

::

    informers --put, remove--> Store (one a kind) --changed--> the job's key --> work queue
                                    '--observe(key)--> what a pass reads
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from outlast.api import Metadata, TrainingJob
from outlast.errors import SpecError
from outlast.jobstatus import TrainingJobStatus
from outlast.kube import JOB_LABEL, TOKEN_KEY, secret_name
from outlast.resource import Part, explain, fields_of
from outlast_operator.kinds import CACHED, JOB, MACHINE, OWNED, POD, SECRET, Kind
from outlast_operator.model import Key, Object, Observed
from outlast_operator.pods import owned_by, owner_uid
from outlast_operator.store import Store, key_of

BY_JOB, BY_MACHINE = "job", "machine"


def job_of(obj: Object) -> Key | None:
    """The job that an object of the operator's bears the label of."""
    name = (obj["metadata"].get("labels") or {}).get(JOB_LABEL)
    return Key(obj["metadata"].get("namespace", ""), name) if name else None


def machine_of(pod: Object) -> str | None:
    """The Node that a Pod was placed on."""
    name = pod.get("spec", {}).get("nodeName")
    return str(name) if name else None


class Caches:
    """``touched`` is told of each job whose inputs changed, ``renewed`` of each whose spec did."""

    def __init__(self, touched: Callable[[Key], None], renewed: Callable[[Key], None]) -> None:
        self._touched, self._renewed = touched, renewed
        self.stores: Mapping[Kind, Store] = {kind: Store(_indexers(kind)) for kind in CACHED}
        self._generations: dict[Key, tuple[str, int]] = {}

    def changed(self, kind: Kind, obj: Object) -> None:
        """An informer's store has changed in ``obj``."""
        if kind is JOB:
            self._job_changed(obj)
        elif kind is MACHINE:
            for pod in self.stores[POD].by(BY_MACHINE, obj["metadata"]["name"]):
                self._touch(job_of(pod))
        else:
            self._touch(job_of(obj))

    def jobs(self) -> list[Object]:
        """All TrainingJobs."""
        return self.stores[JOB].all()

    def job(self, key: Key) -> Object | None:
        """One TrainingJob."""
        return self.stores[JOB].get(key)

    def has_pod(self, namespace: str) -> Callable[[str], bool]:
        """Whether the cache holds a Pod of that name."""
        return lambda name: self.stores[POD].get(Key(namespace, name)) is not None

    def pod(self, namespace: str, name: str) -> Object | None:
        """One Pod."""
        return self.stores[POD].get(Key(namespace, name))

    def token(self, raw: Object) -> str:
        """The job's token out of its Secret, "" while there is none."""
        namespace, name = raw["metadata"]["namespace"], raw["metadata"]["name"]
        secret = self.stores[SECRET].get(Key(namespace, secret_name(name)))
        if secret is None or owner_uid(secret) != raw["metadata"]["uid"]:
            return ""
        try:
            return base64.b64decode(secret.get("data", {}).get(TOKEN_KEY, ""), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            return ""

    def owns(self, raw: Object, kind: Kind, name: str) -> bool:
        """Whether the cache holds an object of that name that belongs to the job."""
        obj = self.stores[kind].get(Key(raw["metadata"]["namespace"], name))
        return obj is not None and owner_uid(obj) == raw["metadata"]["uid"]

    def observe(self, key: Key) -> Observed | None:
        """What one pass reads, without what the controller says; None when there is no such job."""
        raw = self.job(key)
        if raw is None:
            return None
        uid = raw["metadata"]["uid"]
        pods = list(self.stores[POD].by(BY_JOB, key))
        owned = {
            (kind.name, obj["metadata"]["name"]): obj
            for kind in OWNED
            for obj in owned_by(self.stores[kind].by(BY_JOB, key), uid)
        }
        job, invalid = parse(raw)
        return Observed(key, raw, job, invalid, pods, dict(self._machines(owned_by(pods, uid))), owned)

    def _machines(self, pods: list[Object]) -> Iterator[tuple[str, Object]]:
        for pod in pods:
            name = machine_of(pod)
            machine = self.stores[MACHINE].get(Key("", name)) if name else None
            if name and machine is not None:
                yield name, machine

    def _job_changed(self, obj: Object) -> None:
        key, metadata = key_of(obj), obj["metadata"]
        known, now = self._generations.get(key), (metadata["uid"], metadata.get("generation", 0))
        if self.job(key) is None:
            self._generations.pop(key, None)
        else:
            self._generations[key] = now
        if known == now:
            self._touched(key)
        else:
            self._renewed(key)

    def _touch(self, key: Key | None) -> None:
        if key is not None:
            self._touched(key)


def _indexers(kind: Kind) -> dict[str, Callable[[Object], Any]]:
    if kind is POD:
        return {BY_JOB: job_of, BY_MACHINE: machine_of}
    return {BY_JOB: job_of} if kind in OWNED else {}


def parse(raw: Object) -> tuple[TrainingJob | None, str]:
    """The TrainingJob in a cached object, or why it cannot be one.

    What a newer version's API server adds to metadata, and what a newer operator wrote into the status, is let go.
    """
    tree: dict[str, Any] = {"apiVersion": raw["apiVersion"], "kind": raw["kind"], "spec": raw.get("spec", {})}
    known = fields_of(Metadata)
    tree["metadata"] = {name: value for name, value in raw["metadata"].items() if name in known}
    if raw.get("status"):
        tree["status"] = _known(TrainingJobStatus, raw["status"])
    try:
        return TrainingJob.from_yaml_tree(tree), ""
    except ValidationError as error:
        return None, str(SpecError(explain(error, TrainingJob)))
    except SpecError as error:
        return None, str(error)


def _known(part: type[Part], tree: Any) -> Any:
    """``tree`` without the fields that ``part`` and the parts in it do not have."""
    if isinstance(tree, list):
        return [_known(part, item) for item in tree]
    if not isinstance(tree, Mapping):
        return tree
    fields = fields_of(part)
    return {
        name: value if (inner := fields[name]) is None else _known(inner, value)
        for name, value in tree.items()
        if name in fields
    }
