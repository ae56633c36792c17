"""A model and its digest in plain PyTorch: what scripts without outlast are given. Imports nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """Parameters that do not divide by three, one in bfloat16, a tied one, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.register_buffer("cache", torch.arange(4.0), persistent=False)


def make_optimizer(model: Net) -> torch.optim.Optimizer:
    body = [parameter for parameter in model.parameters() if parameter is not model.scale]
    return torch.optim.AdamW([{"params": body}, {"params": [model.scale], "lr": 0.5}], lr=1e-2)


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over name, type, shape and bytes of each tensor, in the order of names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        found.update(f"{name}|{kind}|{list(tensor.shape)}|".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def optimizer_digest(optimizer: torch.optim.Optimizer) -> str:
    """The same over the optimizer's state, with its groups' options."""
    tensors: dict[str, torch.Tensor] = {}
    options: list[Any] = []
    for number, group in enumerate(optimizer.param_groups):
        options.append(sorted((key, repr(value)) for key, value in group.items() if key != "params"))
        for index, parameter in enumerate(group["params"]):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{number}.{index}.{key}"] = value
    return digest(tensors) + hashlib.sha256(repr(options).encode()).hexdigest()
