"""The live tensors of the objects that a script protects, each under a stable name.

A leaf is one rank's local tensor: a parameter or buffer, one tensor of an optimizer's state, or a tensor inside the
``state_dict()`` of anything else. Leaves that only ``Optimizer.step`` changes (parameters in protected optimizers, and
these optimizers' states) are *lazy*: they may be copied until the optimizer's next step. All others are *eager* and
copied at the boundary. Names do not depend on wrappers, ranks or the world size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from outlast.errors import StateError
from outlast.protect.tree import Json, flatten

_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

OWN = "__own__"
"""The key, in the state of an optimizer as a whole, of what its own ``state_dict()`` has beside the usual."""


@runtime_checkable
class Stateful(Protocol):
    """Anything that can say its state and take it back."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Leaf:
    """One rank's local part of one tensor. The same object as long as the tensor keeps its storage.

    ``tensor`` is the live local tensor; ``shape`` and ``offset`` place it in the global tensor of ``global_shape``
    (all in elements). ``distributed``: the live object is a DTensor; ``device``: the kind of device it lives on.
    """

    name: str
    tensor: torch.Tensor
    lazy: bool
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    distributed: bool
    device: str = "cpu"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    @cached_property
    def key(self) -> str:
        """Equal on the ranks whose local tensors are meant to be equal."""
        return f"{self.name}@{','.join(map(str, self.offset))}:{','.join(map(str, self.shape))}:{self.tensor.dtype}"


@dataclass
class Collected:
    """All leaves of the protected objects at one moment, and the JSON state around them."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)
    """JSON text by object: most of it is the same every time and is not written anew."""

    def signature(self) -> tuple[Leaf, ...]:
        """Changes when a lazy tensor appears, goes, or moves to another storage (leaves compare by identity)."""
        return tuple(leaf for leaf in self.leaves.values() if leaf.lazy)


def clean(name: str) -> str:
    """A module-path without the prefixes that DDP, torch.compile and activation checkpointing add."""
    return _WRAPPERS.sub("", name)


def clean_owner(path: str) -> str:
    """The same for the path of a module, which may itself be what a wrapper holds."""
    return clean(f"{path}.")[:-1]


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The rank's own part of a DTensor, without a copy; other tensors as they are."""
    local = getattr(tensor, "_local_tensor", None)
    return local if isinstance(local, torch.Tensor) else tensor.detach()


def make_leaf(name: str, tensor: torch.Tensor, *, lazy: bool) -> Leaf:
    """A leaf of a live tensor. Raises StateError for tensor kinds without plain bytes of their own."""
    local = local_of(tensor)
    distributed = local is not tensor and hasattr(tensor, "_local_tensor")
    if local.layout is not torch.strided or local.is_quantized or local.is_meta:
        raise StateError(
            f"tensor {name!r} ({local.layout}, {local.device}) has no plain bytes; a snapshot cannot hold it"
        )
    if not _has_bytes(local):
        raise StateError(
            f"tensor {name!r} is a {type(tensor).__qualname__} around other tensors and has no bytes of its own; a "
            f"snapshot cannot hold it. Keep it as plain tensors (or a DTensor of plain ones), and make it from them"
        )
    offset: tuple[int, ...] = (0,) * local.dim()
    if distributed:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
    lazy = lazy and local.is_contiguous() and not local.is_conj() and not local.is_neg()
    return Leaf(name, local, lazy, tuple(tensor.shape), tuple(offset), distributed, local.device.type)


def _has_bytes(local: torch.Tensor) -> bool:
    """Whether a local tensor's elements lie where it says: those of a wrapper lie in the tensors inside it."""
    if is_traceable_wrapper_subclass(local):
        return False
    try:
        return local.numel() == 0 or local.data_ptr() != 0
    except RuntimeError:
        return False


