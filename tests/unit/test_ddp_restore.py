"""DistributedDataParallel goes on after a restore as it was made: the new reducer has what the old one was given."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from outlast.rank.bucket_orders import BucketOrders

ORDER = (3, 1, 0, 2, 5, 4)


class Crossed(nn.Module):
    """Layers used in another order than they are registered in, so that buckets are rebuilt otherwise."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in ORDER)
        self.unused = nn.Linear(3, 3) if unused else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in ORDER:
            x = self.layers[index](x).tanh()
        return x


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trained:
    """A wrapped model, its optimizer, and the bucket orders a session keeps for it."""

    def __init__(self, options: dict[str, Any], unused: bool) -> None:
        torch.manual_seed(0)
        self.model = Crossed(unused)
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=0.008, **options)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.5)
        self.orders = BucketOrders()
        self.orders.find(self.ddp.parameters())

    def train(self, *steps: int) -> None:
        for step in steps:
            self.orders.settle()
            self.optimizer.zero_grad()
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
            self.ddp(x).pow(2).sum().backward()
            self.optimizer.step()
        self.orders.settle()


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({}, False),
        ({"static_graph": True}, False),
        ({"static_graph": True}, True),
        ({"static_graph": True, "gradient_as_bucket_view": True}, False),
        ({"find_unused_parameters": True}, True),
    ],
    ids=["plain", "static", "static-unused", "static-views", "unused"],
)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used-before"])
def test_ddp_trains_alike_after_its_order_was_set_again(options: dict[str, Any], unused: bool, used: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = Trained(options, unused)
        first.train(0, 1)
        held = {name: value.clone() for name, value in first.model.state_dict().items()}
        orders = first.orders.orders()
        first.train(2, 3)
        again = Trained(options, unused)
        if used:
            again.ddp(torch.ones(2, 32)).sum().backward()
        again.model.load_state_dict(held)
        again.orders.restore(orders)
        again.orders.find(again.ddp.parameters())
        assert again.orders.orders() == orders
        again.train(2, 3)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
