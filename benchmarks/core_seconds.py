"""Core-seconds of one whole snapshot per GB of state: the ranks' copy with checksums, and the keepers' sending and coding.

4 nodes with a keeper process each, parity 2, warm slots; CPU times as the kernel counts them.

    python benchmarks/core_seconds.py [--mb 100] [--rounds 10]
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import psutil
import torch

from outlast.snapshot.copier import Copier, Piece
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import Entry, ImageFile, plan_layout
from support.keepers import Cluster, cluster


def keeper_times(nodes: Cluster) -> tuple[float, float]:
    """(user, system) seconds of all keepers."""
    times = [psutil.Process(node.process.pid).cpu_times() for node in nodes.nodes]
    return sum(t.user for t in times), sum(t.system for t in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=100, help="state of a node")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    count, each = 50, args.mb * 1_000_000 // 50 // 4
    tensors = [[torch.randn(each) for _ in range(count)] for _ in range(4)]
    entries = [Entry(f"t{i}", "F32", (each,), each * 4) for i in range(count)]
    found: dict[str, list[float]] = {"copy and checksums": [], "keepers, user": [], "keepers, system": []}
    copiers = [Copier() for _ in range(4)]
    with cluster(4) as nodes:
        for number in range(args.rounds + 2):
            generation, slot = Generation(1, number, "a" * 16), number % 2
            layouts = [plan_layout(entries, {"kind": "shard", "seat": str(s), "local_rank": "0"}) for s in range(4)]
            images = [ImageFile.create(nodes.shard_path(seat, slot=slot), layouts[seat]) for seat in range(4)]
            before = time.process_time()
            for seat in range(4):
                pieces = [Piece(f"t{i}", tensors[seat][i], 0, each * 4) for i in range(count)]
                copiers[seat].start(images[seat], generation, {}, pieces).wait(60)
            copied = time.process_time() - before
            user, system = keeper_times(nodes)
            lengths = {0: [layout.total_bytes for layout in layouts]}
            for reply in nodes.encode(nodes.encode_args(generation, lengths, 2, slot)):
                if isinstance(reply, Exception):
                    raise reply
            after_user, after_system = keeper_times(nodes)
            for image in images:
                image.close()
            if number >= 2:
                size = sum(lengths[0]) / 1e9
                found["copy and checksums"].append(copied / size)
                found["keepers, user"].append((after_user - user) / size)
                found["keepers, system"].append((after_system - system) / size)
    print(
        f"4 nodes of {args.mb} MB, parity 2, {args.rounds} generations in warm slots; core-seconds per GB of state, medians"
    )
    print("| part | core-s/GB |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.2f} |")
    total = statistics.median(sum(row) for row in zip(*found.values(), strict=True))
    print(f"| whole (target <= 2) | {total:.2f} |")


if __name__ == "__main__":
    main()
