"""Whole runs whose number of nodes changes: nothing is lost, every sample is used once, in the same order, and losses
agree with the undisturbed run's to floating-point reordering.

What agreement to expect is derived and measured. A resized run adds the same float32 numbers in another order: the loss
of a step is the mean of n = 64 samples x 64 outputs = 4096 squares, and another order changes such a sum by about
eps sqrt(n) = 7.6e-6 of itself at most (eps = 1.2e-7; N. J. Higham, "Accuracy and Stability of Numerical Algorithms",
section 4: errors of either sign add up like a random walk; sums by pairs, as torch takes them, stay below). The same
happens to gradients, and through the weights a difference could grow from step to step. Whether it does is measured by
the yardstick: the undisturbed run with 3 and with 2 nodes from the first step on, which has the other order in every
one of its 40 steps, a resized run only in those after the resize. Seen: 2e-7, two units in the last place, as much in the
last steps as in the first, for fsdp, hsdp, ddp and plain alike. Resized runs may differ by ``MARGIN`` times as much.
"""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from support.asking import Asking
from support.runs import Outcome, job, trainctl_run

pytestmark = pytest.mark.timeout(400)

SIZE, BATCH, STEPS, SEED = 1000, 64, 40, 7
EPS = 2.0**-23
SUMMANDS = BATCH * 64
MARGIN = 8
"""A resized run is another draw of what the yardstick is the largest of: 40 roundings, seen twice."""


def elastic(folder: pathlib.Path, *arguments: str, **spec: Any) -> dict[str, Any]:
    """A job of 4 nodes that may shrink to 2, and records its samples."""
    workers = {"replicas": 4, "minReplicas": 2, "spares": 0, **spec.pop("workers", {})}
    recovery = {"hangTimeout": "10s", "shrinkAfter": "4s", "growAfter": "1s"}
    given = ("--parallel", "fsdp", "--pace", "0.1", "--global-batch", str(BATCH), "--micro-batch", "8")
    steps = () if "--steps" in arguments else ("--steps", str(STEPS))
    record = ("--record", str(folder / "samples"))
    return job("train.py", *given, *arguments, *steps, *record, workers=workers, recovery=recovery, **spec)


def samples(folder: pathlib.Path) -> dict[int, list[int]]:
    """Step -> the samples of the last attempt that did it, all ranks', in the order of ranks."""
    found: dict[int, dict[int, dict[int, list[int]]]] = {}
    for path in (folder / "samples").iterdir():
        attempt, rank = (int(part.split("-")[1]) for part in path.stem.split("."))
        for line in path.read_text().splitlines():
            step, *indices = map(int, line.split())
            found.setdefault(step, {}).setdefault(attempt, {})[rank] = indices
    return {step: [i for _, own in sorted(by[max(by)].items()) for i in own] for step, by in found.items()}


def global_losses(outcome: Outcome) -> dict[int, float]:
    import json

    rows = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["global_loss"] for row in rows if "global_loss" in row}


def check_samples(outcome: Outcome, folder: pathlib.Path, steps: int = STEPS) -> None:
    """Every sample of an epoch once, and each step's global batch the one that the order says."""
    from outlast.data import epoch_order

    taken = samples(folder)
    assert sorted(taken) == list(range(steps))
    for step in range(steps):
        wanted = []
        for position in range(step * BATCH, (step + 1) * BATCH):
            epoch, offset = divmod(position, SIZE)
            wanted.append(int(epoch_order(SEED, epoch, SIZE, offset, offset + 1)[0]))
        assert sorted(taken[step]) == sorted(wanted), f"samples of step {step}"


def differences(outcome: Outcome, reference: Outcome) -> list[float]:
    """How much each step's loss differs from the undisturbed run's, as a share of it."""
    expected, found = global_losses(reference), global_losses(outcome)
    assert sorted(found) == sorted(expected)
    return [abs(found[step] - expected[step]) / abs(expected[step]) for step in sorted(found)]


Agree = Callable[[Outcome], None]


@pytest.fixture(scope="module")
def yardstick(tmp_path_factory: pytest.TempPathFactory, reference: Outcome) -> dict[int, list[float]]:
    """The differences of undisturbed runs with fewer nodes from the start, by their number."""
    found = {}
    for nodes in (3, 2):
        folder = tmp_path_factory.mktemp("yardstick")
        outcome = trainctl_run(elastic(folder, workers={"replicas": nodes}), folder)
        assert outcome.status == 0, outcome.output
        found[nodes] = differences(outcome, reference)
    return found


@pytest.fixture
def agree(yardstick: dict[int, list[float]], reference: Outcome) -> Agree:
    """Losses are those of the undisturbed run, to floating-point reordering."""
    allowed = MARGIN * max(EPS, *(max(shares) for shares in yardstick.values()))

    def check(outcome: Outcome) -> None:
        shares = differences(outcome, reference)
        assert max(shares) <= allowed, f"step {shares.index(max(shares))} differs by {max(shares):.1e}"

    return check


