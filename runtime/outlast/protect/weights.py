"""The trained weights, whole: gathered tensor by tensor, written as safetensors, and digested.

The digest is SHA-256 over the model's state in the order of names: for each tensor its name, dtype, shape and full
unsharded bytes, names without wrappers' prefixes, rank 0's tensor where ranks differ.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from outlast.protect.leaves import clean, reshard, state_tensors
from outlast.protect.plan import SAFETENSORS_NAMES
from outlast.protect.replicas import bytes_of


def full_state(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor on the CPU) in the order of names. A collective: every rank must exhaust it.

    With one module protected the names are its own; with several, each is prefixed by its key in ``protect``. Raises
    StateError when two tensors would share a name.
    """
    reshard(modules)
    named: dict[str, torch.Tensor] = {}
    for key, path, tensor in state_tensors(modules):
        named[f"{key}.{clean(path)}" if len(modules) > 1 else clean(path)] = tensor
    for name in sorted(named):
        tensor = named[name]
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        yield name, whole.detach().cpu().resolve_conj().resolve_neg().contiguous()


class WeightsDigest:
    """SHA-256 over tensors fed in the order of names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._hash.update(f"{name}|{dtype}|{list(tensor.shape)}|".encode())
        self._hash.update(bytes_of(tensor).data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_weights(modules: Mapping[str, nn.Module], folder: pathlib.Path | None, rank: int) -> str:
    """Gather the weights on all ranks; rank 0 writes ``folder/model.safetensors`` atomically. Returns the digest.

    A collective. ``folder`` None writes nothing. Tensors that share memory are written once each under their names.
    """
    digest, tensors = WeightsDigest(), {}
    for name, tensor in full_state(modules):
        digest.add(name, tensor)
        if rank == 0 and folder is not None:
            tensors[name] = tensor
    if rank == 0 and folder is not None:
        _save(tensors, folder)
    return digest.hexdigest()


def _save(tensors: Mapping[str, torch.Tensor], folder: pathlib.Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "model.safetensors"
    partial = target.with_suffix(".partial")
    savable = {
        n: (t if t.dtype in SAFETENSORS_NAMES else t.reshape(-1).view(torch.uint8)).clone() for n, t in tensors.items()
    }
    save_file(savable, partial, metadata={"format": "pt"})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(target)
