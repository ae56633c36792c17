"""From images back to live objects.

``Shards`` reads one generation: this rank's own image from its node's memory, parts of replicated leaves from the other
replicas' keepers. ``reload`` writes everything back: parameters and buffers in place, optimizer states exactly as they
were (dtype included), the rest through ``load_state_dict``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from outlast.errors import ImageError, StateError
from outlast.protect.leaves import Collector, Stateful, clean, local_of, make_leaf
from outlast.protect.plan import STATE, decode_state, part_range
from outlast.protect.tree import Json, unflatten
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import ImageFile, Layout


class ShardReader(Protocol):
    """Reads bytes of one rank's image: a local file, or a keeper's ``read``."""

    def layout(self) -> Layout: ...

    def read_into(self, offset: int, target: memoryview) -> None: ...


class LocalShard:
    """This node's own image file of one generation, verified once more: nobody trains on bytes that were not."""

    def __init__(self, path: pathlib.Path, generation: Generation) -> None:
        """Raises ImageError when the file is of another generation, or not sealed, or any block does not verify."""
        self._image = ImageFile.open(path)
        if self._image.generation != generation:
            raise ImageError(f"{path} holds generation {self._image.generation}, not {generation}")
        if not all(self._image.verify()):
            raise ImageError(f"{path} has blocks that do not verify")

    def layout(self) -> Layout:
        return self._image.layout

    def read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self._image.view(offset, len(target))

    def close(self) -> None:
        self._image.close()


@dataclass
class Shards:
    """One generation as this rank sees it. ``open_shard(rank)`` is called for each other rank that is needed."""

    own: ShardReader
    open_shard: Callable[[int], ShardReader]
    rank: int
    _others: dict[int, ShardReader] = field(default_factory=dict)

    def names(self) -> dict[str, Mapping[str, Any]]:
        """Leaf name -> the header's information about it."""
        return {entry.name: entry.info for entry in self.own.layout().entries if "leaf" in entry.info}

    def state(self) -> Json:
        return decode_state(self._bytes(self.own, STATE))

    def tensor(self, name: str) -> torch.Tensor:
        """A leaf's local tensor on the CPU, put together from its parts."""
        info = self.own.layout().entry(name).info
        dtype = getattr(torch, info["dtype"])
        if not info["nbytes"]:
            return torch.empty(info["shape"], dtype=dtype)
        buffer = np.empty(info["nbytes"], np.uint8)
        replicas = info["replicas"]
        for index, rank in enumerate(replicas):
            start, stop = part_range(info["nbytes"], index, len(replicas))
            if stop > start:
                shard = self._shard(rank)
                shard.read_into(shard.layout().entry(name).offset, buffer.data[start:stop])
        return torch.from_numpy(buffer).view(dtype).reshape(info["shape"])

    def _shard(self, rank: int) -> ShardReader:
        if rank == self.rank:
            return self.own
        if rank not in self._others:
            self._others[rank] = self.open_shard(rank)
        return self._others[rank]

    @staticmethod
    def _bytes(shard: ShardReader, name: str) -> bytes:
        entry = shard.layout().entry(name)
        buffer = bytearray(entry.nbytes)
        shard.read_into(entry.offset, memoryview(buffer))
        return bytes(buffer)


def reload(collector: Collector, shards: Shards) -> dict[str, Any]:
    """Write one generation's state into the protected objects; returns the session's own state.

    Raises StateError that names what does not fit: a missing, unexpected or differently shaped tensor or object.
    """
    state = shards.state()
    _check_objects(collector, state["objects"], shards.names())
    for name, parameter in collector.parameters.values():
        _copy_in(name, parameter, shards)
    for key, module in collector.modules.items():
        for part, place, name, buffer in _buffers(module):
            if buffer is not None:
                _copy_in(f"{key}/{name}", buffer, shards)
            elif f"{key}/{name}" in shards.names():
                part._buffers[place] = shards.tensor(f"{key}/{name}")  # one that the first forward would make
        if key in state["objects"]:
            _load_extra_state(module, unflatten(state["objects"][key], shards.tensor))
    for key in collector.optimizers:
        _load_optimizer(collector, key, state["objects"][key], shards)
    for key, value in collector.others.items():
        _load_other(value, unflatten(state["objects"][key], shards.tensor))
    session: dict[str, Any] = unflatten(state["session"], shards.tensor)
    return session


