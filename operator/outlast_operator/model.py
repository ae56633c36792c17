"""What the operator sees of one job, and what it decides to do: values only.

::

    informers, controller --> Observed --plan.plan(observed, now)--> Plan --apply--> API server, controller

``now`` is wall time in seconds since the epoch everywhere; what Kubernetes writes as RFC 3339 is parsed at the edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from outlast.api import TrainingJob
from outlast.jobstatus import TrainingJobStatus

Object = Mapping[str, Any]
"""A Kubernetes object, as the API server's JSON has it."""


@dataclass(frozen=True)
class Key:
    """Which job."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Settings:
    """The operator's own. ``training_image``: for jobs whose template names none; ``operator_namespace`` and
    ``operator_labels``: of the Pods that NetworkPolicies let ask the controller.
    """

    version: str
    training_image: str
    image_pull_policy: str = "IfNotPresent"
    operator_namespace: str = ""
    operator_labels: Mapping[str, str] = field(default_factory=dict)
    progress_every_s: float = 30.0
    suspend_patience_s: float = 60.0


@dataclass(frozen=True)
class Controller:
    """What the job's controller said last. ``status`` None: nothing yet, or of a head Pod that is no longer in force;
    ``heard_at``: when it answered last; ``failing_since``: since when it has not answered, None while it does;
    ``trouble``: why.
    """

    pod: str = ""
    status: Mapping[str, Any] | None = None
    heard_at: float | None = None
    failing_since: float | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Trouble:
    """What the API server refused in the last pass and will go on refusing until somebody changes something: an invalid
    Pod template, a quota that is used up, a right that is missing, a name that somebody else has.

    ``reason`` is one word in CamelCase (``InvalidPod``, ``QuotaExceeded``, ``Forbidden``, ``NameTaken``, ``Refused``),
    ``message`` names the object and has the API server's own words, ``since`` is when it was refused first.
    """

    reason: str
    message: str
    since: float


@dataclass(frozen=True)
class Observed:
    """One pass's input. ``job`` is the resource as it is in the cache (``raw``), parsed, with its status; ``invalid``
    says why it cannot be parsed (then ``job`` is None). ``pods`` are all that bear the job's name: terminating ones
    too, and those of an earlier job of that name; ``machines`` the cluster's Nodes by name, as far as they carry Pods
    of the job. ``owned``: the job's other objects by (kind, name). ``trouble``: why actions of the last pass could not
    be done; the plan has them done again all the same (with back-off), and its status says why there are none yet.
    ``objection``: why the controller would not do what it was asked in the last pass. Objects come pruned
    (``pruning``).

    What earlier passes wrote must be seen here: a cache that is behind the operator's own writes would have Pods made
    and Events told twice. ``new_token``: a random text of 32 characters or more, drawn for this pass; it becomes the
    job's token if it has none.
    """

    key: Key
    raw: Object
    job: TrainingJob | None
    invalid: str
    pods: Sequence[Object]
    machines: Mapping[str, Object]
    owned: Mapping[tuple[str, str], Object]
    controller: Controller = Controller()
    trouble: Trouble | None = None
    objection: str = ""
    new_token: str = ""


# --- what is decided ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Create:
    """Make an object that bears its own name; that it exists already means that the cache is behind."""

    object: Object


@dataclass(frozen=True)
class Apply:
    """Server-side apply of an object that the operator owns wholly (Service, Secret, NetworkPolicy, budget)."""

    object: Object


@dataclass(frozen=True)
class Delete:
    """Delete an object, if it is still this one (``uid`` is a precondition). ``grace_s`` None: its own."""

    kind: str
    name: str
    uid: str
    grace_s: int | None = None


Method = Literal["PUT", "POST", "DELETE"]


@dataclass(frozen=True)
class Call:
    """A request to the job's controller (``outlast.controller.http``); repeated by later passes until its effect is
    seen in the controller's status."""

    method: Method
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)


Action = Create | Apply | Delete | Call


@dataclass(frozen=True)
class Happening:
    """A Kubernetes Event about the job."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """What one pass does, in this order: ``actions``, then the status if it differs from the resource's, then events.

    ``urgent``: the status is written at once; else with the next that is, or when the last write is
    ``Settings.progress_every_s`` ago. ``again_in_s``: when to look again though nothing has changed; None: no need.
    ``status`` None: leave it.
    """

    actions: tuple[Action, ...] = ()
    status: TrainingJobStatus | None = None
    urgent: bool = False
    happenings: tuple[Happening, ...] = ()
    again_in_s: float | None = None