def test_another_order_of_sums_changes_losses_by_no_more_than_rounding(yardstick: dict[int, list[float]]) -> None:
    for shares in yardstick.values():
        assert 0 < max(shares) <= EPS * SUMMANDS**0.5
        early, late = max(shares[: STEPS // 2]), max(shares[STEPS // 2 :])
        assert late <= MARGIN * max(EPS, early), "it would grow with the steps"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("reference")
    outcome = trainctl_run(elastic(folder), folder)
    assert outcome.status == 0, outcome.output
    check_samples(outcome, folder)
    return outcome


def resizes(outcome: Outcome) -> list[tuple[int, int]]:
    return [(resize["from"], resize["to"]) for resize in outcome.report["resizes"]]


def run(folder: pathlib.Path, faults: Sequence[str], *options: str, **spec: Any) -> Outcome:
    outcome = trainctl_run(elastic(folder, **spec), folder, faults, options)
    assert outcome.status == 0, outcome.output
    assert all(fault["done"] for fault in outcome.faults()), outcome.faults()
    check_samples(outcome, folder)
    return outcome


def test_a_lost_node_makes_the_job_smaller_and_one_that_joins_larger(tmp_path: pathlib.Path, agree: Agree) -> None:
    outcome = run(tmp_path, ["node-loss@8:1", "node-join@20"], "--replace-after", "never")
    assert resizes(outcome) == [(4, 3), (3, 4)]
    lost, joined = outcome.recoveries
    assert lost["restore_sources"].get("memory-decode") == 1, lost
    assert lost["lost_steps"] <= 12, lost
    assert joined["lost_steps"] == 0, joined
    agree(outcome)


def test_a_node_that_leaves_hands_over_to_the_spare(tmp_path: pathlib.Path, reference: Outcome) -> None:
    outcome = run(tmp_path, ["node-leave@17:2"], "--replace-after", "never", workers={"spares": 1})
    assert [recovery["lost_steps"] for recovery in outcome.recoveries] == [0], outcome.recoveries
    assert outcome.digest == reference.digest
    assert global_losses(outcome) == global_losses(reference)


def test_a_node_that_leaves_without_a_spare_makes_the_job_smaller(tmp_path: pathlib.Path, agree: Agree) -> None:
    outcome = run(tmp_path, ["node-leave@17:0"], "--replace-after", "never")
    assert resizes(outcome) == [(4, 3)]
    assert [recovery["lost_steps"] for recovery in outcome.recoveries] == [0], outcome.recoveries
    agree(outcome)


def test_fewer_and_then_more_nodes_when_that_is_asked_for(tmp_path: pathlib.Path, agree: Agree) -> None:
    """Nobody may shrink this job but by asking; a surplus spare goes too."""

    def resize(folder: pathlib.Path) -> None:
        controller = Asking(folder)
        seats = {seat["seat"]: seat["node"] for seat in controller.until_step(6)["seats"]}
        controller.ask("POST", "/resize", {"replicas": 3, "minReplicas": None, "spares": 0})
        small = controller.until(lambda status: status["workers"]["ready"] == status["workers"]["size"] == 3, 60)
        assert small["nodes"][seats[3]]["state"] == "left"
        assert sorted(node["state"] for node in small["nodes"].values()) == ["active"] * 3 + ["left"] * 2
        controller.until_step(small["step"] + 2)
        controller.ask("POST", "/resize", {"replicas": 4, "minReplicas": None, "spares": 0})
        controller.until(lambda status: status["workers"]["size"] == 4, 60)

    workers = {"spares": 1, "minReplicas": None}
    spec = elastic(tmp_path, "--pace", "0.6", workers=workers)
    outcome = trainctl_run(spec, tmp_path, during=resize)
    assert outcome.status == 0, outcome.output
    check_samples(outcome, tmp_path)
    assert resizes(outcome) == [(4, 3), (3, 4)]
    assert [(recovery["kind"], recovery["lost_steps"]) for recovery in outcome.recoveries] == [("resize", 0)] * 2
    agree(outcome)


@pytest.mark.parametrize("parallel", ["ddp", "plain", "hsdp"])
def test_every_kind_of_parallelism_can_be_resized(tmp_path: pathlib.Path, agree: Agree, parallel: str) -> None:
    """hsdp loses two nodes at once: its mesh needs an even number."""
    lost = ["node-loss@17:1", "node-loss@17:3"] if parallel == "hsdp" else ["node-loss@17:1"]
    spec = elastic(tmp_path, "--parallel", parallel)
    outcome = trainctl_run(spec, tmp_path, lost, ("--replace-after", "never"))
    assert outcome.status == 0, outcome.output
    check_samples(outcome, tmp_path)
    assert resizes(outcome)[-1][1] == 4 - len(lost)
    agree(outcome)


def test_random_resizes_use_every_sample_once(tmp_path: pathlib.Path) -> None:
    generator, steps = random.Random(3), 120
    faults = []
    for step in range(10, steps - 20, 12):
        kind = generator.choice(["node-loss", "node-leave", "node-join", "rank-crash"])
        target = "" if kind == "node-join" else f":{generator.randrange(2)}"
        faults.append(f"{kind}@{step}{target}")
    spec = elastic(tmp_path, "--steps", str(steps), checkpoint={"url": f"file://{tmp_path}/store", "interval": 20})
    outcome = trainctl_run(spec, tmp_path, faults, ("--replace-after", "4"), timeout=390)
    assert outcome.status == 0, f"{faults}:\n{outcome.output}"
    check_samples(outcome, tmp_path, steps)
    assert len(resizes(outcome)) >= 2, (faults, outcome.recoveries)
