"""What ranks say and are told, as values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outlast import messages as m
from outlast.agent.keeper_calls import trouble_of
from outlast.agent.rank_messages import Speaker, abort, event_of, permit, proceed, protection, restore_message, slots
from outlast.api import TrainingJob
from outlast.config import MemoryShare
from outlast.errors import (
    CapacityError,
    CheckpointError,
    ImageError,
    ObjectMissing,
    OutlastError,
    StaleAttemptError,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    TransferError,
)
from outlast.protect.capture import check_capacity
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import GUEST_SLOT, Origin, RankRestore, RestorePlan

ATTEMPT = Attempt(2, "b" * 16)
GENERATION = Generation(1, 20, "a" * 16)
SPEAKER = Speaker("node-1", ATTEMPT, 3)
MEMORY = Path("/memory/node-1")


def job(nodes: int = 4, **spec: Any) -> TrainingJob:
    spec = {"entrypoint": ["python", "x.py"], "workers": {"replicas": nodes, "procsPerWorker": 2}, **spec}
    head = {"apiVersion": "outlast.dev/v1alpha1", "kind": "TrainingJob", "metadata": {"name": "j"}}
    return TrainingJob.model_validate({**head, "spec": spec})


DURABLE = {"checkpoint": {"url": "file:///store"}}


def restore(rank: int, node: str, slot: int, source: Origin) -> RankRestore:
    stored = {
        "url": "file:///store/default/j",
        "key": f"{GENERATION}/rank-{rank:05d}.safetensors",
        "checksum": "ab" * 8,
    }
    more = stored if source == "object" else {}
    return RankRestore(rank, rank // 2, rank % 2, node, slot, source, 100, None, **more)


def start(*ranks: RankRestore, direct: bool) -> m.Start:
    plan = RestorePlan(GENERATION, ranks, direct)
    keepers = {"node-0": ("10.0.0.1", 7001), "node-1": ("10.0.0.2", 7002), "node-9": ("10.0.0.9", 7009)}
    peers = {0: keepers["node-0"], 1: keepers["node-1"]}
    return m.Start("node-1", ATTEMPT, 1, 2, 2, "10.0.0.1", 1, plan, peers, keepers, 1)


def test_a_job_with_checkpoints_has_a_third_slot_and_ranks_that_wait_at_the_end() -> None:
    assert (slots(job()), slots(job(**DURABLE))) == (2, 3)
    assert protection(job(), 0, 4) == {"slots": 2, "parity": 2, "group": 4, "max_memory": None, "final": False}
    assert protection(job(**DURABLE), 0, 4) == {"slots": 3, "parity": 2, "group": 4, "max_memory": None, "final": True}


@pytest.mark.parametrize(("world", "group", "parity"), [(1, 1, 0), (2, 2, 1), (3, 3, 2), (8, 8, 2), (9, 5, 2)])
def test_protection_is_that_of_the_world_in_force(world: int, group: int, parity: int) -> None:
    said = protection(job(9), 0, world)
    assert (said["group"], said["parity"]) == (group, parity)


def test_what_a_permit_and_its_end_say() -> None:
    instruction = m.Permit(("node-1",), GENERATION, 1, False, {"node-1": (1,)}, hold=True)
    told = {"op": "permit", "generation": str(GENERATION), "slot": 1, "step": 20, "replan": False, "hold": True}
    assert [permit(instruction, "node-1", r) for r in (0, 1)] == [{**told, "fresh": False}, {**told, "fresh": True}]
    assert permit(replace(instruction, hold=False), "node-2", 1) == {**told, "fresh": False, "hold": False}
    assert proceed(m.Proceed(("node-1",), GENERATION)) == {"op": "proceed", "generation": str(GENERATION)}
    assert abort(m.Abort(("node-1",), GENERATION)) == {"op": "abort", "generation": str(GENERATION)}


def test_in_the_same_world_each_node_has_its_ranks_images() -> None:
    plan = start(
        restore(0, "node-0", 1, "memory-local"),
        restore(1, "node-0", 1, "memory-peer"),
        restore(2, "node-1", 0, "memory-decode"),
        restore(3, "node-1", GUEST_SLOT + 1, "object"),
        direct=False,
    )
    told = restore_message("node-1", MEMORY, plan, {"slots": 3})
    sources = {"0": "memory-local", "1": "memory-peer", "2": "memory-decode", "3": "object"}
    assert told["plan"] == {"generation": str(GENERATION), "sources": sources, "direct": False, "world": 4}
    assert told["images"] == {
        "0": {"host": "10.0.0.1", "port": 7001, "local_rank": 0, "seat": 0},
        "1": {"host": "10.0.0.1", "port": 7001, "local_rank": 1, "seat": 0},
        "2": {"path": "/memory/node-1/slot-0-0.img"},
        "3": {"path": f"/memory/node-1/slot-1-{GUEST_SLOT + 1}.img"},
    }
    assert (told["op"], told["protection"]) == ("restore", {"slots": 3})


def test_of_another_world_images_are_where_they_are_kept_decoded_or_stored() -> None:
    plan = start(
        restore(0, "node-1", 1, "memory-local"),
        restore(1, "node-9", 1, "memory-peer"),
        restore(6, "node-0", GUEST_SLOT + 3, "memory-decode"),
        restore(7, "", 0, "object"),
        direct=True,
    )
    told = restore_message("node-1", MEMORY, plan, {})
    assert (told["plan"]["direct"], told["plan"]["world"]) == (True, 4)
    assert told["images"] == {
        "0": {"host": "10.0.0.2", "port": 7002, "local_rank": 0, "seat": 0, "path": "/memory/node-1/slot-0-1.img"},
        "1": {"host": "10.0.0.9", "port": 7009, "local_rank": 1, "seat": 0},
        "6": {"host": "10.0.0.1", "port": 7001, "local_rank": 0, "seat": 3},
        "7": {
            "url": "file:///store/default/j",
            "key": f"{GENERATION}/rank-00007.safetensors",
            "checksum": "ab" * 8,
        },
    }


def test_without_a_plan_there_is_nothing_to_restore() -> None:
    fresh = replace(start(direct=False), restore=None)
    assert restore_message("node-1", MEMORY, fresh, {}) == {
        "op": "restore",
        "plan": None,
        "images": {},
        "protection": {},
    }


def test_a_rank_that_is_ready_tells_of_its_origin() -> None:
    said = {"op": "ready", "restored_step": 20, "restore_s": 1.5, "source": "object"}
    assert event_of(SPEAKER, said) == m.RankReady("node-1", ATTEMPT, 3, 20, 1.5, "object")
    about = {"script": "0" * 16, "mesh": [2, 2]}
    assert event_of(SPEAKER, {**said, "about": about}) == m.RankReady("node-1", ATTEMPT, 3, 20, 1.5, "object", about)


@pytest.mark.parametrize("trouble", ["unavailable", "denied", "bad", "lost"])
def test_a_restore_that_failed_says_why(trouble: m.StoreTrouble) -> None:
    said = {"op": "restore-failed", "generation": str(GENERATION), "reason": "bytes", "trouble": trouble}
    assert event_of(SPEAKER, said) == m.RestoreFailed("node-1", ATTEMPT, GENERATION, "bytes", trouble, 3)


@pytest.mark.parametrize("change", [{"trouble": "sad"}, {"generation": "x"}, {"trouble": None}])
def test_a_malformed_failure_is_refused(change: dict[str, Any]) -> None:
    said = {"op": "restore-failed", "generation": str(GENERATION), "reason": "bytes", "trouble": "bad", **change}
    with pytest.raises(ValueError, match=r"trouble|unpack"):
        event_of(SPEAKER, said)


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (StoreUnavailable("x"), "unavailable"),
        (StoreError("x"), "unavailable"),
        (StoreDenied("x"), "denied"),
        (ObjectMissing("x"), "bad"),
        (CheckpointError("x"), "bad"),
        (ImageError("x"), "bad"),
        (TransferError("x"), None),
        (CapacityError("x"), None),
        (StaleAttemptError("x"), None),
    ],
)
def test_what_an_error_says_of_the_store(error: OutlastError, trouble: m.StoreTrouble | None) -> None:
    assert trouble_of(error) == trouble


def test_nodes_that_share_a_file_system_are_told_their_part_of_it(tmp_path: Path) -> None:
    """Each would fit into the whole; what they need in all is more than there is."""
    limits = protection(job(), 0, 4, MemoryShare(nodes=4, bytes=100 << 20))
    assert limits["share"] == {"nodes": 4, "bytes": 100 << 20}
    check_capacity(tmp_path, 25 << 20, 0, limits, 1)
    with pytest.raises(CapacityError, match=r"4 local nodes share \(400 MiB are free, they need 416 MiB in all\)"):
        check_capacity(tmp_path, 26 << 20, 0, limits, 1)
