"""From images back to live objects.

``reload`` writes one generation into the protected objects: parameters and buffers in place, optimizer states exactly
as they were (dtype included), the rest through ``load_state_dict``. Where the world is another one, sharded tensors are
put together for the shards that there are now; what each rank had for itself is rank 0's, unless a hook chooses.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from outlast.errors import StateError
from outlast.protect.leaves import (
    OWN,
    Collector,
    ExtraStates,
    Leaf,
    Stateful,
    check_takes_own,
    clean,
    clean_owner,
    local_of,
    make_leaf,
    tensors_in,
)
from outlast.protect.replicas import bytes_of
from outlast.protect.resize import OnResize, chosen_states, follows_its_sampler, set_position
from outlast.protect.shards import LocalPieces, LocalShard, ShardReader, Shards, Want
from outlast.protect.tree import Json, tensor_names, unflatten

__all__ = ["LocalPieces", "LocalShard", "ShardReader", "Shards", "Want", "load_module", "reload"]


def reload(collector: Collector, shards: Shards, on_resize: OnResize | None = None) -> dict[str, Any]:
    """Write one generation's state into the protected objects; returns the session's own state.

    Raises StateError that names what does not fit: a missing, unexpected or differently shaped tensor or object.
    """
    state = shards.state()
    objects = state["objects"]
    leaves = _module_leaves(collector)
    _check(collector, leaves, objects, shards)
    shards.expect(_wants(collector, leaves, state, shards))
    for name, parameter in collector.parameters.values():
        _copy_in(name, parameter, shards)
    for key, module in collector.modules.items():
        _load_buffers(key, module, shards)
        if key in objects:
            _load_extra_state(key, module, unflatten(objects[key], shards.tensor))
    for key in collector.optimizers:
        _load_optimizer(collector, key, objects[key], shards)
    session: dict[str, Any] = unflatten(state["session"], shards.tensor)
    _load_others(collector, objects, shards, on_resize, int(session["step"]))
    return session


def load_module(key: str, module: torch.nn.Module, shards: Shards) -> None:
    """Write the parameters and buffers of the module protected as ``key`` into ``module``, which may be another
    object, sharded in another way or not at all. Raises StateError that names what does not fit.

    Buffers that ``state_dict()`` leaves out are no weights: they are loaded where both have them in one shape.
    """
    state, collector = shards.state(), Collector({key: module})
    leaves = _module_leaves(collector)
    aliases = {name: leaf for name, leaf in state["weights"]["aliases"].items() if leaf is not None}
    places = {name: name if name in shards.names else aliases.get(name, name) for name in leaves}
    held = _held([key], state["objects"], shards)
    for name in _passing_buffers(key, module):
        if places[name] not in held or _misfits({places[name]: leaves[name]}, shards):
            del leaves[name]
    known = {
        *places.values(),
        *_late_buffers(collector),
        *state["weights"]["absent"],
        *(aliases.keys() & places.keys()),
    }
    unused = held - known
    places = {name: places[name] for name in leaves}
    problems = [f"{name} is in the model but not in it" for name, place in places.items() if place not in held]
    problems += [f"{name} is in it but not in the model" for name in sorted(unused)]
    problems += _misfits({places[name]: leaf for name, leaf in leaves.items() if places[name] in held}, shards)
    _refuse(problems, f"the model does not fit {shards.label}", "")
    shards.expect(Want(places[name], leaf) for name, leaf in leaves.items())
    for name, leaf in leaves.items():
        _write(leaf.tensor, shards.tensor(Want(places[name], leaf)))
    _load_late_buffers(key, module, shards)
    if key in state["objects"]:
        _load_extra_state(key, module, unflatten(state["objects"][key], shards.tensor))


# --- does it fit? ---------------------------------------------------------------------------------------------------


def _check(collector: Collector, leaves: Mapping[str, Leaf], saved: Mapping[str, Json], shards: Shards) -> None:
    stateful = set(collector.optimizers) | set(collector.others)
    missing = sorted(stateful - set(saved))
    held, late = _held(collector.modules, saved, shards), _late_buffers(collector)
    problems = [f"protect({name}=...) is not in the snapshot" for name in missing]
    problems += [f"{name} is in the script but not in the snapshot" for name in sorted(set(leaves) - held)]
    problems += [f"{name} is in the snapshot but not in the script" for name in sorted(held - set(leaves) - late)]
    keys = {name.split("/", 1)[0] for name in shards.names if not name.startswith("__")} | set(saved)
    problems += [f"{key}= is in the snapshot but not protected now" for key in sorted(keys - set(collector.objects))]
    problems += _misfits({name: leaf for name, leaf in leaves.items() if name in held}, shards)
    _refuse(problems, f"the script does not fit {shards.label}", " Was the script changed between attempts?")


def _held(keys: Collection[str], saved: Mapping[str, Json], shards: Shards) -> set[str]:
    """The snapshot's parameters and buffers of the modules ``keys``: all of their leaves but those of extra state."""
    extra = {name for key in keys for name in tensor_names(saved.get(key))}
    return {name for name in shards.names if any(name.startswith(f"{key}/") for key in keys)} - extra


