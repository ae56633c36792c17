"""Every random generator of a process: Python's, NumPy's global one, torch's on CPU and on the current device.

In the world that wrote a snapshot they go on where they were. In another one no rank can: there they are derived anew
from (seed, step, rank, world), where the seed is that of rank 0's first generator and stays the same for ever.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def capture(seed: int | None = None) -> dict[str, Any]:
    """The state of all generators, as a tree of numbers and tensors. ``seed``: what a change of the world derives from
    (None: what torch was seeded with).
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "seed": torch.initial_seed() if seed is None else seed,
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state(torch.cuda.current_device())
    return state


def restore(state: dict[str, Any]) -> None:
    """Set all generators to a state that ``capture`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu(), torch.cuda.current_device())


def seed_of(state: Mapping[str, Any]) -> int:
    """What ``derive`` takes, of a state that ``capture`` returned; of an older one, a hash of torch's generator."""
    if "seed" in state:
        return int(state["seed"])
    return int.from_bytes(hashlib.blake2b(state["cpu"].cpu().numpy().tobytes(), digest_size=8).digest(), "little")


def derive(seed: int, step: int, rank: int, world: int) -> None:
    """Set all generators to where these numbers put them: others for each rank, the same whenever it is done.

    Source of the seeds: BLAKE2b over the four as little-endian 64-bit words; 16 bytes for Python, 16 for NumPy, 8 for
    torch on the CPU and 8 for it on the current CUDA device.
    """
    words = struct.pack("<4Q", seed % 2**64, step, rank, world)
    digest = hashlib.blake2b(words, digest_size=48, person=b"outlast-resize").digest()
    random.seed(int.from_bytes(digest[:16], "little"))
    np.random.seed(np.frombuffer(digest[16:32], "<u4"))
    torch.default_generator.manual_seed(int.from_bytes(digest[32:40], "little"))
    if torch.cuda.is_available():
        torch.cuda.manual_seed(int.from_bytes(digest[40:], "little"))