def own_state(
    key: str, optimizer: torch.optim.Optimizer, protected: Collection[torch.optim.Optimizer] = ()
) -> dict[str, Any]:
    """What an optimizer's own ``state_dict()`` has beside states and groups; nothing when it is that of torch.

    Raises StateError when it takes other ranks to make one, when its states are others than the optimizer's, when one
    that it wraps, and that is not ``protected`` too, has others, or when nothing takes back what it has beside them.
    """
    kind = type(optimizer)
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in kind.__mro__):
        raise StateError(
            f"{key} is a {kind.__qualname__}, which spreads its state over the ranks and only gathers it all together; "
            f"a snapshot cannot hold it. Use FSDP2 (fully_shard), or DDP with a plain optimizer"
        )
    _check_wrapped(key, optimizer, protected)
    if kind.state_dict is torch.optim.Optimizer.state_dict:
        return {}
    said = optimizer.state_dict()
    if not isinstance(said, Mapping):
        raise StateError(f"{key}: {kind.__qualname__}.state_dict() gave a {type(said).__qualname__}, not a dict")
    held = {id(tensor) for tensor in tensors_in(optimizer.state)}
    if any(id(tensor) not in held for tensor in tensors_in(said.get("state"))):
        raise StateError(
            f"{key}: {kind.__qualname__}.state_dict() has tensors that are not in the optimizer's own .state, so a "
            f"snapshot would miss them. Protect the optimizer that it wraps, and the rest of its state as a dict or "
            f"an object with state_dict()"
        )
    own = {name: value for name, value in said.items() if name not in ("state", "param_groups")}
    if own:
        check_takes_own(key, optimizer, own)
    return own


def _check_wrapped(key: str, optimizer: torch.optim.Optimizer, protected: Collection[torch.optim.Optimizer]) -> None:
    """Raises StateError when an optimizer wraps one with a state of its own, unless that is protected too.

    That is no help to one with its own ``state_dict()``: what takes this back loads the inner one as well, whose groups
    are then no longer the outer's.
    """
    kind = type(optimizer)
    plain = kind.state_dict is torch.optim.Optimizer.state_dict
    for name, inner in _wrapped(optimizer):
        if inner.state is not optimizer.state and not (plain and any(inner is each for each in protected)):
            rest = "in its place, and the rest of its state as a dict, a list or an object with state_dict()"
            raise StateError(
                f"{key}: {kind.__qualname__}.{name} is another optimizer ({type(inner).__qualname__}) with a state of "
                f"its own, which a snapshot of {key} would miss. Protect the optimizer that it wraps "
                f"{'too' if plain else rest}"
            )