def _refuse(problems: list[str], what: str, question: str) -> None:
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise StateError(f"{what}: {shown}.{question}")


def _misfits(leaves: Mapping[str, Leaf], shards: Shards) -> list[str]:
    """Tensors whose shape or dtype is another than the snapshot's; sharded ones are compared as a whole."""
    found = []
    for name, leaf in leaves.items():
        info = shards.info(name)
        spread = leaf.distributed or info["distributed"]
        mine, theirs = (leaf.global_shape, info["global_shape"]) if spread else (leaf.shape, info["shape"])
        dtype = getattr(torch, info["dtype"])
        if tuple(mine) != tuple(theirs) or leaf.tensor.dtype != dtype:
            found.append(
                f"tensor {name!r} is {tuple(mine)} {leaf.tensor.dtype} in the script "
                f"but {tuple(theirs)} {dtype} in the snapshot"
            )
    return found


def _module_leaves(collector: Collector) -> dict[str, Leaf]:
    """The live parameters and buffers of all modules, by name."""
    found = {name: make_leaf(name, parameter, lazy=False) for name, parameter in collector.parameters.values()}
    for key, module in collector.modules.items():
        for _, _, name, buffer in _buffers(module):
            if buffer is not None:
                found[f"{key}/{name}"] = make_leaf(f"{key}/{name}", buffer, lazy=False)
    return found


def _late_buffers(collector: Collector) -> set[str]:
    """Buffers that the first forward would make."""
    return {f"{key}/{n}" for key, module in collector.modules.items() for _, _, n, b in _buffers(module) if b is None}


def _passing_buffers(key: str, module: torch.nn.Module) -> list[str]:
    """Those that are there and that ``state_dict()`` leaves out."""
    found = [(part, place, f"{key}/{name}") for part, place, name, buffer in _buffers(module) if buffer is not None]
    return [name for part, place, name in found if place in part._non_persistent_buffers_set]


def _buffers(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, str, torch.Tensor | None]]:
    """(owner, its name there, full clean name, buffer) of every buffer, those that are None yet too."""
    for path, part in module.named_modules():
        for place, buffer in part._buffers.items():
            yield part, place, clean(f"{path}.{place}" if path else place), buffer


# --- what is read, in the order in which it is loaded -----------------------------------------------------------------


def _wants(collector: Collector, leaves: Mapping[str, Leaf], state: Json, shards: Shards) -> Iterator[Want]:
    objects, places = state["objects"], dict(leaves)
    yield from itertools.starmap(Want, leaves.items())
    for key in collector.modules:
        yield from map(Want, tensor_names(objects.get(key)))
    for key in collector.optimizers:
        yield from map(Want, tensor_names([objects[key]["groups"], objects[key]["others"]]))
        for name, parameter in collector.parameters_of(key):
            if name not in places:
                places[name] = make_leaf(name, parameter, lazy=False)
                _refuse(_misfits({name: places[name]}, shards), f"the script does not fit {shards.label}", "")
                yield Want(name, places[name])
            for tensor in tensor_names(objects[key]["states"].get(name)):
                yield _state_want(tensor, places[name], shards)
    yield from map(Want, tensor_names(state["session"]))


# --- modules ----------------------------------------------------------------------------------------------------------


def _copy_in(name: str, live: torch.Tensor, shards: Shards) -> None:
    _write(local_of(live), shards.tensor(name))


def _write(local: torch.Tensor, saved: torch.Tensor) -> None:
    """Copy; elements of an expanded tensor that are one in memory are written once."""
    for dim, (size, stride) in enumerate(zip(local.shape, local.stride(), strict=True)):
        if stride == 0 and size > 1:
            local, saved = local.narrow(dim, 0, 1), saved.narrow(dim, 0, 1)
    with torch.no_grad():
        local.copy_(saved)


