"""What the machine is told: by agents about nodes, ranks and snapshots, and by the driver (units: see ``messages``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import HeldImage, Inventory
from outlast.snapshot.stored import StoredCheckpoint, StoredImage

Address = tuple[str, int]

StoreTrouble = Literal["unavailable", "denied", "bad", "lost"]
"""Why something with the object store failed: it does not answer (again later); it refuses (a person must act); the
bytes there are missing or wrong; another controller has claimed the job's checkpoints."""


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An exception that a rank raised, as torchelastic's error file tells it."""

    time: float
    type: str
    message: str
    traceback: str = ""


# --- events: membership ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Joined:
    """A node's agent registered. ``registration`` is new each time it does so (random text): a node that was given up
    is taken again only under another one. ``attempt``/``seat``/``running``: what it is doing, when it outlived a
    controller (``running``: all its ranks are alive or done; ``RankReady`` and ``RankDone`` are then said again, after
    this). ``held``: the images its keeper holds, as it says without verifying them. ``free_port``: a port on ``host``
    for a rendezvous. ``best_seen_attempt``: the highest attempt number that agent or keeper was ever told. ``memory``:
    bytes that the node's images may take in all (None: not known). ``dirty``: as in ``Stopped``. ``world_nodes``: how
    many nodes the attempt has that is ``running`` (0: not known), ``restores``: the generation that it began with,
    ``stored``: which is in the object store.
    """

    node: str
    domain: str
    host: str
    attempt: Attempt | None
    seat: int | None
    running: bool
    keeper: Address
    free_port: int
    procs: int
    best_seen_attempt: int = 0
    held: tuple[HeldImage, ...] = ()
    registration: str = ""
    restart_count: int = 0
    memory: int | None = None
    dirty: tuple[tuple[int, int], ...] = ()
    world_nodes: int = 0
    restores: Generation | None = None
    stored: bool = False


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Every ~0.25 s from each agent. ``steps``: rank -> steps done; ``step_seconds``: rank -> its last step's time;
    ``own_seconds``: rank -> the part of it that the rank did not spend waiting for others; ``metrics``: the latest
    values that the node's first rank reported; ``total``: the steps the script said it will do.
    """

    node: str
    attempt: Attempt | None
    steps: dict[int, int] = field(default_factory=dict)
    step_seconds: dict[int, float] = field(default_factory=dict)
    own_seconds: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    total: int | None = None


@dataclass(frozen=True, slots=True)
class NodeGone:
    """The driver knows that a node is gone (its actor died, its connection was refused)."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Leaving:
    """A node was told to go (preempted, drained): it will be gone after ``grace_s``. Said once, and again by an agent
    that starts anew."""

    node: str
    grace_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class KeeperLost:
    """A node's keeper died; its files are still there and the agent starts another."""

    node: str


@dataclass(frozen=True, slots=True)
class KeeperBack:
    """A node's keeper serves again, perhaps on another port."""

    node: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class KeeperAnswered:
    """From the driver: the keeper that it was told to ask answers, so the node lives and only its agent is away."""

    node: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The answer to ``Stop``: no rank of the node lives, or those that do are named in ``dirty``.

    ``attempt`` is that of the ``Stop``; ``inventory`` is verified (every block hashed); ``dirty``: (local rank, slot)
    whose last writer's exit is not confirmed, so the file must not be used again; ``free_port``: another port for a
    rendezvous (0: the last one still serves).
    """

    node: str
    attempt: Attempt
    inventory: Inventory
    dirty: tuple[tuple[int, int], ...] = ()
    free_port: int = 0


# --- events: ranks --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RestoreReady:
    """A node's keeper has rebuilt what ``Start.restore`` asked of it; its ranks can load. Sent in any case, and again
    after ``Joined``.
    """

    node: str
    attempt: Attempt
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RestoreFailed:
    """What ``Start.restore`` names could not be had from the object store, or a rank could not read it.

    ``trouble`` "bad": the checkpoint ``generation`` must not be used again; with ``memory``, what nodes hold of it.
    Ranks that wait for it are of no use: the attempt is over.
    """

    node: str
    attempt: Attempt
    generation: Generation
    reason: str
    trouble: StoreTrouble = "bad"
    rank: int | None = None
    memory: bool = False


@dataclass(frozen=True, slots=True)
class RankReady:
    """A rank has loaded its state (or begins afresh). ``source``: memory-local, memory-peer, memory-decode, object or
    none. ``about`` (of rank 0): what a checkpoint tells of its origin: {"script": fingerprint, "mesh": ...}.
    """

    node: str
    attempt: Attempt
    rank: int
    restored_step: int
    restore_s: float
    source: str
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankExited:
    """A rank's process ended without having said that it was done. ``time``: when the agent learned of it; ``step``:
    the steps it had done, as far as the agent heard; ``why``: what is known of a signal's sender, "" for nothing.
    """

    node: str
    attempt: Attempt
    rank: int
    code: int | None = None
    signal: int | None = None
    error: ErrorInfo | None = None
    time: float = 0.0
    step: int | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class RankDone:
    """A rank has done all its steps and exited with 0. ``digest``: of the weights ("" from a rank that gives none)."""

    node: str
    attempt: Attempt
    rank: int
    digest: str = ""
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Busy:
    """A rank announced a long pause: no hang before ``limit_s`` (None: no limit)."""

    node: str
    attempt: Attempt
    rank: int
    label: str
    limit_s: float | None


@dataclass(frozen=True, slots=True)
class Idle:
    """The announced pause of a rank is over."""

    node: str
    attempt: Attempt
    rank: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """Memory for snapshots does not suffice: the job cannot go on as asked. ``rank`` is None when a keeper says so."""

    node: str
    rank: int | None
    missing_bytes: int
    text: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the event log."""

    node: str
    rank: int | None
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Stacks:
    """The answer to ``DumpStacks``: the stacks of a node's ranks."""

    node: str
    text: str