def _wrapped(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """(attribute, optimizer) of those that an optimizer holds, be it in a list, tuple or dict."""
    for name, value in vars(optimizer).items():
        if name == "state":  # as many entries as there are parameters
            continue
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        yield from ((name, inner) for inner in held if isinstance(inner, torch.optim.Optimizer))


def check_takes_own(key: str, optimizer: torch.optim.Optimizer, own: Mapping[str, Any]) -> None:
    """Raises StateError when an optimizer does not take back what ``state_dict()`` has beside the usual."""
    if type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict:
        raise StateError(
            f"{key}: state_dict() has {', '.join(map(repr, own))} beside states and groups, which torch's "
            f"load_state_dict() drops: give {type(optimizer).__qualname__} one that takes it"
        )


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in nested mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def reshard(modules: Mapping[str, nn.Module]) -> None:
    """Put every FSDP2 module back to its sharded parameters (after an evaluation they may be whole)."""
    for module in modules.values():
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def has_extra_state(part: nn.Module) -> bool:
    return type(part).get_extra_state is not nn.Module.get_extra_state


class ExtraStates:
    """The parts of a module that have extra state. One that a wrapper holds is called otherwise than one without."""

    def __init__(self, module: nn.Module) -> None:
        parts = [(p, part) for p, part in module.named_modules(remove_duplicate=False) if has_extra_state(part)]
        self._named = {clean_owner(path): part for path, part in parts} | {clean(path): part for path, part in parts}

    def find(self, name: str) -> nn.Module | None:
        """The part of that name; else of the same name with or without wrappers."""
        name = name if name in self._named else clean_owner(name)
        return self._named.get(name)


class Names:
    """Names in use, each for one tensor: without the prefixes of wrappers, two could get the same."""

    def __init__(self, taken: Names | None = None) -> None:
        self._taken: dict[str, tuple[str, object, object]] = dict(taken._taken) if taken else {}

    def take(self, name: str, path: str, what: object, owner: object = None) -> None:
        """Use ``name`` for what ``owner`` has at ``path``. Raises StateError when it is in use for something else."""
        other, known, its_owner = self._taken.setdefault(name, (path, what, owner))
        if not _same(known, what) and (owner is None or owner is not its_owner):
            raise StateError(
                f"{other} and {path} would both be called {name!r}: names leave out the prefixes of wrappers "
                f"(module, _orig_mod and the like). Rename one of the submodules"
            )


def _same(one: object, other: object) -> bool:
    """Whether both are one object, or one tensor (``state_dict()`` makes an object for each name of a tied one)."""
    if one is other or not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other
    mine, theirs = local_of(one), local_of(other)
    plain = mine.layout is theirs.layout is torch.strided and not mine.is_meta
    return plain and (mine.device, mine.dtype) == (theirs.device, theirs.dtype) and mine.is_set_to(theirs)


def state_tensors(
    modules: Mapping[str, nn.Module], *, keep_vars: bool = False
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(key, path, tensor) of each module's ``state_dict()``. Raises StateError when two would share a name."""
    names = Names()
    for key, module in modules.items():
        owners = dict(module.named_modules(remove_duplicate=False))
        for path, tensor in (module.state_dict(keep_vars=True) if keep_vars else module.state_dict()).items():
            if isinstance(tensor, torch.Tensor):
                owner = owners.get(path.rpartition(".")[0])
                names.take(f"{key}.{clean(path)}", f"{key}.{path}", tensor, owner)
                yield key, path, tensor


class Collector:
    """Finds the leaves of protected objects; one per ``Run.protect``.

    Objects may be nn.Modules, torch optimizers, anything Stateful, dicts, lists and tensors.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self.objects = dict(objects)
        self.modules = {key: value for key, value in objects.items() if isinstance(value, nn.Module)}
        self.optimizers = {key: value for key, value in objects.items() if isinstance(value, torch.optim.Optimizer)}
        self.others = {k: v for k, v in objects.items() if k not in self.modules and k not in self.optimizers}
        for key, value in self.others.items():
            if not isinstance(value, (Stateful, dict, list, torch.Tensor)):
                raise StateError(
                    f"protect({key}=...) got a {type(value).__qualname__}: it needs state_dict() and "
                    f"load_state_dict(), or to be a dict, list or tensor"
                )
        reshard(self.modules)
        self.parameters: dict[int, tuple[str, torch.Tensor]] = {}
        self._memo: dict[str, tuple[torch.Tensor, bool, Leaf]] = {}
        self._states: dict[str, _OptimizerStates] = {}
        self._parts = {key: list(module.named_modules()) for key, module in self.modules.items()}
        self._part_ids = {id(part) for parts in self._parts.values() for _, part in parts}
        self._sharded = set[tuple[int, str]]()
        self._names = Names()
        self._index_modules()
        self._check_names()
        for key in self.optimizers:
            flatten(self._own_state(key), f"{key}/others/{OWN}", [])

    def _own_state(self, key: str) -> dict[str, Any]:
        return own_state(key, self.optimizers[key], self.optimizers.values())

    def _leaf(self, name: str, tensor: torch.Tensor, *, lazy: bool) -> Leaf:
        """``make_leaf``, or the leaf made before when the tensor is the same and lies where it lay."""
        known = self._memo.get(name)
        if known is not None and known[0] is tensor and known[1] == lazy:
            leaf = known[2]
            local = getattr(tensor, "_local_tensor", tensor)
            if local.data_ptr() == leaf.tensor.data_ptr() and local.shape == leaf.tensor.shape and not tensor.is_meta:
                return leaf
        leaf = make_leaf(name, tensor, lazy=lazy)
        self._memo[name] = (tensor, lazy, leaf)
        return leaf

    def _index_modules(self) -> None:
        for key, module in self.modules.items():
            for path, parameter in module.named_parameters():
                name = f"{key}/{clean(path)}"
                self._names.take(name, f"{key}.{path}", parameter)
                self.parameters.setdefault(id(parameter), (name, parameter))
            parts = self._parts[key]
            if any(isinstance(part, FSDPModule) for _, part in parts):
                for _, part in parts:
                    self._sharded |= {(id(part), n) for n, p in part._parameters.items() if hasattr(p, "_local_tensor")}

    def _check_names(self) -> None:
        """Raises StateError when two tensors, or the extra states of two modules, would share a name."""
        extra = Names()
        for key, parts in self._parts.items():
            for path, part in parts:
                if has_extra_state(part):
                    extra.take(f"{key}/extra/{clean(path)}", f"{key}.{path}", part)
        for _ in self._buffers():
            pass
        for _ in state_tensors(self.modules):
            pass

    def _check_same(self) -> None:
        """Raises StateError when a module has parameters or parts with state that it did not have at ``protect``.

        Parameters that FSDP2 shards are left to it: whole ones take their places for a while.
        """
        for key, parts in self._parts.items():
            for path, part in parts:
                new = [
                    place
                    for place, parameter in part._parameters.items()
                    if parameter is not None
                    and id(parameter) not in self.parameters
                    and (id(part), place) not in self._sharded
                ]
                new += [place for place, child in part._modules.items() if child is not None and self._is_new(child)]
                if new:
                    raise StateError(
                        f"{f'{key}.{path}'.rstrip('.')}.{new[0]} was put into the model after protect, which still "
                        f"holds what was there before. Change the model before protect, or copy into the tensors it has"
                    )

    def _is_new(self, child: nn.Module) -> bool:
        """Whether a part of a module, or something in it, came later and has state of its own."""
        if id(child) in self._part_ids:
            return False
        later = [part for part in child.modules() if id(part) not in self._part_ids]
        return any(
            has_extra_state(part) or any(b is not None for b in part._buffers.values()) for part in later
        ) or any(id(parameter) not in self.parameters for parameter in child.parameters())

    def _buffers(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """(name, buffer) of all modules, those too that the first forward would make. Raises as ``_check_names``."""
        names = Names(self._names)
        for key, parts in self._parts.items():
            for path, part in parts:
                for place, buffer in part._buffers.items():
                    full = f"{path}.{place}" if path else place
                    name = f"{key}/{clean(full)}"
                    names.take(name, f"{key}.{full}", buffer)
                    yield name, buffer

    def parameter_name(self, parameter: torch.Tensor, optimizer: str, index: int) -> str:
        known = self.parameters.get(id(parameter))
        return known[0] if known else f"{optimizer}/parameter/{index}"

    @cached_property
    def weights(self) -> str:
        """JSON: which leaves make up the modules' ``state_dict()``, for who has nothing but an image.

        {"modules": their keys, "aliases": name there -> leaf, where the leaf's name is another (a tied parameter has
        one leaf; null: nothing holds it), "absent": leaves of modules that it leaves out}. Names have the form of a
        leaf's.
        """
        held = {place: name for place, (name, _) in self.parameters.items()}
        absent, extra = set[str](), dict[int, str]()
        for key, parts in self._parts.items():
            for path, part in parts:
                if has_extra_state(part):
                    extra.setdefault(id(part), f"{key}/extra/{clean(path)}")
                for place, buffer in part._buffers.items():
                    name = f"{key}/{clean(f'{path}.{place}' if path else place)}"
                    held.setdefault(id(buffer), name)
                    absent |= {name} if place in part._non_persistent_buffers_set else set()
        extras = {key: ExtraStates(module) for key, module in self.modules.items()}
        aliases: dict[str, str | None] = {}
        for key, path, value in state_tensors(self.modules, keep_vars=True):
            name, (owner, _, place) = f"{key}/{clean(path)}", path.rpartition(".")
            part = extras[key].find(clean(owner)) if place == "_extra_state" else None
            own = held.get(id(value)) if part is None else extra[id(part)]
            absent.discard(name)
            if own != name:
                aliases[name] = own
        return dump({"modules": list(self.modules), "aliases": aliases, "absent": sorted(absent)})

    def parameters_of(self, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, parameter) in the order of an optimizer's groups."""
        index = 0
        for group in self.optimizers[key].param_groups:
            for parameter in group["params"]:
                yield self.parameter_name(parameter, key, index), parameter
                index += 1

    def collect(self) -> Collected:
        """Walk all objects now. Cheap enough for every boundary: no tensor is read."""
        self._check_same()
        found = Collected()
        stepped = {
            id(p) for optimizer in self.optimizers.values() for group in optimizer.param_groups for p in group["params"]
        }
        for name, parameter in self.parameters.values():
            found.leaves[name] = self._leaf(name, parameter, lazy=id(parameter) in stepped)
        for name, buffer in self._buffers():
            if buffer is not None:
                found.leaves.setdefault(name, self._leaf(name, buffer, lazy=False))
        for key in self.modules:
            self._collect_extra_state(key, found)
        for key in self.optimizers:
            self._collect_optimizer(key, found)
        for key, value in self.others.items():
            content = value.state_dict() if isinstance(value, Stateful) else value
            found.state[key] = dump(self._tree(content, key, found, lazy=False))
        return found

    def _collect_extra_state(self, key: str, found: Collected) -> None:
        extra = {clean(path): part.get_extra_state() for path, part in self._parts[key] if has_extra_state(part)}
        if extra:
            found.state[key] = dump(self._tree(extra, f"{key}/extra", found, lazy=False))

    def _collect_optimizer(self, key: str, found: Collected) -> None:
        optimizer = self.optimizers[key]
        known = self._states.get(key)
        if known is None or not known.hold(optimizer):
            known = self._states[key] = self._optimizer_states(key)
        found.leaves |= known.leaves
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        others: dict[Any, Any] = {k: v for k, v in optimizer.state.items() if not isinstance(k, torch.Tensor)}
        if own := self._own_state(key):
            others[OWN] = own
        text = dump(self._tree(groups, f"{key}/groups", found, lazy=False))
        other = dump(self._tree(others, f"{key}/others", found, lazy=False))
        found.state[key] = f'{{"states":{known.text},"members":{known.members},"groups":{text},"others":{other}}}'

    def _optimizer_states(self, key: str) -> _OptimizerStates:
        found, states, seen = Collected(), {}, []
        optimizer = self.optimizers[key]
        for name, parameter in self.parameters_of(key):
            if id(parameter) not in self.parameters:
                found.leaves[name] = self._leaf(name, parameter, lazy=True)
            seen.append((parameter, optimizer.state.get(parameter)))
            if parameter in optimizer.state:
                states[name] = self._tree(optimizer.state[parameter], f"{key}/state/{name}", found, lazy=True)
        names = iter([name for name, _ in self.parameters_of(key)])
        members = [[next(names) for _ in group["params"]] for group in optimizer.param_groups]
        return _OptimizerStates(found.leaves, dump(states), dump(members), seen)

    def tensors_of(self, key: str) -> dict[str, torch.Tensor]:
        """The live tensors in the state of an object that is neither module nor optimizer, by name."""
        value, tensors = self.others[key], list[tuple[str, torch.Tensor]]()
        flatten(value.state_dict() if isinstance(value, Stateful) else value, key, tensors)
        return dict(tensors)

    def _tree(self, value: object, path: str, found: Collected, *, lazy: bool) -> Json:
        tensors: list[tuple[str, torch.Tensor]] = []
        tree = flatten(value, path, tensors)
        for name, tensor in tensors:
            leaf = self._leaf(name, tensor, lazy=lazy)
            if found.leaves.setdefault(name, leaf) is not leaf:
                raise StateError(f"two tensors of the state are both called {name!r}: rename a key")
        return tree


def dump(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"))


class _OptimizerStates:
    """What was found in one optimizer's states, good for as long as nothing but bytes has changed there.

    States that hold anything else than tensors (a counter, a list) have to be looked at every time.
    """

    def __init__(
        self, leaves: dict[str, Leaf], text: str, members: str, seen: list[tuple[torch.Tensor, dict[str, Any] | None]]
    ) -> None:
        self.leaves, self.text, self.members = leaves, text, members
        plain = all(isinstance(value, torch.Tensor) for _, state in seen for value in (state or {}).values())
        self._seen = [(p, _pointer(p), state, len(state or {})) for p, state in seen] if plain else None
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor, int]] = [
            (state, key, tensor, _pointer(tensor))
            for _, state in seen
            if plain and state
            for key, tensor in state.items()
        ]

    def hold(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the same tensors are in the same places, in the same storages."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._seen is None or len(parameters) != len(self._seen):
            return False
        for live, (parameter, pointer, state, size) in zip(parameters, self._seen, strict=True):
            if live is not parameter or _pointer(live) != pointer:
                return False
            if optimizer.state.get(live) is not state or len(state or ()) != size:
                return False
        return all(
            state.get(key) is tensor and _pointer(tensor) == place for state, key, tensor, place in self._tensors
        )


def _pointer(tensor: torch.Tensor) -> int:
    return int(getattr(tensor, "_local_tensor", tensor).data_ptr())