def _load_buffers(key: str, module: torch.nn.Module, shards: Shards) -> None:
    for _, _, name, buffer in _buffers(module):
        if buffer is not None:
            _copy_in(f"{key}/{name}", buffer, shards)
    _load_late_buffers(key, module, shards)


def _load_late_buffers(key: str, module: torch.nn.Module, shards: Shards) -> None:
    for part, place, name, buffer in _buffers(module):
        if buffer is None and f"{key}/{name}" in shards.names:
            part._buffers[place] = shards.tensor(f"{key}/{name}")  # one that the first forward would make


def _load_extra_state(key: str, module: torch.nn.Module, extra: Mapping[str, Any]) -> None:
    parts, there = ExtraStates(module), {clean_owner(path) for path, _ in module.named_modules()}
    for name, state in extra.items():
        part = parts.find(name)
        if part is not None:
            part.set_extra_state(state)
        elif clean_owner(name) in there:
            raise StateError(f"{key}/{name} has extra state in the snapshot but takes none in the script")


# --- optimizers -------------------------------------------------------------------------------------------------------


def _load_optimizer(collector: Collector, key: str, saved: Json, shards: Shards) -> None:
    optimizer = collector.optimizers[key]
    placed = partial(_placed, device=_device_of(optimizer), shards=shards)
    groups = unflatten(saved["groups"], placed)
    if len(groups) != len(optimizer.param_groups):
        raise StateError(f"{key} has {len(optimizer.param_groups)} parameter groups but the snapshot has {len(groups)}")
    others = unflatten(saved["others"], placed)
    _load_own_state(key, optimizer, others.pop(OWN, {}))
    for live, options in zip(optimizer.param_groups, groups, strict=True):
        for option, value in options.items():
            if isinstance(live.get(option), torch.Tensor) and isinstance(value, torch.Tensor):
                live[option].copy_(value)
            else:
                live[option] = value
    optimizer.state.clear()
    optimizer.state.update(others)
    for name, parameter in collector.parameters_of(key):
        if id(parameter) not in collector.parameters:
            _copy_in(name, parameter, shards)
        if name in saved["states"]:
            tensor = partial(_optimizer_tensor, parameter=parameter, shards=shards)
            optimizer.state[parameter] = unflatten(saved["states"][name], tensor)


def _load_own_state(key: str, optimizer: torch.optim.Optimizer, own: dict[str, Any]) -> None:
    """Give an optimizer's own ``load_state_dict`` what only it knows.

    torch's part of it does nothing to that state meanwhile: it would cast it and replace groups, which are loaded as
    they were. Another optimizer inside, whose state is another, is loaded as ever.
    """
    if not own:
        return
    check_takes_own(key, optimizer, own)
    base: Any = torch.optim.Optimizer
    original = base.load_state_dict
    base.load_state_dict = lambda inner, *given, **named: (
        None if inner.state is optimizer.state else original(inner, *given, **named)
    )
    try:
        optimizer.load_state_dict({**optimizer.state_dict(), **own})
    finally:
        base.load_state_dict = original


def _device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """Where an optimizer's first parameter is."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _placed(name: str, device: torch.device, shards: Shards) -> torch.Tensor:
    """A tensor as it was, on ``device`` if it was not on the CPU: nothing else moves an optimizer's there."""
    saved = shards.tensor(name)
    return saved if shards.info(name)["device"] == "cpu" else saved.to(device)


def _state_want(name: str, live: Leaf, shards: Shards) -> Want:
    """How a tensor of an optimizer's state is read: cut like its parameter ``live`` if it was cut like the saved one,
    be it a DTensor or a plain tensor of the local part's shape; else as it is.
    """
    info, saved = shards.info(name), shards.info(live.name)
    if info["distributed"]:
        if tuple(info["global_shape"]) == live.global_shape:
            return Want(name, live)
        if shards.resized and info["shape"] != info["global_shape"]:
            raise StateError(
                f"{name} is cut in another way than {live.name}: "
                "outlast cannot tell which part of it a rank has when their number changes"
            )
        return Want(name)
    if info["shape"] == saved["shape"] and (saved["distributed"] or live.distributed) and info["shape"]:
        return Want(name, live, along=live.name)
    return Want(name)


def _optimizer_tensor(name: str, parameter: torch.Tensor, shards: Shards) -> torch.Tensor:
    """A tensor of an optimizer's state as it was: its dtype, its device, a DTensor again if it was one."""
    info, along, local = shards.info(name), shards.want(name).along, local_of(parameter)
    saved = shards.tensor(name)
    if info["distributed"] or (along is not None and not shards.info(along)["distributed"]):
        return _like_parameter(saved.to(local.device), parameter, info)
    if saved.shape == local.shape:
        saved = torch.empty_like(local, dtype=saved.dtype, device="cpu").copy_(saved)  # strides as the parameter's
    return saved if info["device"] == "cpu" else saved.to(local.device)


