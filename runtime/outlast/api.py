"""The TrainingJob: the one contract that the command line, the controller and the operator share.

The same YAML serves ``trainctl run``, ``trainctl submit`` and ``kubectl apply``; the CRD and the reference are
generated from these models. ``load`` reads a file; absent fields have defaults that suit a first run. What contradicts
itself, and what this version cannot do yet, is refused with the field's path, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from outlast.errors import SpecError
from outlast.jobstatus import TrainingJobStatus
from outlast.quantities import IntervalOrAuto, MemoryBytes, PositiveSeconds, Seconds, SecondsOrAuto, StepsOrAuto
from outlast.resource import Part, explain
from outlast.storeurl import job_of, parse_checkpoint, parse_store_url
from outlast.yamlfile import read_mapping, set_field

API_VERSION = "outlast.dev/v1alpha1"
KIND = "TrainingJob"
LARGEST_CHOSEN_GROUP = 8
"""Nodes in a redundancy group, at most, when ``groupSize`` is absent."""

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
"""The whole name of an environment variable; RE2 reads it alike."""
SET_BY_OUTLAST = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|OUTLAST_.*|PYTHONHASHSEED"
)
"""The whole names of those that each rank is given; RE2 reads it alike."""

Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
MOST_NODES, MOST_PROCS = 100_000, 1024
MOST_SECONDS = 2**31 - 1
"""As of a Job's ttlSecondsAfterFinished."""


def _check_dns_label(name: str) -> str:
    if not _DNS_LABEL.fullmatch(name):
        raise ValueError(
            f'"{name}" is no DNS label: write at most 63 of a-z, 0-9 and -, with a letter or digit at either end'
        )
    return name


class Metadata(Part):
    """Who the job is. What the API server adds by itself is accepted and of no meaning here."""

    name: str = Field(description="The job's name: a DNS label, unique in its namespace.")
    namespace: str = Field(default="default", description="The namespace that the job lives in: a DNS label.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels, as on any Kubernetes object.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Annotations, as on any Kubernetes object.")
    uid: str | None = Field(
        default=None, description="Set by the API server: identifies this object among all of its name."
    )
    resource_version: str | None = Field(default=None, description="Set by the API server: changes with every write.")
    generation: int | None = Field(
        default=None, description="Set by the API server: grows with every change of the spec."
    )
    creation_timestamp: str | None = Field(default=None, description="Set by the API server: when the object was made.")
    deletion_timestamp: str | None = Field(
        default=None, description="Set by the API server: when its deletion was asked for."
    )
    deletion_grace_period_seconds: int | None = Field(
        default=None, description="Set by the API server: time left to end."
    )
    finalizers: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="What must be done before it goes."
    )
    owner_references: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = Field(
        default=(), description="The objects with which this one is deleted."
    )
    managed_fields: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = Field(
        default=(), description="Set by the API server: who wrote which field."
    )

    _names = field_validator("name", "namespace")(_check_dns_label)


class EnvVar(Part):
    """One environment variable of every rank."""

    later: ClassVar[Mapping[str, str]] = {"valueFrom": "values from Secrets, ConfigMaps and fields; write value"}

    name: str = Field(description="The variable's name.")
    value: str = Field(default="", description="Its value: text, so put numbers and true or false in quotes.")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not ENV_NAME.fullmatch(name):
            raise ValueError(f'"{name}" cannot name a variable: write letters, digits and _ . -, and no digit first')
        if SET_BY_OUTLAST.fullmatch(name):
            raise ValueError(f'"{name}" is set by Outlast for each rank; remove it here')
        return name


class Workers(Part):
    """The nodes that train."""

    replicas: PositiveCount = Field(
        default=1, le=MOST_NODES, description="Nodes that train: Pods, or their local stand-ins."
    )
    min_replicas: PositiveCount | None = Field(
        default=None, description="The fewest nodes to go on with when no spare is left; absent: never shrink."
    )
    spares: Count = Field(
        default=0,
        le=MOST_NODES,
        description="Further nodes that wait, warm and without ranks, to take a lost node's place.",
    )
    procs_per_worker: PositiveCount = Field(
        default=1, le=MOST_PROCS, description="Ranks on a node: one for each accelerator, as a rule."
    )
    failure_domain: str | None = Field(
        default=None,
        min_length=1,
        description="The node label whose equal values mark nodes that fail together, such as "
        "topology.kubernetes.io/zone; absent: each machine by itself.",
    )
    template: dict[str, Any] = Field(
        default_factory=dict, description="The Pods' PodTemplateSpec, as in a Job. Only Kubernetes reads it."
    )

    @property
    def least(self) -> int:
        """Nodes without which no rank starts."""
        return self.replicas if self.min_replicas is None else self.min_replicas


class Head(Part):
    """The Pod of the Ray head and the controller."""

    template: dict[str, Any] = Field(
        default_factory=dict, description="The head Pod's PodTemplateSpec. Only Kubernetes reads it."
    )


