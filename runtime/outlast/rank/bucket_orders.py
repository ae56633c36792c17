"""The bucket orders of a script's DistributedDataParallel objects, over the steps of a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from outlast.protect import ddp


class BucketOrders:
    """Of the DDP objects alive, settled at boundaries so that a snapshot sees the next step's order."""

    def __init__(self) -> None:
        self._found: list[Any] = []
        self._orders: list[list[list[int]]] | None = None
        self._settled = False

    def find(self, parameters: Iterable[torch.Tensor]) -> None:
        """Look for the DDP objects that hold one of these."""
        self._found = ddp.instances(parameters)
        self._settled, self._orders = not self._found, None

    def settle(self) -> None:
        """Rebuild buckets now if DDP is about to at its next forward (collective, like that; once per object)."""
        if self._settled:
            return
        rebuilt = [ddp.rebuild_buckets(found) for found in self._found]
        if any(rebuilt):
            self._orders = None
        self._settled = all(ddp.is_settled(found) for found in self._found)

    def orders(self) -> list[list[list[int]]]:
        """The order in force of each."""
        if self._orders is None:
            self._orders = [ddp.bucket_order(found) for found in self._found]
        return self._orders

    def restore(self, orders: list[list[list[int]]]) -> None:
        """Set what ``orders`` returned."""
        for found, order in zip(self._found, orders, strict=False):
            ddp.set_bucket_order(found, order)