def _like_parameter(local: torch.Tensor, parameter: torch.Tensor, info: Mapping[str, Any]) -> torch.Tensor:
    """A DTensor on the parameter's mesh with this local part, where the parameter is one."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(parameter, DTensor):
        return local
    alike, shape = tuple(info["global_shape"]) == tuple(parameter.shape), torch.Size(info["global_shape"])
    whole = not alike and tuple(local.shape) == tuple(shape)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        [Replicate()] * parameter.device_mesh.ndim if whole else parameter.placements,
        run_check=False,
        shape=shape,
        stride=parameter.stride() if alike else torch.empty(shape, device="meta").stride(),
    )


# --- everything else --------------------------------------------------------------------------------------------------


def _load_others(
    collector: Collector, saved: Mapping[str, Json], shards: Shards, on_resize: OnResize | None, step: int
) -> None:
    chosen: Mapping[str, Any] = {}
    if shards.resized and on_resize is not None:
        chosen = chosen_states(on_resize, collector, shards)
    follows = {k for k, v in collector.others.items() if k not in chosen and shards.resized and follows_its_sampler(v)}
    kept = [saved[key] for key in collector.others if key not in chosen and key not in follows]
    shards.expect(Want(name) for name in tensor_names(kept) if not shards.info(name)["distributed"])
    filling, loaded = _Filling(_loaded(collector)), set[int]()
    for key, value in collector.others.items():
        if id(value) in loaded:
            continue  # one object under two keys
        loaded.add(id(value))
        if key in chosen:
            _load_other(key, value, chosen[key], filling)
        elif key not in follows:
            _load_other(key, value, unflatten(saved[key], _tensors_of(collector, key, shards)), filling)
        elif not any(other is value.batch_sampler for other in collector.others.values()):
            set_position(value.batch_sampler, step)


def _tensors_of(collector: Collector, key: str, shards: Shards) -> Callable[[str], torch.Tensor]:
    """Supplies the tensors of an object's state; those that were DTensors are made like the live ones."""
    if not any(info["distributed"] for name, info in shards.names.items() if name.split("/", 1)[0] == key):
        return shards.tensor
    live = collector.tensors_of(key)

    def tensor(name: str) -> torch.Tensor:
        info = shards.info(name)
        if not info["distributed"] or name not in live:
            return shards.tensor(name)
        leaf = make_leaf(name, live[name], lazy=False)
        _refuse(_misfits({name: leaf}, shards), f"the script does not fit {shards.label}", "")
        return _like_parameter(shards.tensor(Want(name, leaf)).to(leaf.tensor.device), live[name], info)

    return tensor


def _load_other(key: str, live: Any, saved: Any, filling: _Filling) -> None:
    if isinstance(live, Stateful):
        live.load_state_dict(saved)
    elif filling.fill(live, list(saved) if isinstance(live, list) else saved, key) is not live:
        raise StateError(
            f"{key} does not take its state: another kind of object, or memory of other state that differs"
        )


def _loaded(collector: Collector) -> Iterator[torch.Tensor]:
    """The live tensors of modules and optimizers."""
    for module in collector.modules.values():
        yield from module.parameters()
        yield from module.buffers()
    for key, optimizer in collector.optimizers.items():
        yield from (parameter for _, parameter in collector.parameters_of(key))
        yield from tensors_in(optimizer.state)