class Erasure(Part):
    """How nodes protect each other's snapshots by Reed-Solomon parity."""

    parity: PositiveCount | None = Field(
        default=None, description="Nodes of a group that may be lost at once; absent: 2, or 1 in a group of two."
    )
    group_size: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Nodes in a redundancy group, at most (one more where a node would be left alone); "
        "absent: chosen, up to 8, in groups as equal as possible.",
    )


class Snapshot(Part):
    """The memory tier: consistent states of all ranks, kept in the nodes' memory with parity."""

    every_steps: StepsOrAuto = Field(
        default="auto", description="Steps from one snapshot to the next, or auto: chosen from what a snapshot costs."
    )
    erasure: Erasure = Field(default=Erasure(), description="How nodes protect each other's snapshots; absent: chosen.")
    max_memory: MemoryBytes | None = Field(
        default=None,
        description="The most memory that a node's snapshots and parity may take, such as 8Gi; "
        "absent: what its memory file system holds.",
    )


class Checkpoint(Part):
    """The object tier: snapshots made durable in object storage, in the background."""

    url: str = Field(
        description="Where checkpoints go: s3://bucket/prefix or file:///folder. "
        "The job's own lie below it, under <namespace>/<name>/."
    )
    interval: IntervalOrAuto = Field(
        default="auto",
        description="From one checkpoint to the next: steps (100), a duration (10m), or auto: chosen by measurement.",
    )
    restore_from: str | None = Field(
        default=None,
        description="Start from another job's checkpoint: its URL with <namespace>/<name>, and @STEP for one that is "
        "not the newest, such as s3://bucket/prefix/default/other@12000; absent: start afresh.",
    )
    resume: bool = Field(
        default=False,
        description="Whether to go on from the checkpoints that an earlier job of this namespace and name has left at "
        "url; without it they are refused, so that nothing is overwritten.",
    )
    keep_last: PositiveCount = Field(default=3, description="The newest checkpoints that are kept.")
    keep_every_steps: PositiveCount | None = Field(
        default=None, description="Keep also the first checkpoint at or after every multiple of so many steps."
    )
    bandwidth: MemoryBytes | None = Field(
        default=None, description="The most bytes a second that a node uploads, such as 200Mi; absent: no limit."
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        return parse_store_url(url)

    @field_validator("restore_from")
    @classmethod
    def _check_restore_from(cls, checkpoint: str | None) -> str | None:
        return None if checkpoint is None else parse_checkpoint(checkpoint)


class Recovery(Part):
    """When to restart, when to wait and when to give up."""

    max_restarts: Count = Field(default=20, description="Restarts within `window` after which the job fails instead.")
    window: PositiveSeconds = Field(default=3600.0, description="The time over which restarts are counted, such as 1h.")
    hang_timeout: SecondsOrAuto = Field(
        default="auto",
        description="Time without progress of any rank that is a hang; auto: from the measured step time.",
    )
    shrink_after: Seconds = Field(
        default=60.0,
        description="How long to wait for a spare or a replacement before going on with fewer nodes; "
        "of no effect while minReplicas forbids that.",
    )
    grow_after: Seconds = Field(
        default=30.0,
        description="How long after a resize the job stays as it is before it grows into nodes that have joined; "
        "doubles, up to 10m, each time a node is lost soon after it grew.",
    )
    start_timeout: PositiveSeconds = Field(
        default=900.0,
        description="How long to wait for enough nodes. Then a job on a cluster gives back its Pods and asks for them "
        "again later; it fails if what hinders them does not pass by itself, or if its only state is in its nodes' "
        "memory. With `trainctl run` the job fails.",
    )


class Faults(Part):
    """Game days."""

    allow: bool = Field(default=False, description="Whether `trainctl fault` may break this running job on purpose.")


class TrainingJobSpec(Part):
    """What is wanted."""

    later: ClassVar[Mapping[str, str]] = {
        "diloco": "training across clusters; leave it out",
    }

    entrypoint: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        min_length=1, description='The training command as a list, such as [python, train.py, --steps, "2000"].'
    )
    env: Annotated[tuple[EnvVar, ...], Field(strict=False)] = Field(
        default=(), description="Environment variables of every rank: a list of {name, value}, as in a Pod."
    )
    workers: Workers = Field(default=Workers(), description="The nodes that train.")
    head: Head = Field(default=Head(), description="The Pod of the Ray head and the controller.")
    snapshot: Snapshot = Field(default=Snapshot(), description="The memory tier: how often, how protected.")
    checkpoint: Checkpoint | None = Field(
        default=None, description="The object tier: where and how often; absent: snapshots in memory alone."
    )
    recovery: Recovery = Field(default=Recovery(), description="When to restart, to wait, to give up.")
    faults: Faults = Field(default=Faults(), description="Faults on purpose, for game days.")
    suspend: bool = Field(
        default=False, description="Whether the job shall have no nodes for now; it goes on when unset."
    )
    active_deadline_seconds: PositiveCount | None = Field(
        default=None,
        le=MOST_SECONDS,
        description="Seconds after which the job fails, counted from when it was first given Pods, and anew when it is "
        "resumed; with `trainctl run` from its start. Absent: no limit.",
    )
    ttl_seconds_after_finished: Count | None = Field(
        default=None, le=MOST_SECONDS, description="Seconds after its end when the job is deleted; absent: it is kept."
    )

    @field_validator("entrypoint")
    @classmethod
    def _check_program(cls, entrypoint: tuple[str, ...]) -> tuple[str, ...]:
        if not entrypoint[0].strip():
            raise ValueError('"" cannot be run: the first entry must name a program, such as python')
        return entrypoint


