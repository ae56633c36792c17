"""Copy alone, every step: how much longer a step gets when all parameters and AdamW state are copied behind it.

One process, 400 MB of state, steps that keep both cores busy. Runs with and without the copy alternate; medians.

    python benchmarks/every_step.py [--runs 6] [--steps 6]
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time

import torch
from torch import nn

from outlast.protect.capture import Capture, Seat
from outlast.protect.leaves import Collector
from outlast.snapshot.identity import Generation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(32)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randn(900, 1024)

    def step() -> None:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="outlast-bench-", dir="/dev/shm"))
    capture = Capture(Collector({"model": model, "optimizer": optimizer}), Seat(folder, 0, 1, 0, 0))
    capture.make_plan(capture.observe({}), {})
    number, blocked = 0, []

    def begin() -> None:
        nonlocal ticket, number
        began = time.perf_counter()
        ticket = capture.start(
            capture.observe({"step": number}), Generation(1, number, "0" * 16), number % 2, fresh=False
        )
        number += 1
        blocked.append(time.perf_counter() - began)

    ticket = None
    optimizer.register_step_pre_hook(lambda *_: ticket.wait(60) if ticket is not None else None)
    for _ in range(2):
        begin()
        step()
    lengths: dict[bool, list[float]] = {False: [], True: []}
    for run in range(2 * args.runs):
        copying = run % 2 == 1
        for _ in range(args.steps):
            began = time.perf_counter()
            if copying:
                begin()
            else:
                ticket = None
            step()
            lengths[copying].append(time.perf_counter() - began)
    size = (folder / "slot-0-0.img").stat().st_size
    capture.close()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    without, with_copy = statistics.median(lengths[False]), statistics.median(lengths[True])
    print(
        f"{size / 1e6:.0f} MB copied every step, {torch.get_num_threads()} threads, {args.runs} runs of {args.steps} steps each way"
    )
    print(f"step without {without:.3f} s, with {with_copy:.3f} s: {with_copy / without - 1:+.1%} (target <= +4%)")
    print(f"blocked at the boundary: median {statistics.median(blocked[2:]) * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
