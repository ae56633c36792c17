"""What ranks say, as events for the machine, and what they are told to load. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast import messages as m
from outlast.api import TrainingJob
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import RankRestore
from outlast.snapshot.placement import groups

SLOTS = 2
"""Slots a node; a third comes with the object tier."""


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
            return m.RankReady(
                node, attempt, rank, int(said["restored_step"]), float(said["restore_s"]), str(said["source"])
            )
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
            return m.Missed(node, rank, Generation.parse(said["generation"]), said["reason"])
        case "copied":
            return _copied(speaker, said)
    return None


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
    )


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
    }


def restore_message(node: str, memory_dir: Path, start: m.Start, protection: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to ``hello``: what to restore and where each rank's image is, once all rebuilds are done."""
    plan = start.restore
    told: dict[str, Any] = {"op": "restore", "plan": None, "images": {}, "protection": dict(protection)}
    if plan is not None:
        sources = {str(restore.rank): restore.source for restore in plan.ranks}
        told["plan"] = {"generation": str(plan.generation), "sources": sources}
        told["images"] = {str(restore.rank): _where(node, memory_dir, start, restore) for restore in plan.ranks}
    return told


def _where(node: str, memory_dir: Path, start: m.Start, restore: RankRestore) -> dict[str, Any]:
    if restore.node == node:
        return {"path": str(memory_dir / f"slot-{restore.local_rank}-{restore.slot}.img")}
    host, port = start.keepers.get(restore.node) or start.peers[restore.seat]
    return {"host": host, "port": port, "local_rank": restore.local_rank, "seat": restore.seat}


def protection(job: TrainingJob, seat: int) -> dict[str, Any]:
    """What decides how much memory a node needs for snapshots: {"slots", "parity", "group", "max_memory"}.

    The sizes of groups are estimated as if every node were a failure domain of its own.
    """
    wanted, erasure = job.spec.snapshot, job.spec.snapshot.erasure
    nodes = [(index, str(index)) for index in range(job.spec.workers.replicas)]
    group = next(group for group in groups(nodes, erasure.group_size, erasure.parity) if seat in group.seats)
    return {"slots": SLOTS, "parity": group.parity, "group": len(group.seats), "max_memory": wanted.max_memory}
