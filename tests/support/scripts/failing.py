"""Fails at the same step in every attempt."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import outlast


def main() -> None:
    run = outlast.init()
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = outlast.ElasticSampler(100, global_batch=8, seed=1)
    loader = DataLoader(TensorDataset(torch.randn(100, 4)), batch_sampler=sampler)
    run.protect(model=model, optimizer=optimizer, sampler=sampler)
    for (x,) in run.steps(loader, total=20):
        if run.step == int(sys.argv[1]):
            1 / 0  # noqa: B018
        model(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
