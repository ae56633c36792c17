"""What ranks say, as events for the machine, and what they are told to load. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from outlast import messages as m
from outlast.api import TrainingJob
from outlast.config import MemoryShare
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import RankRestore
from outlast.snapshot.placement import groups


def slots(job: TrainingJob) -> int:
    """Slots of a node: two that ranks' snapshots take turns in, and a third where one may be pinned by an upload."""
    return 2 if job.spec.checkpoint is None else 3


@dataclass(frozen=True)
class Speaker:
    """Who said something."""

    node: str
    attempt: Attempt
    rank: int


def event_of(speaker: Speaker, said: Mapping[str, Any]) -> m.Event | None:
    """The event that a rank's message is; None for one that is none. Raises KeyError, ValueError or TypeError for
    nonsense.
    """
    node, attempt, rank = speaker.node, speaker.attempt, speaker.rank
    match said["op"]:
        case "ready":
            return _ready(speaker, said)
        case "restore-failed":
            return _restore_failed(speaker, said)
        case "busy":
            limit = said.get("limit_s")
            return m.Busy(node, attempt, rank, str(said["label"]), None if limit is None else float(limit))
        case "idle":
            return m.Idle(node, attempt, rank)
        case "note":
            return m.Note(node, rank, str(said["kind"]), str(said["text"]))
        case "capacity":
            return m.Capacity(node, rank, int(said["missing"]), str(said["text"]))
        case "planned":
            return m.Planned(node, rank, Generation.parse(said["generation"]))
        case "missed":
            return m.Missed(node, rank, Generation.parse(said["generation"]), said["reason"], _sound(said))
        case "copied":
            return _copied(speaker, said)
    return None


def _ready(speaker: Speaker, said: Mapping[str, Any]) -> m.RankReady:
    return m.RankReady(
        node=speaker.node,
        attempt=speaker.attempt,
        rank=speaker.rank,
        restored_step=int(said["restored_step"]),
        restore_s=float(said["restore_s"]),
        source=str(said["source"]),
        about=dict(said.get("about") or {}),
    )


def _restore_failed(speaker: Speaker, said: Mapping[str, Any]) -> m.RestoreFailed:
    trouble: m.StoreTrouble | None = next((kind for kind in get_args(m.StoreTrouble) if kind == said["trouble"]), None)
    if trouble is None:
        raise ValueError(f"{said['trouble']!r} is no trouble with a store")
    generation, reason = Generation.parse(said["generation"]), str(said["reason"])
    return m.RestoreFailed(speaker.node, speaker.attempt, generation, reason, trouble, speaker.rank)


def _copied(speaker: Speaker, said: Mapping[str, Any]) -> m.Copied:
    return m.Copied(
        node=speaker.node,
        rank=speaker.rank,
        generation=Generation.parse(said["generation"]),
        slot=int(said["slot"]),
        bytes=int(said["bytes"]),
        length=int(said["length"]),
        stall_s=float(said.get("stall_s", 0.0)),
        copy_s=float(said.get("copy_s", 0.0)),
        sound=_sound(said),
    )


def _sound(said: Mapping[str, Any]) -> tuple[int, int] | None:
    return (int(said["sound"][0]), int(said["sound"][1])) if said.get("sound") else None


def error_of(said: Mapping[str, Any]) -> m.ErrorInfo:
    """The exception in a rank's ``error`` message."""
    return m.ErrorInfo(float(said["time"]), str(said["type"]), str(said["message"]), str(said.get("traceback", "")))


def permit(instruction: m.Permit, node: str, local_rank: int) -> dict[str, Any]:
    """What a permitted rank is told."""
    return {
        "op": "permit",
        "generation": str(instruction.generation),
        "slot": instruction.slot,
        "step": instruction.generation.step,
        "replan": instruction.replan,
        "fresh": local_rank in instruction.fresh.get(node, ()),
        "hold": instruction.hold,
    }


def proceed(instruction: m.Proceed) -> dict[str, Any]:
    """What a rank that is held is told when it may go on."""
    return {"op": "proceed", "generation": str(instruction.generation)}


def abort(instruction: m.Abort) -> dict[str, Any]:
    """What a rank is told of a generation that will not be."""
    return {"op": "abort", "generation": str(instruction.generation)}


def restore_message(node: str, memory_dir: Path, start: m.Start, protection: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to ``hello``: what to restore and where each image is, once all rebuilds are done.

    ``images`` are by rank; in a direct plan, which an old world's images serve, by the ranks of that world: ``world``
    tells how many these were.
    """
    plan = start.restore
    told: dict[str, Any] = {"op": "restore", "plan": None, "images": {}, "protection": dict(protection)}
    if plan is not None:
        told["plan"] = {
            "generation": str(plan.generation),
            "sources": {str(restore.rank): restore.source for restore in plan.ranks},
            "direct": plan.direct,
            "world": len(plan.ranks),
        }
        where = _where_to_read if plan.direct else _where_it_is
        told["images"] = {str(restore.rank): where(node, memory_dir, start, restore) for restore in plan.ranks}
    return told


def _where_it_is(node: str, memory_dir: Path, start: m.Start, restore: RankRestore) -> dict[str, Any]:
    """A rank of this world has its image on its own node by now; the others read it through that node's keeper."""
    if restore.node == node:
        return {"path": _path(memory_dir, restore)}
    return _at_keeper(start.keepers.get(restore.node) or start.peers[restore.seat], restore)


def _where_to_read(node: str, memory_dir: Path, start: m.Start, restore: RankRestore) -> dict[str, Any]:
    """An image of an old world: in the store, or at the keeper of the node that has it (or had it decoded)."""
    if restore.source == "object":
        return {"url": restore.url, "key": restore.key, "checksum": restore.checksum}
    told = _at_keeper(start.keepers[restore.node], restore)
    return {**told, "path": _path(memory_dir, restore)} if restore.node == node else told


def _path(memory_dir: Path, restore: RankRestore) -> str:
    return str(memory_dir / f"slot-{restore.local_rank}-{restore.slot}.img")


def _at_keeper(address: m.Address, restore: RankRestore) -> dict[str, Any]:
    host, port = address
    return {"host": host, "port": port, "local_rank": restore.local_rank, "seat": restore.seat}


def protection(job: TrainingJob, seat: int, world_nodes: int, share: MemoryShare | None = None) -> dict[str, Any]:
    """What decides how much memory a node needs for snapshots ({"slots", "parity", "group", "max_memory", and "share"
    where it has but a part of the file system}), and whether ranks wait at the end until their last step is protected
    ("final").

    The sizes of groups are those of ``world_nodes``, estimated as if every node were a failure domain of its own.
    """
    wanted, erasure = job.spec.snapshot, job.spec.snapshot.erasure
    nodes = [(index, str(index)) for index in range(world_nodes)]
    group = next(group for group in groups(nodes, erasure.group_size, erasure.parity) if seat in group.seats)
    return {
        "slots": slots(job),
        "parity": group.parity,
        "group": len(group.seats),
        "max_memory": wanted.max_memory,
        "final": job.spec.checkpoint is not None,
        **({} if share is None else {"share": share.model_dump()}),
    }
