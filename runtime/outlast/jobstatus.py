"""What a TrainingJob's status says: the half of the contract that Outlast writes and people read (see ``api``)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from outlast.resource import Part

Phase = Literal["Pending", "Starting", "Running", "Recovering", "Suspended", "Succeeded", "Failed"]
"""Pending: waits for nodes. Starting: ranks of the first attempt start. Recovering: a later attempt starts."""

Count = Annotated[int, Field(ge=0)]


class Condition(Part):
    """One thing that is true or not of the job, as Kubernetes writes it."""

    type: Literal["Ready", "Suspended", "Recovering", "Succeeded", "Failed"] = Field(description="What it is about.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it is so.")
    reason: str = Field(description="Why, as one word in CamelCase.")
    message: str = Field(default="", description="Why, as a sentence.")
    observed_generation: int | None = Field(
        default=None, description="The generation of the spec that it was judged by."
    )
    last_transition_time: str = Field(description="When status changed last (RFC 3339).")


class WorkersStatus(Part):
    """The nodes there are."""

    ready: Count = Field(default=0, description="Nodes that train or could at once.")
    wanted: Count = Field(default=0, description="Nodes that shall train: the replicas in force.")
    spares: Count = Field(default=0, description="Nodes that wait to take a lost node's place.")


class SnapshotStatus(Part):
    """The newest committed snapshot."""

    step: Count = Field(description="Steps done when it was taken.")
    time: str = Field(description="When it was committed (RFC 3339).")


class CheckpointStatus(Part):
    """The newest complete checkpoint."""

    step: Count = Field(description="Steps done in it.")
    time: str = Field(description="When it was complete (RFC 3339).")
    url: str = Field(description="Where it lies; `trainctl checkpoints` and `restoreFrom` take it.")


class Failure(Part):
    """Something that failed, as the job's status remembers it."""

    time: str = Field(description="When (RFC 3339).")
    cause: str = Field(description="What: a rank's crash, a node's loss, a hang and so on.")
    message: str = Field(default="", description="The first error in time, for people.")
    node: str | None = Field(default=None, description="The node it happened on.")
    rank: Count | None = Field(default=None, description="The rank it happened to.")
    step: Count | None = Field(default=None, description="The step that was under way.")


class StartStatus(Part):
    """How often the job was given too few nodes, and when it asks for them again."""

    failures: Count = Field(default=0, description="Starts in a row that were given up for want of nodes.")
    since: str | None = Field(default=None, description="Since when the job has had Pods and too few nodes (RFC 3339).")
    attempts: Count = Field(default=0, description="How often ranks had been started by then.")
    retry_time: str | None = Field(
        default=None, description="When the job, which has given back its Pods, asks for them again (RFC 3339)."
    )


class ControllerStatus(Part):
    """The controller that this status was learnt from, and what those before it had counted."""

    identity: str = Field(default="", description="Tells one controller of the job from the next.")
    version: str = Field(default="", description="Version of Outlast in the training image.")
    heard_time: str | None = Field(default=None, description="When it had answered last (RFC 3339).")
    goodput: dict[str, float] = Field(
        default_factory=dict, description="Seconds of the goodput ledger that it has booked, by kind."
    )
    earlier_attempt: Count = Field(
        default=0, description="The attempt that was under way when it took over; 0: it is the first."
    )
    earlier_restarts: dict[str, int] = Field(
        default_factory=dict, description="Restarts by cause that earlier controllers counted."
    )
    earlier_goodput: dict[str, float] = Field(
        default_factory=dict, description="Seconds of the goodput ledger that earlier controllers booked, by kind."
    )


class TrainingJobStatus(Part):
    """What is. Written by Outlast alone."""

    phase: Phase = Field(default="Pending", description="Where the job is in its life.")
    observed_generation: int | None = Field(default=None, description="The generation of the spec that this speaks of.")
    conditions: Annotated[tuple[Condition, ...], Field(strict=False)] = Field(
        default=(), description="What is true of the job."
    )
    step: Count = Field(default=0, description="Steps done.")
    total_steps: Count | None = Field(default=None, description="Steps to do; absent until the script has said so.")
    attempt: Count = Field(default=0, description="The attempt under way: how often all ranks have been started.")
    restarts: dict[str, int] = Field(default_factory=dict, description="How many restarts there were, by cause.")
    restart_count: Count = Field(default=0, description="How many restarts there were in all.")
    workers: WorkersStatus = Field(default=WorkersStatus(), description="The nodes there are.")
    snapshot: SnapshotStatus | None = Field(default=None, description="The newest committed snapshot.")
    checkpoint: CheckpointStatus | None = Field(default=None, description="The newest complete checkpoint.")
    checkpoint_failures: Count = Field(
        default=0, description="Checkpoints that were begun and not completed, as the controller in force counts them."
    )
    goodput: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="The part of the time that went into steps which count, 0 to 1."
    )
    failures: Annotated[tuple[Failure, ...], Field(strict=False)] = Field(default=(), description="The last failures.")
    weights_digest: str | None = Field(
        default=None, description="SHA-256 over the trained weights, once the job succeeded."
    )
    start_time: str | None = Field(
        default=None, description="When the first rank started, since the job was resumed (RFC 3339)."
    )
    active_since: str | None = Field(
        default=None,
        description="When the job was first given Pods, since it was resumed; activeDeadlineSeconds counts from it "
        "(RFC 3339).",
    )
    suspending_since: str | None = Field(
        default=None,
        description="Since when the job has been told to make room, its last checkpoint first (RFC 3339).",
    )
    completion_time: str | None = Field(default=None, description="When the job ended (RFC 3339).")
    selector: str = Field(
        default="", description="Selects the job's node Pods; `kubectl scale` and disruption budgets read it."
    )
    next_pod: Count = Field(
        default=0, description="The index that the next Pod's name gets; indices are not used again."
    )
    head: str | None = Field(default=None, description="The head Pod in force.")
    start: StartStatus = Field(default=StartStatus(), description="Waiting for nodes.")
    controller: ControllerStatus = Field(default=ControllerStatus(), description="Where this was learnt.")
