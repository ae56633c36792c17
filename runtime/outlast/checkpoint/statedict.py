"""A checkpoint's leaves under the names that PyTorch's own state dicts give them (pure).

One protected module: its names as they are; several: each under its key in ``protect``. An optimizer's state has the
names of ``torch.distributed.checkpoint.state_dict.get_optimizer_state_dict``: ``state.<parameter>.exp_avg``; its groups
both ways, flattened (``param_groups.<parameter>.lr``) and by number (``param_groups.0.lr``, ``param_groups.0.params``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outlast.protect.tree import tensor_names, unflatten

if TYPE_CHECKING:
    import torch

Json = Mapping[str, Any]
MODEL = "model"
OPTIMIZER = "optimizer"
_OPTIMIZER_KEYS = {"states", "members", "groups", "others"}


@dataclass(frozen=True)
class LeafRef:
    """A tensor that a leaf holds."""

    leaf: str


@dataclass(frozen=True)
class Weights:
    """``names``: name in the whole weights -> leaf, in the order of names; ``lacking``: names that ``state_dict()``
    gives and no leaf holds, since it computes them."""

    names: Mapping[str, str]
    lacking: tuple[str, ...]


def weights_of(state: Json, leaves: Collection[str]) -> Weights:
    """The modules' weights among ``leaves``; ``state``: the image's JSON state."""
    told = state["weights"]
    modules, aliases = told["modules"], told["aliases"]
    extra = {leaf for key in modules for leaf in tensor_names(state["objects"].get(key))}
    unnamed = {*extra, *told["absent"], *(alias for alias, leaf in aliases.items() if leaf is None)}
    own = {leaf: leaf for leaf in leaves if leaf.partition("/")[0] in modules and leaf not in unnamed}
    own |= {alias: leaf for alias, leaf in aliases.items() if leaf is not None}
    names = {dotted(name, modules): leaf for name, leaf in own.items()}
    lacking = sorted(dotted(alias, modules) for alias, leaf in aliases.items() if leaf is None)
    return Weights(dict(sorted(names.items())), tuple(lacking))


def state_dicts(state: Json, weights: Weights, tensor: Callable[[str], torch.Tensor]) -> dict[str, dict[str, Any]]:
    """All that a plain PyTorch script loads, by section: ``model`` and ``optimizer``, or, where there are several,
    each under its key. Values are plain, or LeafRefs. ``tensor`` gives a leaf that is small (an option of a group).
    """
    modules = state["weights"]["modules"]
    sections: dict[str, dict[str, Any]] = {MODEL: {}} if len(modules) == 1 else {key: {} for key in modules}
    for name, leaf in weights.names.items():
        key, _, rest = ("", "", name) if len(modules) == 1 else name.partition(".")
        sections[key or MODEL][rest] = LeafRef(leaf)
    optimizers = {key: saved for key, saved in state["objects"].items() if is_optimizer(saved)}
    for key, saved in optimizers.items():
        sections[OPTIMIZER if len(optimizers) == 1 else key] = _optimizer_state(saved, modules, tensor)
    return sections


def dotted(name: str, modules: Collection[str]) -> str:
    """A module's leaf name ``key/path`` as in the whole weights; the path may have slashes of its own."""
    key, _, rest = name.partition("/")
    if key not in modules:
        return name.replace("/", ".")
    return rest if len(modules) == 1 else f"{key}.{rest}"


def is_optimizer(saved: object) -> bool:
    """Whether a protected object's JSON state is an optimizer's."""
    return isinstance(saved, Mapping) and set(saved) == _OPTIMIZER_KEYS


def _optimizer_state(saved: Json, modules: Collection[str], tensor: Callable[[str], torch.Tensor]) -> dict[str, Any]:
    parameters = [name for group in saved["members"] for name in group]
    own = {name.partition("/")[0] for name in parameters} & set(modules)
    names = {name: dotted(name, own) for name in parameters}
    flat = {f"state.{names[p]}.{path}": v for p, tree in saved["states"].items() for path, v in _walk(tree, tensor)}
    for index, (members, options) in enumerate(zip(saved["members"], saved["groups"], strict=True)):
        values = {option: unflatten(value, tensor) for option, value in options.items()}
        for place in (*(names[member] for member in members), str(index)):
            for option, value in values.items():
                flat.setdefault(f"param_groups.{place}.{option}", value)
        flat.setdefault(f"param_groups.{index}.params", [names[member] for member in members])
    return flat


def _walk(tree: Any, tensor: Callable[[str], torch.Tensor], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of a parameter's state."""
    if not isinstance(tree, Mapping) or any(key.startswith("$") for key in tree):
        whole_leaf = isinstance(tree, Mapping) and "$tensor" in tree
        yield path, LeafRef(tree["$tensor"]) if whole_leaf else unflatten(tree, tensor)
        return
    for key, value in tree.items():
        yield from _walk(value, tensor, f"{path}.{key}" if path else key)
