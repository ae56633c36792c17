"""Makes what DataLoader workers draw at random a function of the sample, not of the worker or of when it was started.

A worker's random number generators are set from (seed, epoch, index) before it fetches a sample, so that augmentations
come out the same wherever a run is restarted and however many workers share the work. In the main process nothing
changes: its generators are part of the state that snapshots hold.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from outlast.data import SampleIndex
from outlast.errors import RequestError

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class SeededDataset:
    """A map-style dataset behind which each sample is fetched, in a worker, with generators set for that sample.

    Anything else is the wrapped dataset's: attributes are read from and written to it. Indices that are no
    ``SampleIndex`` (another sampler drew them) are fetched as they are. A dataset with ``__getitems__`` fetches its
    micro-batch in one call, so the generators are set once, for the micro-batch's first sample.
    """

    _dataset: Any
    _seed: int

    def __init__(self, dataset: Any, seed: int) -> None:
        object.__setattr__(self, "_dataset", dataset)
        object.__setattr__(self, "_seed", seed)

    def __getitem__(self, index: Any) -> Any:
        self._prepare(index)
        return self._dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        fetch_all = getattr(self._dataset, "__getitems__", None)
        if not fetch_all:
            return [self[index] for index in indices]
        if indices:
            self._prepare(indices[0])
        return fetch_all(indices)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __reduce__(self) -> tuple[type[SeededDataset], tuple[Any, int]]:
        return SeededDataset, (self._dataset, self._seed)

    def _prepare(self, index: Any) -> None:
        from torch.utils.data import get_worker_info

        if isinstance(index, SampleIndex) and get_worker_info() is not None:
            seed_generators(self._seed, index.epoch, int(index))


def seed_generators(seed: int, epoch: int, index: int) -> None:
    """Set the global generators of Python, NumPy and torch (CPU) to where (seed, epoch, index) puts them.

    Source of the seeds: BLAKE2b over the three numbers as little-endian 64-bit words; 16 bytes for Python, 16 for
    NumPy, 8 for torch.
    """
    import torch

    digest = hashlib.blake2b(struct.pack("<3Q", seed, epoch, index), digest_size=40).digest()
    random.seed(int.from_bytes(digest[:16], "little"))
    np.random.seed(np.frombuffer(digest[16:32], "<u4"))
    torch.default_generator.manual_seed(int.from_bytes(digest[32:], "little"))


def attach(loader: DataLoader[Any], seed: int) -> bool:
    """Put a ``SeededDataset`` between ``loader``'s workers and its dataset. Returns whether it is there now.

    Left alone: loaders without workers, and iterable datasets, which have no indices. Call it before the loader is
    iterated: raises RequestError when persistent workers hold the dataset already.
    """
    from torch.utils.data import IterableDataset

    dataset = loader.dataset
    if isinstance(dataset, SeededDataset):
        return True
    if loader.num_workers == 0 or isinstance(dataset, IterableDataset):
        return False
    if loader.persistent_workers and loader._iterator is not None:
        raise RequestError("the loader's persistent workers run already: hand it to outlast before iterating over it")
    # DataLoader refuses assignments to these attributes after its construction.
    loader.__dict__["dataset"] = SeededDataset(dataset, seed)
    return True
