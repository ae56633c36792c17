"""Unmodified torchrun code: no outlast in it. Fails once on rank 1 when asked to, so that it must be restarted."""

from __future__ import annotations

import os
import pathlib
import sys

import torch
import torch.distributed as dist


def main() -> None:
    marker = pathlib.Path(sys.argv[1])
    dist.init_process_group("gloo")
    total = torch.ones(1) * dist.get_rank()
    dist.all_reduce(total)
    if dist.get_rank() == 1 and not marker.exists():
        marker.touch()
        raise ValueError("the first attempt fails on purpose")
    print(
        f"rank {dist.get_rank()} of {dist.get_world_size()}: sum {int(total)}, restarts {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
