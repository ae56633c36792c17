"""Do ranks that should hold equal tensors really do? Agreed by checksums, through torch.distributed's store.

Everything here runs in a background thread over a store connection of its own: training's collectives and the main
thread are never involved, and a rank that does not take part costs the others a deadline, not a deadlock.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from outlast.errors import TransferError
from outlast.protect.plan import cut_of, group_equal


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor on the CPU as a uint8 array over the same memory."""
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def digest(tensor: torch.Tensor) -> str | None:
    """XXH3-128 of a local tensor's bytes; None when it tells nothing: it is empty or all its elements are equal.

    Tensors that have not been trained yet (zeros, ones) agree by accident, and must not be taken for replicas.
    """
    if tensor.numel() == 0:
        return None
    view = bytes_of(tensor.cpu().contiguous())
    if _constant(view, tensor.element_size()):
        return None
    return xxhash.xxh3_128_hexdigest(view.data)


def _constant(view: np.ndarray, width: int) -> bool:
    head = view[:4096]
    return head[:-width].tobytes() == head[width:].tobytes() and bool(np.array_equal(view[:-width], view[width:]))


class ReplicaVote:
    """One rank's side of the vote. ``connect`` gives it its own client of the store that rank 0 hosts."""

    def __init__(self, store: Store, rank: int, world: int, deadline_s: float = 60.0) -> None:
        self.store, self.rank, self.world, self.deadline_s = store, rank, world, deadline_s

    @classmethod
    def connect(cls, rank: int, world: int) -> ReplicaVote:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
        )
        return cls(PrefixStore("outlast/replicas", store), rank, world)

    def agree(
        self, name: str, digests: Mapping[str, str | None], given_up: threading.Event
    ) -> dict[str, tuple[int, ...]]:
        """The cut of this rank: post digests, rank 0 compares, all read its verdict.

        Raises TransferError when not all ranks took part in time or ``given_up`` was set.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps({k: v for k, v in digests.items() if v is not None}))
        if self.rank == 0:
            keys = [f"{name}/{rank}" for rank in range(self.world)]
            self._wait(keys, given_up)
            groups = group_equal({rank: json.loads(self.store.get(key)) for rank, key in enumerate(keys)})
            self.store.set(f"{name}/verdict", json.dumps(groups))
        self._wait([f"{name}/verdict"], given_up)
        return cut_of(self.rank, json.loads(self.store.get(f"{name}/verdict")))

    def differing(
        self, name: str, key: str, mine: str, replicas: tuple[int, ...], given_up: threading.Event
    ) -> list[int]:
        """Ranks whose digest of ``key`` is not this rank's; only the set's first rank compares, others get []."""
        self.store.set(f"{name}/{key}/{self.rank}", mine)
        if self.rank != replicas[0]:
            return []
        names = {rank: f"{name}/{key}/{rank}" for rank in replicas}
        self._wait(list(names.values()), given_up)
        theirs = {rank: self.store.get(text).decode() for rank, text in names.items()}
        for text in names.values():
            self.store.delete_key(text)
        return [rank for rank, value in theirs.items() if value != mine]

    def _wait(self, keys: list[str], given_up: threading.Event) -> None:
        for _ in range(max(1, int(self.deadline_s / 0.5))):
            if given_up.is_set():
                raise TransferError("the vote on replicas was given up")
            try:
                self.store.wait(keys, timedelta(seconds=0.5))
                return
            except dist.DistStoreError:
                continue
            except (RuntimeError, ValueError) as error:  # the store's other failures have no class of their own
                raise TransferError(f"the store of torch.distributed is gone: {error}") from error
        raise TransferError(f"not all ranks voted on replicas within {self.deadline_s:.0f} s (waited for {keys[0]} …)")
