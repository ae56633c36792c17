"""Checkpoints as others read them: safetensors in Hugging Face's layout, and a folder of PyTorch's own (DCP).

Both write one tensor at a time. Memory: safetensors needs what ``WholeState`` does, DCP ``FILE_BYTES`` more (or the
largest tensor, where that is more).
"""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from outlast.checkpoint.statedict import LeafRef
from outlast.checkpoint.whole import TensorKind, WholeState
from outlast.errors import RequestError
from outlast.protect.plan import SAFETENSORS_NAMES
from outlast.protect.replicas import bytes_of
from outlast.protect.weights import WeightsDigest

FILE_BYTES = 256 << 20
"""PyTorch's writer keeps all tensors of a file in memory until it is complete: files of a DCP folder are so large."""

_NAMES = {
    **SAFETENSORS_NAMES,
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip

Done = Callable[[int], None]
"""Told how many bytes more are written."""


# --- safetensors ----------------------------------------------------------------------------------------------------


def write_safetensors(
    folder: pathlib.Path, weights: Mapping[str, str], whole: WholeState, shard_bytes: int, done: Done
) -> str:
    """Write ``weights`` (name -> leaf, in the order of names) into files of at most ``shard_bytes`` (or one tensor).

    One file is ``model.safetensors``; several are numbered, with ``model.safetensors.index.json``. Source of the
    layout: https://huggingface.co/docs/hub/models-uploading, safetensors. Returns the digest. Raises RequestError for
    a tensor type that safetensors does not have.
    """
    kinds = {name: whole.kind(leaf) for name, leaf in weights.items()}
    for name, kind in kinds.items():
        if kind.dtype not in _NAMES:
            raise RequestError(f"{name} is {kind.dtype}, which safetensors does not have: write --format dcp")
    shards = list(_in_shards(kinds, shard_bytes))
    digest = WeightsDigest()
    whole.expect(weights.values())
    files = [_file_name(index, len(shards)) for index in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: kinds[name] for name in names}, weights, whole, digest, done)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(kind.nbytes for kind in kinds.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return digest.hexdigest()


def _in_shards(kinds: Mapping[str, TensorKind], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, kind in kinds.items():
        if names and size + kind.nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += kind.nbytes
    yield names


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_file(
    path: pathlib.Path,
    kinds: Mapping[str, TensorKind],
    weights: Mapping[str, str],
    whole: WholeState,
    digest: WeightsDigest,
    done: Done,
) -> None:
    """One file, read in the order of names and laid out by width, so that every tensor is aligned to its elements."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(kinds, key=lambda name: (-kinds[name].dtype.itemsize, name)):
        kind = kinds[name]
        place = [end, end + kind.nbytes]
        header[name] = {"dtype": _NAMES[kind.dtype], "shape": list(kind.shape), "data_offsets": place}
        end += kind.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in kinds:
            tensor = whole.tensor(weights[name])
            digest.add(name, tensor)
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(bytes_of(tensor).data)
            done(kinds[name].nbytes)
        file.flush()
        os.fsync(file.fileno())


# --- DCP ------------------------------------------------------------------------------------------------------------


def write_dcp(folder: pathlib.Path, sections: Mapping[str, Mapping[str, Any]], whole: WholeState, done: Done) -> None:
    """Write ``sections`` (of ``outlast.checkpoint.statedict``) as ``torch.distributed.checkpoint.save`` does."""
    leaves: dict[str, str] = {}
    state: dict[str, Any] = {}
    for section, values in sections.items():
        state[section] = {}
        for name, value in values.items():
            state[section][name] = value
            if isinstance(value, LeafRef):
                kind = whole.kind(value.leaf)
                leaves[f"{section}.{name}"] = value.leaf
                state[section][name] = torch.empty(kind.shape, dtype=kind.dtype, device="meta")
    whole.expect(leaves.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group is meant
        try:
            save(state, storage_writer=_BatchWriter(folder), planner=_Planner(leaves, whole, done), no_dist=True)
        except CheckpointException as error:  # each rank's own error, and there is one rank
            raise error.failures[0][0] from error


def digest_of(weights: Mapping[str, str], whole: WholeState, done: Done) -> str:
    """The weights digest; reads all of them."""
    digest = WeightsDigest()
    whole.expect(weights.values())
    for name, leaf in weights.items():
        tensor = whole.tensor(leaf)
        digest.add(name, tensor)
        done(tensor.nbytes)
    return digest.hexdigest()


class _Planner(DefaultSavePlanner):
    """Plans with tensors that have no bytes, and reads each when it is written."""

    def __init__(self, leaves: Mapping[str, str], whole: WholeState, done: Done) -> None:
        super().__init__()
        self._leaves, self._whole, self._done = leaves, whole, done

    def resolve_data(self, write_item: WriteItem) -> Any:
        leaf = self._leaves.get(write_item.index.fqn)
        if leaf is None:
            return super().resolve_data(write_item)
        tensor = self._whole.tensor(leaf)
        self._done(tensor.nbytes)
        return tensor


class _BatchWriter(FileSystemWriter):
    """Several files of about ``FILE_BYTES`` instead of one."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_batches(plan.items)):
            place = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(replace(plan, items=items, storage_data=place), planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _batches(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    batch: list[WriteItem] = []
    size = 0
    for item in items:
        nbytes = 0
        if item.tensor_data is not None:
            nbytes = item.tensor_data.size.numel() * (item.tensor_data.properties.dtype.itemsize)
        if batch and size + nbytes > FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += nbytes
    if batch:
        yield batch