class _Filling:
    """Puts saved state into live dicts and lists, and into the tensors in them: who else holds these keeps them.

    A live object takes one state. Memory that was loaded before is written no more: a tensor in it stays where that
    part has the saved bits already, and the rest of it is filled; else it is replaced.
    """

    def __init__(self, loaded: Iterable[torch.Tensor]) -> None:
        self._filled: dict[int, object] = {}
        self._starts, self._stops = list[int](), list[int]()
        for local in map(local_of, loaded):
            self._take(local)

    def fill(self, live: Any, saved: Any, path: str) -> Any:
        """``saved``, in ``live`` where that can take it. Raises StateError for another shape of what is trained."""
        content = saved
        if isinstance(saved, Mapping):
            known = live if isinstance(live, Mapping) else {}
            content = {key: self.fill(known.get(key), value, f"{path}/{key}") for key, value in saved.items()}
        elif isinstance(saved, (list, tuple)):
            old = live if isinstance(live, (list, tuple)) else ()
            pairs = itertools.zip_longest(old[: len(saved)], saved)
            content = [self.fill(one, value, f"{path}/{index}") for index, (one, value) in enumerate(pairs)]
            content = tuple(content) if isinstance(saved, tuple) else content
        return live if self._put(live, content, path) else content

    def _put(self, live: Any, content: Any, path: str) -> bool:
        """Whether a live object has that content now."""
        match live, content:
            case torch.Tensor(), torch.Tensor():
                return self._write(live, content, path)
            case np.ndarray(), np.ndarray():
                return self._write_array(live, content, path)
            case (MutableMapping(), dict()) | (set(), set()):
                if self._is_new(live):
                    live.clear()
                    live.update(content)
                    return True
            case list(), list():
                if self._is_new(live):
                    live[:] = content
                    return True
        return False

    def _is_new(self, container: object) -> bool:
        known = id(container) in self._filled
        self._filled[id(container)] = container
        return not known

    def _write_array(self, live: npt.NDArray[Any], saved: npt.NDArray[Any], path: str) -> bool:
        try:
            return live.flags.writeable and self._write(torch.from_numpy(live), torch.from_numpy(saved.copy()), path)
        except (TypeError, ValueError):  # arrays that torch cannot look at
            return False

    def _write(self, live: torch.Tensor, saved: torch.Tensor, path: str) -> bool:
        local, new = local_of(live), local_of(saved)
        if not _is_like(live, saved):
            if live.requires_grad and live.is_leaf:
                raise StateError(
                    f"tensor {path!r} is {tuple(local.shape)} {local.dtype} in the script but {tuple(new.shape)} "
                    f"{new.dtype} in the snapshot, and is trained: make it as it was before protect"
                )
            return False
        if local.layout is not torch.strided or local.is_quantized or local.is_meta or local.is_inference():
            return False
        if any(stride == 0 and size > 1 for size, stride in zip(local.shape, local.stride(), strict=True)):
            return False
        if not _has_bits(local, new, self._taken(local)):
            return False
        _write(local, new)
        self._take(local)
        return True

    def _taken(self, local: torch.Tensor) -> Sequence[tuple[int, int]]:
        """The parts of a tensor's memory that were loaded before: addresses, counted from its first element's."""
        if not local.numel():
            return ()
        (start, stop), met = _span(local), self._met(local)
        pairs = zip(self._starts[met], self._stops[met], strict=True)
        return [(max(first, start) - start, min(last, stop) - start) for first, last in pairs]

    def _take(self, local: torch.Tensor) -> None:
        """A tensor's memory is loaded now."""
        if local.numel():
            (start, stop), met = _span(local), self._met(local)
            start, stop = min([start, *self._starts[met]]), max([stop, *self._stops[met]])
            self._starts[met], self._stops[met] = [start], [stop]

    def _met(self, local: torch.Tensor) -> slice:
        """Which of the spans that were loaded before have memory in common with a tensor's."""
        start, stop = _span(local)
        return slice(bisect.bisect_right(self._stops, start), bisect.bisect_left(self._starts, stop))


def _has_bits(local: torch.Tensor, new: torch.Tensor, taken: Sequence[tuple[int, int]]) -> bool:
    """Whether the bytes of ``local`` that are ``taken`` are those of ``new``; where it has gaps in memory, all are."""
    if not taken:
        return True
    wanted = torch.empty_like(local)
    if wanted.stride() != local.stride() or local.is_conj() or local.is_neg():
        return _bits(local) == _bits(new)
    wanted.copy_(new)
    flat = (tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in (local, wanted))
    mine, theirs = (tensor.view(torch.uint8) for tensor in flat)
    return all(torch.equal(mine[first:last], theirs[first:last]) for first, last in taken)


def _is_like(live: torch.Tensor, saved: torch.Tensor) -> bool:
    local, new = local_of(live), local_of(saved)
    sharded = hasattr(live, "_local_tensor") == hasattr(saved, "_local_tensor")
    return sharded and (live.shape, local.shape, local.dtype) == (saved.shape, new.shape, new.dtype)


def _span(local: torch.Tensor) -> tuple[int, int]:
    """The addresses between which a tensor's elements lie."""
    last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    return local.data_ptr(), local.data_ptr() + (last + 1) * local.element_size()


def _bits(local: torch.Tensor) -> bytes:
    return bytes_of(local.cpu().resolve_conj().resolve_neg().contiguous()).tobytes()