class TrainingJob(Part):
    """One training job: the custom resource, or the same YAML run locally.

    Raises SpecError when fields that are right by themselves contradict each other.
    """

    api_version: Literal["outlast.dev/v1alpha1"] = Field(description="Write outlast.dev/v1alpha1.")
    kind: Literal["TrainingJob"] = Field(description="Write TrainingJob.")
    metadata: Metadata = Field(description="Who the job is: at least its name.")
    spec: TrainingJobSpec = Field(description="What is wanted: at least the entrypoint.")
    status: TrainingJobStatus | None = Field(default=None, description="What is. Written by Outlast alone.")

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        problems = [*contradictions(self.spec), *_restored_from_itself(self.metadata, self.spec.checkpoint)]
        if problems:
            raise SpecError(problems)
        return self

    def to_yaml(self) -> str:
        """The job as a YAML file that ``load`` reads back to an equal job, without its status and without defaults."""
        tree = self.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude={"status"})
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def load(text: str, overrides: Sequence[str] = ()) -> TrainingJob:
    """The TrainingJob in the YAML ``text``, with fields set by ``path=value`` afterwards, the last one winning.

    A path may leave out its leading ``spec.``; a value is YAML (``spec.workers.replicas=2``, ``env[0].value="1"``) and
    ``null`` takes the field away. A ``status`` in the file is dropped, as the API server does.
    Raises SpecError with every problem found: the field's path, the value given, what is allowed.
    """
    tree = read_mapping(text)
    for assignment in overrides:
        set_field(tree, _full_path(assignment))
    tree.pop("status", None)
    try:
        return TrainingJob.from_yaml_tree(tree)
    except ValidationError as error:
        raise SpecError(explain(error, TrainingJob)) from error


def group_sizes(replicas: int, group_size: int | None) -> tuple[int, ...]:
    """Sizes of the redundancy groups of ``replicas`` nodes, largest first: as few and equal as ``group_size`` allows.

    A group is larger than that only where a node would be left alone. ``snapshot.placement`` decides who is in which.
    """
    count = max(1, min(-(-replicas // (group_size or LARGEST_CHOSEN_GROUP)), replicas // 2))
    return tuple((replicas + count - 1 - index) // count for index in range(count))


def contradictions(spec: TrainingJobSpec) -> Iterator[tuple[str, str]]:
    """(Field path, text) for every combination of fields that cannot be, or not yet."""
    workers, names = spec.workers, [variable.name for variable in spec.env]
    if workers.min_replicas is not None and workers.min_replicas > workers.replicas:
        yield (
            "spec.workers.minReplicas",
            f"{workers.min_replicas} was given, but it must be at most replicas, which is {workers.replicas}",
        )
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"spec.env[{index}].name", f'"{name}" is given twice; keep one'
    yield from _erasure_contradictions(spec.snapshot.erasure, workers.replicas)


def _restored_from_itself(metadata: Metadata, checkpoint: Checkpoint | None) -> Iterator[tuple[str, str]]:
    if checkpoint is None or checkpoint.restore_from is None:
        return
    own = f"{checkpoint.url}/{metadata.namespace}/{metadata.name}"
    if job_of(checkpoint.restore_from) == own:
        yield (
            "spec.checkpoint.restoreFrom",
            f"{own} is where this job's own checkpoints go: leave it out to go on from them (trainctl run --resume), "
            "or give the job another name to branch off",
        )


def _erasure_contradictions(erasure: Erasure, replicas: int) -> Iterator[tuple[str, str]]:
    path = "spec.snapshot.erasure"
    size, parity = erasure.group_size, erasure.parity
    if replicas == 1:
        for name, given in (("groupSize", size), ("parity", parity)):
            if given is not None:
                yield f"{path}.{name}", f"{given} was given, but one node has no other to hold parity: leave it out"
        return
    if size is not None and size > replicas:
        yield (
            f"{path}.groupSize",
            f"{size} was given, but it must be at most spec.workers.replicas, which is {replicas}",
        )
        return
    sizes = group_sizes(replicas, size)
    if parity is not None and parity >= sizes[-1]:
        yield (
            f"{path}.parity",
            f"{parity} was given, but it must be less than the nodes of a group: at most {sizes[-1] - 1}, "
            f"as {replicas} nodes make groups of {', '.join(map(str, sizes))}",
        )


def _full_path(assignment: str) -> str:
    text = assignment.strip()
    first = re.split(r"[.\[=]", text, maxsplit=1)[0].strip()
    return text if first in ("", "apiVersion", "kind", "metadata", "spec", "status") else f"spec.{text}"
