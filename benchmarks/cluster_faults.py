"""What the end-to-end tests measured on the lab's three machines: kubernetes.json as tables.

make e2e TIMINGS=benchmarks/kubernetes.json && python benchmarks/cluster_faults.py
"""

from __future__ import annotations

import json
import pathlib

MEASURED = pathlib.Path(__file__).with_name("kubernetes.json")


def main() -> None:
    found = json.loads(MEASURED.read_text())
    print(f"The example with three nodes and a spare, {found['steps']} steps, checkpoints in S3; goodput "
          f"{found['goodput']:.0%} through {len(found['faults'])} faults; weights as without them.\n")  # fmt: skip
    print(f"From `kubectl apply` to the first step: {found['apply_to_first_step_s']:.1f} s.\n")
    table(found["faults"])
    if "faults of the head" in found:
        print("\nThe head without a word, in a job of three nodes that is suspended and resumed meanwhile:\n")
        table(found["faults of the head"])


def table(faults: dict[str, dict[str, float]]) -> None:
    print("| fault | to the first step (s) | to the first new step (s) | steps done again |\n|---|---|---|---|")
    for name, cost in faults.items():
        print(f"| {name} | {cost['first_step_s']:.1f} | {cost['new_step_s']:.1f} | {cost['steps_again']} |")


if __name__ == "__main__":
    main()
