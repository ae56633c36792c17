"""What the controller's machine is told (events) and what it asks for (instructions).

Every message is a frozen dataclass that knows nothing of its transport; ``to_json`` and ``from_json`` turn any of them
into a JSON object and back, by class name. An attempt is always a whole ``Attempt`` (number and incarnation): what
carries another one than that in force is a zombie's and is ignored.

Units: ``*_s`` and ``seconds`` are seconds, ``bytes`` and ``length`` are bytes, ``time`` is wall seconds since 1970
(clocks of several machines: good for naming the first of several errors, never for deadlines). A step number counts
steps done. An address is ``(host, port)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from outlast.messages import codec
from outlast.messages.events import (
    Address,
    Busy,
    Capacity,
    CheckpointCommitted,
    CheckpointFailed,
    CheckpointsExpired,
    Claimed,
    ClaimFailed,
    CommitAcked,
    Copied,
    Encoded,
    EncodeFailed,
    ErrorInfo,
    Event,
    FaultRequested,
    Finalized,
    Heartbeat,
    HoldRequested,
    Idle,
    Joined,
    KeeperAnswered,
    KeeperBack,
    KeeperLost,
    Leaving,
    Missed,
    NodeGone,
    Note,
    Planned,
    RankDone,
    RankExited,
    RankReady,
    ResizeRequested,
    RestoreFailed,
    RestoreReady,
    Stacks,
    Stopped,
    StopRequested,
    StoreTrouble,
    SuspendRequested,
    Tick,
    Uploaded,
    UploadFailed,
)
from outlast.messages.instructions import (
    Abort,
    AskKeeper,
    Claim,
    Commit,
    CommitCheckpoint,
    Crash,
    DumpStacks,
    Emit,
    Encode,
    Finish,
    GiveUp,
    Injure,
    Instruction,
    Load,
    Outcome,
    Permit,
    Proceed,
    Quarantine,
    Register,
    Release,
    Remember,
    Start,
    Stop,
    Upload,
)
from outlast.messages.kept import Kept, Size

Message = Event | Instruction

_MESSAGES: dict[str, type] = {cls.__name__: cls for cls in get_args(Message)}


def to_json(message: Message) -> dict[str, Any]:
    """The message as a JSON object: its fields, and its class's name as ``type``."""
    return {"type": type(message).__name__, **codec.encode(message)}


def from_json(data: Mapping[str, Any]) -> Message:
    """Read ``to_json(message)`` back. Raises ValueError when it is none."""
    cls = _MESSAGES.get(str(data.get("type")))
    if cls is None:
        raise ValueError(f"{data.get('type')!r} is no message's type")
    message: Message = codec.decode(cls, {key: value for key, value in data.items() if key != "type"})
    return message


__all__ = [
    "Crash",
    "FaultRequested",
    "HoldRequested",
    "Injure",
    "Kept",
    "Outcome",
    "Remember",
    "ResizeRequested",
    "Size",
    "SuspendRequested",
    "CheckpointCommitted",
    "CheckpointFailed",
    "CheckpointsExpired",
    "Claimed",
    "ClaimFailed",
    "Leaving",
    "RestoreFailed",
    "StoreTrouble",
    "Uploaded",
    "UploadFailed",
    "Claim",
    "CommitCheckpoint",
    "Proceed",
    "Quarantine",
    "Release",
    "Upload",
    "Abort",
    "AskKeeper",
    "Address",
    "Busy",
    "Capacity",
    "Commit",
    "CommitAcked",
    "Copied",
    "DumpStacks",
    "Emit",
    "Encode",
    "EncodeFailed",
    "Encoded",
    "ErrorInfo",
    "Event",
    "Finalized",
    "Finish",
    "GiveUp",
    "Heartbeat",
    "Idle",
    "Instruction",
    "Joined",
    "KeeperAnswered",
    "KeeperBack",
    "KeeperLost",
    "Load",
    "Message",
    "Missed",
    "NodeGone",
    "Note",
    "Permit",
    "Planned",
    "RankDone",
    "RankExited",
    "RankReady",
    "Register",
    "RestoreReady",
    "Stacks",
    "Start",
    "Stop",
    "StopRequested",
    "Stopped",
    "Tick",
    "from_json",
    "to_json",
]
