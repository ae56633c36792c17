"""What the machine asks for: of agents (and, through them, of ranks and keepers), and of the driver itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from outlast.messages.events import Address
from outlast.messages.kept import Kept
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import RestorePlan
from outlast.snapshot.stored import StoredImage

Outcome = Literal["succeeded", "failed", "stopped", "suspended"]
"""How a job ends. Suspended: it goes on from its store when somebody starts it again."""


@dataclass(frozen=True, slots=True)
class Stop:
    """To an agent: fence the keeper at ``attempt``, kill every rank of another one, confirm their exits, verify the
    files, answer ``Stopped`` with the same attempt. May come again; the answer to the newest counts.
    """

    node: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Start:
    """To an agent: rebuild what ``restore`` says this node lacks, then run its ranks.

    ``peers``: seat -> keeper address of the new attempt; ``keepers``: node -> keeper address of every node that the
    plan may read from (a spare may hold images too); ``restore`` None: begin at step 0.
    """

    node: str
    attempt: Attempt
    seat: int
    world_nodes: int
    procs: int
    master_host: str
    master_port: int
    restore: RestorePlan | None
    peers: dict[int, Address]
    keepers: dict[str, Address]
    restart_count: int


@dataclass(frozen=True, slots=True)
class Load:
    """To the agents in ``nodes``: every node has said ``RestoreReady``, so that images can be read wherever the plan
    put them; let the ranks load.
    """

    nodes: tuple[str, ...]
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Permit:
    """To the agents in ``nodes``: every rank takes the snapshot ``generation`` at the boundary before step
    ``generation.step``, into ``slot``. ``replan``: agree on the cuts and answer ``Planned``, copy nothing.
    ``fresh``: node -> local ranks that must make a new file for the slot. ``hold``: each rank stays at that boundary
    once it has copied, until ``Proceed`` (go on), ``Abort`` (go on too, but at the last boundary wait for another
    permit) or its end.
    """

    nodes: tuple[str, ...]
    generation: Generation
    slot: int
    replan: bool
    fresh: dict[str, tuple[int, ...]] = field(default_factory=dict)
    hold: bool = False


@dataclass(frozen=True, slots=True)
class Proceed:
    """To the agents in ``nodes``: ranks that are held at the boundary of this generation go on."""

    nodes: tuple[str, ...]
    generation: Generation


@dataclass(frozen=True, slots=True)
class Abort:
    """To the agents in ``nodes``, for ranks and keepers: this generation will not be."""

    nodes: tuple[str, ...]
    generation: Generation


@dataclass(frozen=True, slots=True)
class Encode:
    """To one keeper, member ``index`` of a redundancy group: make the parity of ``generation``.

    ``seats``: the members in order; ``lengths``: per local rank, the members' image lengths; ``peers``: the members'
    keepers; ``targets``: members that lack parity (None: all).
    """

    node: str
    generation: Generation
    slot: int
    seats: tuple[int, ...]
    parity: int
    index: int
    lengths: tuple[tuple[int, ...], ...]
    peers: tuple[Address, ...]
    targets: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Commit:
    """To the keepers of ``nodes``: this generation is committed; answer ``CommitAcked``."""

    nodes: tuple[str, ...]
    generation: Generation


@dataclass(frozen=True, slots=True)
class Upload:
    """To the keepers of ``nodes``: put your seat's images of this generation, which nobody overwrites meanwhile, into
    the store at ``url`` (the job's own); answer ``Uploaded`` or ``UploadFailed``. ``again``: this, or its answer, may
    not have arrived: who has done it says so.
    """

    nodes: tuple[str, ...]
    generation: Generation
    url: str
    bandwidth: int | None = None
    again: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """To the driver: claim the job's head object for ``attempt``; answer ``Claimed``, or ``ClaimFailed`` and, where it
    was unavailable, go on trying until it is superseded by another ``Claim``."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class CommitCheckpoint:
    """To the driver: every image is in the store; write the manifest and move the head forward. ``about``: what the
    manifest tells of its origin."""

    generation: Generation
    nodes: int
    procs: int
    images: tuple[StoredImage, ...]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quarantine:
    """To the driver: take this checkpoint out of the line, keep its objects, and note why."""

    generation: Generation
    reason: str


@dataclass(frozen=True, slots=True)
class Release:
    """To an agent that was told to leave: nothing of this node is needed any more; end."""

    node: str


@dataclass(frozen=True, slots=True)
class AskKeeper:
    """To the driver: a node's agent is silent; say ``KeeperAnswered`` if its keeper is not."""

    node: str
    keeper: Address


@dataclass(frozen=True, slots=True)
class GiveUp:
    """To the driver: this node counts as lost. Drop it (and see to a replacement); it may come back as ``Joined``."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Register:
    """To an agent that still talks although it was given up: kill your ranks and register anew."""

    node: str


@dataclass(frozen=True, slots=True)
class DumpStacks:
    """To an agent: write the stacks of all its ranks to their logs and answer ``Stacks``."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Injure:
    """To an agent: break something of this node on purpose, in a job that allows it (``outlast.faults``). ``rank``: the
    one that is meant; ``part``: of the images. What was done is told in a ``Note``, where anything is left to tell it.
    """

    node: str
    kind: str
    rank: int | None = None
    part: str | None = None


@dataclass(frozen=True, slots=True)
class Crash:
    """To the driver: end this controller's process as a crash would."""


@dataclass(frozen=True, slots=True)
class Remember:
    """To the driver: keep this for the controller after this one."""

    kept: Kept


@dataclass(frozen=True, slots=True)
class Finish:
    """To the driver: end everything, then say ``Finalized``."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class Emit:
    """To the driver: a line of the event log."""

    kind: str
    text: str
    fields: dict[str, Any] = field(default_factory=dict)


Instruction = (
    Stop
    | Start
    | Load
    | Permit
    | Proceed
    | Abort
    | Encode
    | Commit
    | Upload
    | Claim
    | CommitCheckpoint
    | Quarantine
    | Release
    | GiveUp
    | AskKeeper
    | Register
    | DumpStacks
    | Injure
    | Crash
    | Remember
    | Finish
    | Emit
)
