"""Train the example twice, once undisturbed and once through faults, and compare the weights bit for bit.

make demo
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
FAULTS = ["rank-crash@25:2", "node-loss@50:1", "corrupt@70:3", "node-loss@70:0", "head-loss@90"]
ALL_MEMORY = [f"node-loss@105:{seat}" for seat in range(4)]
"""Beyond any parity: what is left is the object tier."""


def trainctl(folder: pathlib.Path, *options: str) -> dict[str, Any]:
    """Run the example in ``folder``; its output goes to this terminal. Returns the report."""
    command = [sys.executable, "-m", "trainctl", "run", str(HERE / "job.yaml"), "--dir", str(folder), *options]
    status = subprocess.run(command, check=False).returncode
    if status:
        sys.exit(f"demo: the run in {folder} ended with status {status}; see {folder}/events.jsonl and {folder}/logs")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def show(report: dict[str, Any]) -> None:
    print(
        f"  {report['steps']} steps in {report['attempts']} attempts, {report['wall_s']:.1f} s, goodput {report['goodput']['ratio']:.0%}"
    )
    for recovery in report["recoveries"]:
        sources = ", ".join(f"{count} from {source}" for source, count in recovery["restore_sources"].items() if count)
        print(f"  {recovery['cause']}: detected in {recovery['detect_s']:.2f} s, {sources or 'nothing restored'}, "
              f"{recovery['lost_steps']} steps again, going on after {recovery['total_s']:.2f} s")  # fmt: skip
    print(f"  weights {report['weights_digest']}")


def main() -> None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bytelm-demo-"))
    print(f"demo: two runs on 4 local nodes and a spare; files in {folder}\n\ndemo: undisturbed", flush=True)
    undisturbed = trainctl(folder / "undisturbed")
    print(
        f"\ndemo: the same with {', '.join(FAULTS)}, then all nodes lost at once, with checkpoints in a folder",
        flush=True,
    )
    store = [f"--set=checkpoint.url=file://{folder}/disturbed/store", "--set=checkpoint.interval=20"]
    faults = [f"--fault={fault}" for fault in (*FAULTS, *ALL_MEMORY)]
    disturbed = trainctl(folder / "disturbed", "--replace-after=2", *store, *faults)
    print("\nundisturbed:")
    show(undisturbed)
    print("through faults:")
    show(disturbed)
    checkpoints = disturbed["checkpoints"]
    print(
        f"  {checkpoints['count']} checkpoints of {checkpoints['bytes'] / 2**20:.0f} MiB in all, the last of step {checkpoints['last_step']}"
    )
    same = undisturbed["weights_digest"] == disturbed["weights_digest"]
    print(f"\nweights {'are identical, bit for bit' if same else 'DIFFER'}")
    if not same:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
