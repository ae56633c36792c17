"""Whole runs with real Ray, torch, keepers and faults: every one must end with the undisturbed run's weights."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from support.runs import Interrupt, Outcome, job, trainctl_run

pytestmark = pytest.mark.timeout(400)

FSDP = ("--parallel", "fsdp", "--pace", "0.1", "--global-batch", "256")
STEPS = 40


Undisturbed = Callable[[dict[str, Any]], Outcome]


@dataclass(frozen=True)
class Expected:
    """One recovery: a word of its cause, the most steps it may cost, and where the ranks' state came from."""

    cause: str
    lost: int
    sources: dict[str, int]
    restored: int | None = None


LOCAL = {"memory-local": 4}
QUICKLY = ("--replace-after", "1")


@dataclass(frozen=True)
class Case:
    name: str
    faults: tuple[str, ...]
    expected: tuple[Expected, ...]
    options: tuple[str, ...] = ()
    spec: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = FSDP


def decoded(count: int, of: int = 4) -> dict[str, int]:
    return {"memory-local": of - count, "memory-decode": count}


LOST = Expected("lost", 9, decoded(1))
MANY = ("--steps", "110")
"""Of the runs with several faults: one undisturbed run for them all."""

CASES = [
    Case(
        "processes",
        ("rank-crash@12:2", "rank-error@18:1", "hang@24:3", "agent-crash@31:0"),
        (
            Expected("rank 2", 7, LOCAL),
            Expected("rank 1", 8, LOCAL),
            Expected("hang", 9, LOCAL),
            Expected("seat 0", 9, LOCAL),
        ),
    ),
    Case(
        "before the first snapshot and beyond the parity",
        ("rank-crash@0:1", "node-loss@3:2", *(f"node-loss@17:{seat}" for seat in range(3))),
        (
            Expected("rank 1", 1, {"none": 4}, restored=0),
            Expected("lost", 4, {"none": 4}, restored=0),
            Expected("lost", 20, {"none": 4}, restored=0),
        ),
        QUICKLY,
    ),
    Case(
        "nodes at rest, in the copy and in the encoding, then keeper, head and controller",
        ("node-loss@17:1", "node-loss@36.copy:2", "node-loss@56.encode:3", "keeper-crash@76:1", "head-loss@84",
         "controller-crash@100"),
        (
            Expected("seat 1", 12, decoded(1)),
            Expected("seat 2", 16, decoded(1)),
            Expected("seat 3", 16, decoded(1)),
            Expected("head", 12, LOCAL),
        ),
        QUICKLY,
        arguments=(*FSDP, *MANY),
    ),
    Case(
        "a node paused, one lost during a recovery, one together with the head",
        ("node-pause@12:2", "rank-crash@50:0", "node-loss@50.restart:2", "head-loss@80", "node-loss@80:3"),
        (Expected("seat 2", 9, decoded(1)), Expected("", 12, decoded(1)), Expected("head", 12, decoded(1))),
        QUICKLY,
        arguments=(*FSDP, *MANY),
    ),
    Case(
        "two nodes of a group at once, then one after the other",
        ("node-loss@17:1", "node-loss@17:2", "node-loss@40:0", "node-loss@50:1", "node-loss@60:2"),
        (Expected("lost", 12, decoded(2)), LOST, LOST, LOST),
        QUICKLY,
        {"workers": {"spares": 2}},
        (*FSDP, *MANY),
    ),
    Case(
        "each part corrupt and a node lost, then corrupt while keepers that repair it crash",
        (
            *(
                fault
                for step, part in ((17, "header"), (37, "data"), (57, "parity"), (77, "trailer"))
                for fault in (f"corrupt@{step}:1/{part}", f"node-loss@{step}:3")
            ),
            *("corrupt@97:1/data", "rank-crash@97:0", "keeper-crash@97.restart:2", "keeper-crash@97.restart:3"),
        ),
        (
            *(Expected("node", 12, decoded(count)) for count in (2, 2, 1, 2)),
            Expected("rank 0", 12, {"memory-local": 3, "memory-decode": 1}),
        ),
        QUICKLY,
        arguments=(*FSDP, *MANY),
    ),
    Case("ddp", ("node-loss@17:1", "rank-crash@28:3"), (Expected("lost", 12, decoded(1)), Expected("rank 3", 12, LOCAL)),
         arguments=("--parallel", "ddp", "--width", "384", "--pace", "0.1", "--global-batch", "256")),
    Case("hsdp", ("node-loss@17:1", "rank-crash@28:3"), (Expected("lost", 12, decoded(1)), Expected("rank 3", 12, LOCAL)),
         arguments=("--parallel", "hsdp", "--pace", "0.1", "--global-batch", "256")),
    Case("a world of three, replicas by hand", ("node-loss@17:1",), (Expected("lost", 12, decoded(1, 3)),),
         arguments=("--parallel", "plain", "--pace", "0.1", "--micro-batch", "30", "--global-batch", "256"),
         spec={"workers": {"replicas": 3}}),
    Case("two ranks a node, uneven shards", ("node-loss@17:1",), (Expected("lost", 12, decoded(2, 6)),),
         spec={"workers": {"replicas": 3, "procsPerWorker": 2}},
         arguments=("--parallel", "fsdp", "--pace", "0.1", "--global-batch", "256")),
    Case("dropout, BatchNorm, workers, fused, average", ("node-loss@17:1", "rank-crash@31:0"),
         (Expected("lost", 12, decoded(1)), Expected("rank 0", 12, LOCAL)),
         arguments=("--parallel", "ddp", "--model", "rich", "--workers", "1", "--width", "512", "--pace", "0.1", "--global-batch", "256")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_run_through_faults_ends_with_the_same_weights(
    case: Case, tmp_path: pathlib.Path, undisturbed: Undisturbed
) -> None:
    steps = () if "--steps" in case.arguments else ("--steps", str(STEPS))
    spec = job("train.py", *case.arguments, *steps, **case.spec)
    reference = undisturbed(spec)
    outcome = trainctl_run(spec, tmp_path, case.faults, case.options)

    assert outcome.status == 0, outcome.output
    assert sorted(fault["fault"] for fault in outcome.faults()) == sorted(case.faults)
    assert all(fault["done"] for fault in outcome.faults())
    check_recoveries(outcome, case.expected)
    assert outcome.digest == reference.digest
    expected = {step: values[0] for step, values in reference.losses().items()}
    for step, values in outcome.losses().items():
        assert set(values) == {expected[step]}, f"losses of step {step}"


def check_recoveries(outcome: Outcome, expected: tuple[Expected, ...]) -> None:
    recoveries = outcome.recoveries
    assert len(recoveries) == len(expected), recoveries
    for recovery, wanted in zip(recoveries, expected, strict=True):
        assert wanted.cause in f"{recovery['cause']} {recovery.get('kind')}", recovery
        assert 0 <= recovery["lost_steps"] <= wanted.lost, recovery
        found = {source: count for source, count in recovery["restore_sources"].items() if count}
        assert found == wanted.sources, recovery
        if wanted.restored is not None:
            assert recovery["restored_step"] == wanted.restored


def test_replicas_that_come_to_differ_are_kept_apart(tmp_path: pathlib.Path, undisturbed: Undisturbed) -> None:
    arguments = (
        "--parallel",
        "plain",
        "--apart-from",
        "12",
        "--width",
        "384",
        "--pace",
        "0.1",
        "--global-batch",
        "256",
    )
    spec = job("train.py", *arguments, "--steps", str(STEPS))
    reference = undisturbed(spec)
    outcome = trainctl_run(spec, tmp_path, ["node-loss@33:3"])
    assert outcome.status == 0, outcome.output
    for run in (reference, outcome):
        assert any("ranks [1, 2, 3] against rank 0" in event["text"] for event in run.events("silent-corruption"))
    # A snapshot that is under way when the node dies is none: on a slow machine two of them are 12 steps apart.
    check_recoveries(outcome, (Expected("seat 3", 24, decoded(1)),))
    assert outcome.recoveries[0]["restored_step"] > 12
    assert outcome.digest == reference.digest


def test_a_straggler_is_named(tmp_path: pathlib.Path, undisturbed: Undisturbed) -> None:
    spec = job("train.py", *FSDP, "--steps", str(STEPS))
    outcome = trainctl_run(spec, tmp_path, ["straggler@4:2*4"])
    assert outcome.status == 0, outcome.output
    assert outcome.recoveries == []
    assert any("rank 2" in event["text"] for event in outcome.events("straggler")), outcome.output
    assert outcome.digest == undisturbed(spec).digest


def test_the_same_error_at_the_same_step_is_a_bug_of_the_script(tmp_path: pathlib.Path) -> None:
    spec = job("failing.py", "7")
    outcome = trainctl_run(spec, tmp_path)
    assert outcome.status == 1
    assert outcome.report["phase"] == "Failed"
    assert outcome.report["attempts"] == 3
    assert "ZeroDivisionError" in outcome.output
    assert "rank-" in outcome.output, "the log is named"


def test_a_torchrun_script_is_restarted(tmp_path: pathlib.Path) -> None:
    spec = job("torchrun_plain.py", str(tmp_path / "marker"))
    outcome = trainctl_run(spec, tmp_path)
    assert outcome.status == 0, outcome.output
    assert outcome.report["attempts"] == 2
    log = (outcome.folder / "logs" / "rank-0.attempt-2.log").read_text()
    assert "rank 0 of 4: sum 6, restarts 1" in log


def test_too_little_memory_is_said_at_protect(tmp_path: pathlib.Path) -> None:
    spec = job("train.py", *FSDP, "--width", "1024", "--steps", "5", snapshot={"maxMemory": "8Mi"})
    outcome = trainctl_run(spec, tmp_path)
    assert outcome.status == 1
    assert "MiB are missing" in outcome.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small tmpfs")
def test_nodes_that_share_too_small_a_tmpfs_fail_early_with_the_sum(tmp_path: pathlib.Path) -> None:
    """Each alone would fit: 2 slots of 19 MiB with as much parity, 78 MiB of 256; four do not."""
    small = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=256m tmpfs /dev/shm && exec "$@"', "sh")
    outcome = trainctl_run(job("train.py", *FSDP, "--width", "1024", "--steps", "5"), tmp_path, within=small)
    assert outcome.status == 1, outcome.output
    assert "the tmpfs that 4 local nodes share (256 MiB are free, they need" in outcome.output


@pytest.mark.timeout(900)
def test_a_random_soak_ends_identical(tmp_path: pathlib.Path, undisturbed: Undisturbed) -> None:
    import random

    seed, minutes = int(os.environ.get("SOAK_SEED", "1")), float(os.environ.get("SOAK_MINUTES", "1"))
    steps = int(150 * minutes)
    spec = job("train.py", *FSDP, "--steps", str(steps), recovery={"maxRestarts": 1000, "hangTimeout": "5s"})
    generator = random.Random(seed)
    kinds = [
        "rank-crash",
        "rank-error",
        "hang",
        "node-loss",
        "keeper-crash",
        "agent-crash",
        "corrupt",
        "controller-crash",
        "head-loss",
    ]
    faults = []
    for step in range(15, steps - 10, 30):
        kind = generator.choice(kinds)
        target = "" if kind in ("controller-crash", "head-loss") else f":{generator.randrange(4)}"
        part = f"/{generator.choice(['header', 'data', 'parity', 'trailer'])}" if kind == "corrupt" else ""
        faults.append(f"{kind}@{step + generator.randrange(8)}{target}{part}")
    outcome = trainctl_run(spec, tmp_path, faults, timeout=300 + 120 * minutes)
    assert outcome.status == 0, f"seed {seed}, {faults}:\n{outcome.output}"
    assert outcome.digest == undisturbed(spec).digest, f"seed {seed}, {faults}"


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_stops_and_leaves_nothing(tmp_path: pathlib.Path, signals: int) -> None:
    spec = job("train.py", *FSDP, "--steps", "100000")
    outcome = trainctl_run(spec, tmp_path, interrupt=Interrupt("snapshot-committed", signals=signals))
    assert outcome.status == 130, outcome.output
