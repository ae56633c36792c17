"""Faults on purpose: their syntax, when they are due, the gate and the flipped bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.errors import RequestError
from outlast.faults import AtOnce, parse_at_once
from outlast.local.faultgate import FaultGate, FaultPlan, Scene
from outlast.local.faults import (
    ANSWERED_KINDS,
    NODE_KINDS,
    RANK_KINDS,
    Fault,
    Kind,
    Part,
    Phase,
    boundary_steps,
    check_faults,
    parse_fault,
)
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import ImageFile, block_checksums
from outlast.snapshot.imagefiles import FLIPPED_BYTES, PARITIES, SHARDS, being_written, corrupt
from outlast.snapshot.layout import Entry, Layout, plan_layout

WRITTEN = {
    "rank-crash@20:1": Fault(Kind.RANK_CRASH, 20, 1),
    "rank-error@0:0": Fault(Kind.RANK_ERROR, 0, 0),
    "hang@7:3": Fault(Kind.HANG, 7, 3),
    "straggler@40:2*3": Fault(Kind.STRAGGLER, 40, 2, factor=3.0),
    "straggler@40:2*1.5": Fault(Kind.STRAGGLER, 40, 2, factor=1.5),
    "node-loss@20:2": Fault(Kind.NODE_LOSS, 20, 2),
    "node-loss@20.copy:2": Fault(Kind.NODE_LOSS, 20, 2, Phase.COPY),
    "node-loss@20.encode:2": Fault(Kind.NODE_LOSS, 20, 2, Phase.ENCODE),
    "node-loss@20.restart:2": Fault(Kind.NODE_LOSS, 20, 2, Phase.RESTART),
    "node-pause@20:2": Fault(Kind.NODE_PAUSE, 20, 2),
    "corrupt@20:2/header": Fault(Kind.CORRUPT, 20, 2, part=Part.HEADER),
    "corrupt@20:2/trailer": Fault(Kind.CORRUPT, 20, 2, part=Part.TRAILER),
    "head-loss@20": Fault(Kind.HEAD_LOSS, 20),
    "controller-crash@20": Fault(Kind.CONTROLLER_CRASH, 20),
    "keeper-crash@20:0": Fault(Kind.KEEPER_CRASH, 20, 0),
    "agent-crash@20:0": Fault(Kind.AGENT_CRASH, 20, 0),
    "node-leave@20:3": Fault(Kind.NODE_LEAVE, 20, 3),
    "node-join@20": Fault(Kind.NODE_JOIN, 20),
}

REFUSED = {
    "": "is not KIND@STEP:TARGET",
    "rank-crash": "is not KIND@STEP:TARGET",
    "rank-crash@x:1": "is not KIND@STEP:TARGET",
    "rank-crash@-1:1": "is not KIND@STEP:TARGET",
    "explode@3:1": "unknown kind explode: one of rank-crash, ",
    "rank-crash@3": "needs a rank: rank-crash@3:0",
    "node-loss@3": "needs a seat: node-loss@3:0",
    "head-loss@3:1": "takes no target",
    "node-join@3:1": "takes no target",
    "node-leave@3": "needs a seat: node-leave@3:0",
    "rank-crash@3.lunch:1": "unknown phase lunch: one of copy, encode, restart",
    "rank-crash@3.boundary:1": "@STEP alone",
    "straggler@3:1*1": "not a number above 1",
    "straggler@3:1*1.2.3": "not a number above 1",
    "rank-crash@3:1*2": "takes no factor",
    "corrupt@3:1/soul": "unknown part soul: one of header, data, parity, trailer",
    "node-loss@3:1/data": "takes no part",
    "rank-error@3.copy:1": "happens between two steps",
}


@pytest.mark.parametrize(("text", "fault"), WRITTEN.items())
def test_parse_reads_what_str_writes(text: str, fault: Fault) -> None:
    assert parse_fault(text) == fault
    assert str(fault) == text


@pytest.mark.parametrize(("text", "reason"), REFUSED.items())
def test_parse_says_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_fault(text)
    assert reason in str(caught.value)
    assert f"--fault {text}" in str(caught.value)


AT_ONCE = {
    "rank-crash:1": AtOnce(Kind.RANK_CRASH, 1),
    "hang:0": AtOnce(Kind.HANG, 0),
    "node-loss:2": AtOnce(Kind.NODE_LOSS, 2),
    "node-leave:2": AtOnce(Kind.NODE_LEAVE, 2),
    "keeper-crash:3": AtOnce(Kind.KEEPER_CRASH, 3),
    "agent-crash:3": AtOnce(Kind.AGENT_CRASH, 3),
    "corrupt:2/parity": AtOnce(Kind.CORRUPT, 2, Part.PARITY),
    "controller-crash": AtOnce(Kind.CONTROLLER_CRASH),
}


@pytest.mark.parametrize(("text", "fault"), AT_ONCE.items())
def test_a_fault_at_once_reads_what_str_writes(text: str, fault: AtOnce) -> None:
    assert parse_at_once(f" {text} ") == fault
    assert str(fault) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    {
        "": "is not KIND:TARGET",
        "rank-crash@3:1": "is not KIND:TARGET",
        "rank-crash:1*2": "is not KIND:TARGET",
        "rank-crash": "needs a rank: rank-crash:0",
        "node-loss": "needs a seat: node-loss:0",
        "controller-crash:1": "takes no target",
        "explode:1": "unknown kind explode: one of rank-crash, ",
        "straggler:1": "can be asked for agent-crash, controller-crash, ",
        "head-loss": "not for this",
        "corrupt:1/soul": "unknown part soul: one of header, data, parity, trailer",
        "hang:1/data": "takes no part",
    }.items(),
)
def test_what_is_no_fault_at_once_is_explained(text: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_at_once(text)
    assert reason in str(caught.value)


def test_a_part_is_data_unless_named() -> None:
    assert parse_at_once("corrupt:1").part is Part.DATA


def test_absent_parts_have_defaults() -> None:
    assert parse_fault("straggler@1:0").factor == 3.0
    assert parse_fault("corrupt@1:0").part is Part.DATA


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    kind = draw(st.sampled_from(list(Kind)))
    return Fault(
        kind,
        draw(st.integers(0, 10**6)),
        draw(st.integers(0, 10**4)) if kind in RANK_KINDS | NODE_KINDS else None,
        Phase.BOUNDARY if kind in ANSWERED_KINDS else draw(st.sampled_from(list(Phase))),
        draw(st.integers(2, 50)) if kind is Kind.STRAGGLER else None,
        draw(st.sampled_from(list(Part))) if kind is Kind.CORRUPT else None,
    )


@given(faults())
def test_every_fault_survives_its_text(fault: Fault) -> None:
    assert parse_fault(str(fault)) == fault


def test_targets_must_exist() -> None:
    check_faults([parse_fault("rank-crash@1:7"), parse_fault("node-loss@1:3")], seats=4, procs=2)
    with pytest.raises(RequestError, match="no rank 8: the job has ranks 0 to 7"):
        check_faults([parse_fault("rank-crash@1:8")], seats=4, procs=2)
    with pytest.raises(RequestError, match="no seat 4: the job has seats 0 to 3"):
        check_faults([parse_fault("node-loss@1:4")], seats=4, procs=2)


def test_ranks_ask_only_before_boundary_faults() -> None:
    texts = ["hang@9:0", "rank-crash@3:1", "node-loss@9:1", "node-loss@5.copy:1"]
    assert boundary_steps(map(parse_fault, texts)) == (3, 9)


@given(st.lists(faults(), max_size=8), st.lists(st.tuples(st.sampled_from(list(Phase)), st.integers(0, 50))))
def test_each_fault_is_handed_out_at_most_once(planned: list[Fault], moments: list[tuple[Phase, int]]) -> None:
    plan = FaultPlan(planned)
    taken = [fault for phase, step in moments for fault in plan.take(phase, step)]
    assert sorted(map(str, [*taken, *plan.left])) == sorted(map(str, planned))


def test_phase_faults_are_due_at_or_after_their_step() -> None:
    plan = FaultPlan([parse_fault("node-loss@5.copy:1"), parse_fault("node-loss@5:1")])
    assert plan.take(Phase.COPY, 4) == []
    assert plan.take(Phase.BOUNDARY, 6) == []
    assert [str(fault) for fault in plan.take(Phase.COPY, 8)] == ["node-loss@5.copy:1"]


def test_corruption_comes_first() -> None:
    plan = FaultPlan([parse_fault("rank-crash@5:1"), parse_fault("corrupt@5:1")])
    assert [fault.kind for fault in plan.take(Phase.BOUNDARY, 5)] == [Kind.CORRUPT, Kind.RANK_CRASH]


async def _rank(path: Path, rank: int, attempt: int, steps: Sequence[int]) -> list[dict[str, Any]]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    answers = []
    for step in steps:
        writer.write(
            json.dumps({"rank": rank, "world": 2, "node": f"node-{rank}", "attempt": attempt, "step": step}).encode()
            + b"\n"
        )
        answers.append(json.loads(await reader.readline()))
    writer.close()
    return answers


def test_gate_performs_when_all_are_there_and_answers_the_target(tmp_path: Path) -> None:
    performed: list[tuple[list[str], Scene]] = []

    async def perform(found: Sequence[Fault], scene: Scene) -> None:
        performed.append(([str(fault) for fault in found], scene))

    async def main() -> list[list[dict[str, Any]]]:
        plan = FaultPlan([parse_fault(text) for text in ("rank-error@5:1", "straggler@5:0*2", "node-loss@6:0")])
        gate = FaultGate(tmp_path / "gate", plan, procs=1, perform=perform)
        await gate.open()
        answers = await asyncio.gather(*(_rank(gate.path, rank, 1, (4, 5, 6)) for rank in range(2)))
        again = await asyncio.gather(*(_rank(gate.path, rank, 2, (5, 6)) for rank in range(2)))
        await gate.close()
        return [*answers, *again]

    first, second, *again = asyncio.run(main())
    assert [answer.get("slow") for answer in first] == [None, 2.0, None]
    assert "rank-error@5:1" in second[1]["raise"]
    assert again == [[{"go": True}] * 2] * 2, "each fault happens once, also when its step is passed again"
    assert [names for names, _ in performed] == [["rank-error@5:1", "straggler@5:0*2"], ["node-loss@6:0"]]
    scene = performed[1][1]
    assert (scene.attempt, scene.step, scene.nodes) == (1, 6, {0: "node-0", 1: "node-1"})
    assert set(scene.ranks) == {0, 1}


def _image(path: Path, generation: str, seal: bool = True) -> Layout:
    """An image of one tensor of 8 KiB."""
    layout = plan_layout([Entry("w", "U8", (8192,), 8192)], {"kind": "shard"})
    image = ImageFile.create(path, layout)
    image.begin(Generation.parse(generation))
    if seal:
        image.seal(block_checksums(image.view(0, layout.trailer_offset)))
    image.close()
    return layout


@pytest.mark.parametrize("part", list(Part))
def test_corrupt_flips_bytes_of_the_committed_generation_only(tmp_path: Path, part: Part) -> None:
    old, new = "1-00000000000000aa-10", "1-00000000000000aa-20"
    for name in ("slot-0", "parity-0"):
        layout = _image(tmp_path / f"{name}-0.img", old)
        _image(tmp_path / f"{name}-1.img", new)
    (tmp_path / "commit.json").write_text(json.dumps({"generation": old}))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.img")}
    assert len(corrupt(tmp_path, part)) == 1
    changed = {
        name: [at for at, byte in enumerate(there) if byte != (tmp_path / name).read_bytes()[at]]
        for name, there in before.items()
        if there != (tmp_path / name).read_bytes()
    }
    assert list(changed) == ["parity-0-0.img" if part is Part.PARITY else "slot-0-0.img"]
    (places,) = changed.values()
    first, last = {
        Part.HEADER: (8, layout.data_offset),
        Part.TRAILER: (layout.trailer_offset, layout.total_bytes),
    }.get(part, (layout.data_offset, layout.trailer_offset))
    assert len(places) == FLIPPED_BYTES
    assert first <= places[0] <= places[-1] < last


def test_corrupt_takes_the_newest_before_any_commit_and_passes_over_nonsense(tmp_path: Path) -> None:
    assert corrupt(tmp_path, Part.DATA) == []
    _image(tmp_path / "slot-0-0.img", "1-00000000000000aa-10")
    _image(tmp_path / "slot-0-1.img", "2-00000000000000bb-4")
    (tmp_path / "slot-1-0.img").write_bytes(b"\xff" * 100)
    assert [line.split(":")[0] for line in corrupt(tmp_path, Part.DATA)] == ["slot-0-1.img"]


def test_being_written_names_the_snapshot_under_way(tmp_path: Path) -> None:
    assert being_written([tmp_path, tmp_path / "absent"], SHARDS) is None
    _image(tmp_path / "slot-0-0.img", "1-00000000000000aa-10")
    assert being_written([tmp_path], SHARDS) is None
    _image(tmp_path / "slot-0-1.img", "1-00000000000000aa-20", seal=False)
    (tmp_path / "slot-1-1.img").write_bytes(b"")
    assert being_written([tmp_path], SHARDS) == Generation.parse("1-00000000000000aa-20")
    assert being_written([tmp_path], PARITIES) is None
