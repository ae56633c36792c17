"""What an image tells of the names that PyTorch's state dicts give its leaves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from outlast.checkpoint.statedict import LeafRef, Weights, state_dicts, weights_of
from outlast.protect.leaves import Collector
from outlast.protect.weights import full_state


class Odd(nn.Linear):
    """Gives state_dict() a tensor that nothing holds, and one of its own accord."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> torch.Tensor:
        return torch.arange(3.0)

    def set_extra_state(self, state: Any) -> None:
        del state

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "norm"] = self.weight.norm()


def told(objects: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The JSON state that an image of these objects has, as far as it is looked at here, and its leaves."""
    collector = Collector(objects)
    found = collector.collect()
    state = {"objects": {key: json.loads(text) for key, text in found.state.items()}}
    return {**state, "weights": json.loads(collector.weights)}, list(found.leaves)


def leaf(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} is read")


def step(objects: dict[str, Any], key: str, *parameters: torch.Tensor) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    objects[key].step()


def test_one_module_has_its_own_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    state, leaves = told({"net": model})
    weights = weights_of(state, leaves)
    assert list(weights.names) == sorted(model.state_dict())
    assert weights.names["2.weight"] == weights.names["0.weight"] == "net/0.weight"
    assert list(state_dicts(state, weights, leaf)) == ["model"]


def test_several_modules_have_their_keys_before_their_names() -> None:
    parts = {"one": nn.Linear(2, 2), "two": nn.Linear(2, 1)}
    objects: dict[str, Any] = {**parts, "sgd": torch.optim.SGD(parts["two"].parameters(), lr=0.1, momentum=0.9)}
    step(objects, "sgd", parts["two"].weight)
    state, leaves = told(objects)
    weights = weights_of(state, leaves)
    assert list(weights.names) == ["one.bias", "one.weight", "two.bias", "two.weight"]
    sections = state_dicts(state, weights, leaf)
    assert {key: sorted(section) for key, section in sections.items() if key in parts} == {
        key: sorted(part.state_dict()) for key, part in parts.items()
    }
    assert sections["optimizer"]["state.weight.momentum_buffer"] == LeafRef("sgd/state/two/weight/momentum_buffer")
    assert sections["optimizer"]["param_groups.weight.lr"] == 0.1
    assert sections["optimizer"]["param_groups.0.params"] == ["weight", "bias"]


def test_several_optimizers_have_sections_of_their_own() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    objects: dict[str, Any] = {
        **{"one": one, "two": two, "first": torch.optim.AdamW([{"params": [one.weight]}, {"params": [two.bias], "lr": 2.0}])},
        "second": torch.optim.SGD([two.weight], lr=0.3),
    }  # fmt: skip
    step(objects, "first", one.weight, two.bias)
    state, leaves = told(objects)
    sections = state_dicts(state, weights_of(state, leaves), leaf)
    assert set(sections) == {"one", "two", "first", "second"}
    assert sections["first"]["state.one.weight.exp_avg"] == LeafRef("first/state/one/weight/exp_avg")
    assert sections["first"]["param_groups.two.bias.lr"] == sections["first"]["param_groups.1.lr"] == 2.0
    assert sections["second"]["param_groups.weight.lr"] == 0.3


def test_what_state_dict_computes_is_named_and_extra_state_is_found() -> None:
    model = nn.ModuleDict({"odd": Odd()})
    state, leaves = told({"model": model})
    weights = weights_of(state, leaves)
    assert weights == Weights(
        {
            "odd._extra_state": "model/extra/odd",
            "odd.bias": "model/odd.bias",
            "odd.weight": "model/odd.weight",
        },
        ("odd.norm",),
    )


@pytest.mark.parametrize("notes", [{"states": {}, "groups": []}, [1, 2]])
def test_other_objects_are_no_optimizers(notes: Any) -> None:
    state, leaves = told({"model": nn.Linear(1, 1), "notes": notes})
    assert list(state_dicts(state, weights_of(state, leaves), leaf)) == ["model"]


def test_names_with_slashes_are_weights_under_their_own_names() -> None:
    def part() -> nn.Module:
        return nn.ModuleDict({"extra/head": nn.Linear(2, 2), "x": Odd()})

    for modules in ({"net": part()}, {"one": part(), "two": nn.Linear(2, 2)}):
        objects: dict[str, Any] = {**modules, "sgd": torch.optim.SGD(modules[min(modules)].parameters(), lr=0.1)}
        state, leaves = told(objects)
        weights = weights_of(state, leaves)
        assert set(weights.names) | set(weights.lacking) == {name for name, _ in full_state(modules)}
        sections = state_dicts(state, weights, leaf)
        first = sections["model" if len(modules) == 1 else "one"]
        assert first["extra/head.weight"] == LeafRef(f"{min(modules)}/extra/head.weight")
        assert "extra/head.weight" in sections["optimizer"]["param_groups.0.params"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_extra_state_of_a_wrapped_module_is_found(wrap: Any) -> None:
    state, leaves = told({"model": wrap(Odd())})
    weights = weights_of(state, leaves)
    assert sorted(weights.names) == ["_extra_state", "bias", "weight"]
    assert set(weights.names.values()) <= set(leaves)


def test_a_tensor_that_is_only_called_like_extra_state_is_a_weight() -> None:
    model = nn.ParameterDict({"my_extra_state": torch.zeros(2)})
    state, leaves = told({"model": model})
    assert weights_of(state, leaves).names == {"my_extra_state": "model/my_extra_state"}