def _check_objects(collector: Collector, saved: Mapping[str, Json], names: Mapping[str, Any]) -> None:
    stateful = set(collector.optimizers) | set(collector.others)
    missing = sorted(stateful - set(saved))
    modules = {f"{key}/" for key in collector.modules}
    expected = {name for name, _ in collector.parameters.values()}
    buffers = [(f"{key}/{n}", b) for key, module in collector.modules.items() for _, _, n, b in _buffers(module)]
    expected |= {name for name, buffer in buffers if buffer is not None}
    late = {name for name, buffer in buffers if buffer is None}
    held = {n for n in names if any(n.startswith(prefix) and not n.startswith(f"{prefix}extra/") for prefix in modules)}
    problems = [f"protect({name}=...) is not in the snapshot" for name in missing]
    problems += [f"{name} is in the script but not in the snapshot" for name in sorted(expected - held)]
    problems += [f"{name} is in the snapshot but not in the script" for name in sorted(held - expected - late)]
    keys = {name.split("/", 1)[0] for name in names if not name.startswith("__")} | set(saved)
    problems += [f"{key}= is in the snapshot but not protected now" for key in sorted(keys - set(collector.objects))]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise StateError(f"the script does not fit the snapshot: {shown}. Was the script changed between attempts?")


def _buffers(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, str, torch.Tensor | None]]:
    """(owner, its name there, full clean name, buffer) of every buffer, those that are None yet too."""
    for path, part in module.named_modules():
        for place, buffer in part._buffers.items():
            yield part, place, clean(f"{path}.{place}" if path else place), buffer


def _copy_in(name: str, live: torch.Tensor, shards: Shards) -> None:
    local, saved = local_of(live), shards.tensor(name)
    if local.shape != saved.shape or local.dtype != saved.dtype:
        raise StateError(
            f"tensor {name!r} is {tuple(local.shape)} {local.dtype} in the script "
            f"but {tuple(saved.shape)} {saved.dtype} in the snapshot"
        )
    with torch.no_grad():
        local.copy_(saved)


def _load_extra_state(module: torch.nn.Module, extra: Mapping[str, Any]) -> None:
    for name, part in module.named_modules():
        if clean(name) in extra:
            part.set_extra_state(extra[clean(name)])


def _load_optimizer(collector: Collector, key: str, saved: Json, shards: Shards) -> None:
    optimizer = collector.optimizers[key]
    groups = unflatten(saved["groups"], shards.tensor)
    if len(groups) != len(optimizer.param_groups):
        raise StateError(f"{key} has {len(optimizer.param_groups)} parameter groups but the snapshot has {len(groups)}")
    for live, options in zip(optimizer.param_groups, groups, strict=True):
        for option, value in options.items():
            if isinstance(live.get(option), torch.Tensor) and isinstance(value, torch.Tensor):
                live[option].copy_(value)
            else:
                live[option] = value
    optimizer.state.clear()
    optimizer.state.update(unflatten(saved["others"], shards.tensor))
    for name, parameter in collector.parameters_of(key):
        if id(parameter) not in collector.parameters:
            _copy_in(name, parameter, shards)
        if name in saved["states"]:
            tensor = partial(_optimizer_tensor, parameter=parameter, shards=shards)
            optimizer.state[parameter] = unflatten(saved["states"][name], tensor)


def _optimizer_tensor(name: str, parameter: torch.Tensor, shards: Shards) -> torch.Tensor:
    """A tensor of an optimizer's state as it was: its dtype, its device, a DTensor again if it was one."""
    info = shards.own.layout().entry(name).info
    saved = shards.tensor(name)
    if not info["distributed"] and saved.shape == parameter.shape:
        saved = torch.empty_like(parameter, dtype=saved.dtype, device="cpu").copy_(saved)  # strides as the parameter's
    if info["distributed"]:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            saved.to(local_of(parameter).device),
            parameter.device_mesh,  # type: ignore[attr-defined]
            parameter.placements,  # type: ignore[attr-defined]
            run_check=False,
            shape=torch.Size(info["global_shape"]),
            stride=parameter.stride(),
        )
    return saved if info["device"] == "cpu" else saved.to(parameter.device)


def _load_other(live: Any, saved: Any) -> None:
    if isinstance(live, Stateful):
        live.load_state_dict(saved)
    elif isinstance(live, dict):
        live.clear()
        live.update(saved)
    elif isinstance(live, list):
        live[:] = saved
    else:
        local_of(make_leaf("tensor", live, lazy=False).tensor).copy_(saved)
