"""Whole runs: what a snapshot every 10 steps costs, in time and in core-seconds, and how long recoveries take.

python benchmarks/whole.py overhead     4 nodes of 100 MB, a whole snapshot every 10 steps against none
python benchmarks/whole.py recoveries   rank-crash, node-loss with a spare, head-loss on the demo model
python benchmarks/whole.py shrink       node-loss without a spare: the first step of 3 nodes on the demo model
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

EXAMPLE = pathlib.Path(__file__).resolve().parents[1] / "examples" / "bytelm"


def trainctl(folder: pathlib.Path, arguments: list[str], *options: str) -> dict[str, Any]:
    entrypoint = json.dumps(["python", "train.py", *arguments])
    command = [sys.executable, "-m", "trainctl", "run", str(EXAMPLE / "job.yaml"), "--dir", str(folder)]
    command += ["--set", f"spec.entrypoint={entrypoint}", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def step_lengths(folder: pathlib.Path, skip: int) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step_s"] for row in rows if "step_s" in row and row["step"] > skip]


def overhead(base: pathlib.Path, rounds: int, steps: int) -> None:
    """Runs alternate; the mean step counts, since a snapshot lengthens only some of them."""
    arguments = ["--size", "bench", "--steps", str(steps), "--global-batch", "8", "--validate-every", "100000"]
    lengths: dict[str, list[float]] = {"none": [], "every 10": []}
    committed = 0
    for number in range(rounds):
        for name, every in (("none", "1000000"), ("every 10", "10")):
            folder = base / f"{name}-{number}".replace(" ", "-")
            report = trainctl(
                folder, arguments, "--set", f"spec.snapshot.everySteps={every}", "--set", "spec.workers.spares=0"
            )
            lengths[name] += step_lengths(folder, 5)
            if name == "every 10":
                committed += report["snapshots"]["count"]
                size = report["snapshots"]["bytes"] / max(1, report["snapshots"]["count"])
    without, with_snapshots = statistics.mean(lengths["none"]), statistics.mean(lengths["every 10"])
    print(f"4 nodes, {size / 4e6:.0f} MB a node, {rounds} runs of {steps} steps each way, {committed} generations committed "
          f"of {rounds * ((steps - 1) // 10)}")  # fmt: skip
    print(f"step without {without:.3f} s, with a snapshot every 10 steps {with_snapshots:.3f} s: "
          f"{with_snapshots / without - 1:+.1%} (target <= +5%)")  # fmt: skip


def recoveries(base: pathlib.Path, rounds: int) -> None:
    cases = {
        "rank-crash": ("rank-crash@31:2", 2),
        "node-loss": ("node-loss@31:1", 5),
        "head-loss": ("head-loss@31", 20),
    }
    print("| fault | to first new step done, each run (s) | median | target |\n|---|---|---|---|")
    for name, (fault, target) in cases.items():
        found = []
        for number in range(rounds):
            report = trainctl(base / f"{name}-{number}", ["--steps", "45", "--validate-every", "100"], "--fault", fault)
            found += [recovery["total_s"] for recovery in report["recoveries"]]
        print(
            f"| {name} | {', '.join(f'{s:.2f}' for s in found)} | {statistics.median(found):.2f} | <= {target} |",
            flush=True,
        )


def shrink(base: pathlib.Path, rounds: int) -> None:
    """The job waits for ``shrinkAfter`` on purpose: that much is taken off. The recovery's own parts are beside it."""
    waits, target = 1.0, 6
    arguments = ["--steps", "50", "--global-batch", "64", "--micro-batch", "8", "--validate-every", "100"]
    options = ["--fault", "node-loss@31:1", "--replace-after", "never"]
    for setting in ("workers.spares=0", "workers.minReplicas=2", f"recovery.shrinkAfter={waits:g}s"):
        options += ["--set", f"spec.{setting}"]
    found = []
    print(
        "| run | whole (s) | less shrinkAfter | detect | stop | restore | start | steps lost |\n|---|---|---|---|---|---|---|---|"
    )
    for number in range(rounds):
        report = trainctl(base / f"shrink-{number}", arguments, *options)
        assert [(resize["from"], resize["to"]) for resize in report["resizes"]] == [(4, 3)], report["resizes"]
        [recovery] = report["recoveries"]
        found.append(recovery["total_s"] - waits)
        parts = " | ".join(f"{recovery[part]:.2f}" for part in ("detect_s", "stop_s", "restore_s", "start_s"))
        print(
            f"| {number + 1} | {recovery['total_s']:.2f} | {found[-1]:.2f} | {parts} | {recovery['lost_steps']} |",
            flush=True,
        )
    middle = statistics.median(found)
    print(f"\nnode-loss to the first new step of 3 nodes done, less shrinkAfter ({waits:g} s): median {middle:.2f} s "
          f"(target <= {target} s: {'met' if middle <= target else 'missed'})")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "recoveries", "shrink"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=41)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="outlast-bench-") as folder:
        if args.what == "overhead":
            overhead(pathlib.Path(folder), args.rounds, args.steps)
        else:
            {"recoveries": recoveries, "shrink": shrink}[args.what](pathlib.Path(folder), args.rounds)


if __name__ == "__main__":
    main()