# --- events: snapshots ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """A rank has taken part in agreeing how replicated state is cut (the answer to a ``Permit`` with ``replan``)."""

    node: str
    rank: int
    generation: Generation


@dataclass(frozen=True, slots=True)
class Copied:
    """A rank's image is sealed. ``bytes``: of state; ``length``: of the image file; ``stall_s``: how long its loop was
    blocked; ``copy_s``: how long the copy took; ``sound``: as in ``Missed``.
    """

    node: str
    rank: int
    generation: Generation
    slot: int
    bytes: int
    length: int
    stall_s: float = 0.0
    copy_s: float = 0.0
    sound: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Missed:
    """A rank did not take a permitted snapshot. ``reason``: "late" (the permit came too late), "replan" (its plan no
    longer holds), "accumulating…" (gradients wait there for an optimizer's step) or an error's text. ``sound``, where
    known: the last step before which no gradients waited, and how many steps before it that was so last.
    """

    node: str
    rank: int
    generation: Generation
    reason: str
    sound: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A node's own parity images of a generation are sealed."""

    node: str
    generation: Generation
    seconds: float = 0.0
    parity_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EncodeFailed:
    """A node could not encode; the generation is retried, not trusted."""

    node: str
    generation: Generation
    reason: str


@dataclass(frozen=True, slots=True)
class CommitAcked:
    """A keeper knows that this generation is committed."""

    node: str
    generation: Generation


# --- events: checkpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A node's images of a generation are in the store. ``bytes`` and ``seconds``: of the transfer."""

    node: str
    generation: Generation
    images: tuple[StoredImage, ...]
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class UploadFailed:
    """A node could not upload, after having tried again where that made sense."""

    node: str
    generation: Generation
    reason: str
    trouble: StoreTrouble = "unavailable"


@dataclass(frozen=True, slots=True)
class Claimed:
    """The job's head object is ours for ``attempt``. ``stored``: complete checkpoints that may be restored, newest
    first, those of ``restoreFrom`` last; such as lack an object or have one of another size are not among them.
    ``unseen``: why it is not known what ``restoreFrom`` names, "" when it is or does not matter; ``denied``: a person
    must mend that. ``Claimed`` comes again when it is known."""

    attempt: Attempt
    stored: tuple[StoredCheckpoint, ...] = ()
    unseen: str = ""
    denied: bool = False


@dataclass(frozen=True, slots=True)
class ClaimFailed:
    """The head object could not be claimed. Unless it is "lost" the driver goes on trying: ``Claimed`` may come yet."""

    attempt: Attempt
    reason: str
    trouble: StoreTrouble


@dataclass(frozen=True, slots=True)
class CheckpointCommitted:
    """A checkpoint is complete: its manifest is written and the head names it."""

    checkpoint: StoredCheckpoint
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckpointsExpired:
    """Retention has taken these out of the store."""

    generations: tuple[Generation, ...]


@dataclass(frozen=True, slots=True)
class CheckpointFailed:
    """Its manifest or the head could not be written: it is none."""

    generation: Generation
    reason: str
    trouble: StoreTrouble


# --- events: the controller's own -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; sent every ~0.1 s."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the job ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class ResizeRequested:
    """The job shall have so many nodes from now on. ``min_replicas`` None: it may not train with fewer."""

    replicas: int
    min_replicas: int | None
    spares: int


@dataclass(frozen=True, slots=True)
class SuspendRequested:
    """The job shall end, to be taken up again later from the object store, which may take ``patience_s`` to answer."""

    patience_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class HoldRequested:
    """The ranks shall wait at a committed snapshot for another controller, ``patience_s`` at most."""

    patience_s: float


@dataclass(frozen=True, slots=True)
class FaultRequested:
    """Somebody wants something broken on purpose: a fault as ``outlast.faults`` reads it, whose target is a rank, a
    seat, or nothing (None)."""

    kind: str
    target: int | None = None
    part: str | None = None


@dataclass(frozen=True, slots=True)
class Finalized:
    """The driver has carried out ``Finish``."""


Event = (
    Joined
    | Heartbeat
    | NodeGone
    | KeeperLost
    | KeeperAnswered
    | KeeperBack
    | Stopped
    | RestoreReady
    | RankReady
    | RankExited
    | RankDone
    | Busy
    | Idle
    | Capacity
    | Note
    | Stacks
    | Planned
    | Copied
    | Missed
    | Encoded
    | EncodeFailed
    | CommitAcked
    | Leaving
    | RestoreFailed
    | Uploaded
    | UploadFailed
    | Claimed
    | ClaimFailed
    | CheckpointCommitted
    | CheckpointFailed
    | CheckpointsExpired
    | Tick
    | StopRequested
    | ResizeRequested
    | SuspendRequested
    | HoldRequested
    | FaultRequested
    | Finalized
)
