"""Leaves, plans, trees and reload, in one process with real torch objects."""

from __future__ import annotations

import copy
import itertools
import pathlib
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper as checkpointed

from outlast.errors import ImageError, StateError
from outlast.protect import rng
from outlast.protect.capture import Capture, Seat
from outlast.protect.leaves import Collector, clean
from outlast.protect.plan import cut_of, group_equal, part_range, rotating_sample
from outlast.protect.reload import LocalShard, Shards, reload
from outlast.protect.replicas import digest
from outlast.protect.tree import flatten, unflatten
from outlast.protect.weights import full_state
from outlast.snapshot.identity import Generation


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.scale = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        hidden = self.frozen(self.norm(self.embed(x))) * self.scale.float().sum()
        return self.head(hidden)


def make() -> dict[str, object]:
    torch.manual_seed(3)
    model = Tied()
    first = torch.optim.AdamW([model.embed.weight, model.scale], lr=1e-2)
    second = torch.optim.SGD(model.norm.parameters(), lr=1e-2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(first, 100)
    return {
        "model": model,
        "first": first,
        "second": second,
        "scheduler": scheduler,
        "notes": {"seen": [1, 2.5], "t": torch.ones(3)},
    }


def train(objects: dict[str, object], steps: int) -> None:
    for _ in range(steps):
        x = torch.randint(0, 11, (8,))
        objects["model"](x).logsumexp(-1).mean().backward()
        for key in ("first", "second"):
            objects[key].step()
            objects[key].zero_grad()
        objects["scheduler"].step()
        objects["notes"]["seen"].append(random.random() + float(np.random.rand()))


def bits(objects: dict[str, object]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for leaf in Collector(objects).collect().leaves.values():
        found[leaf.name] = (
            leaf.tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() + str(leaf.tensor.dtype).encode()
        )
    return found


def snapshot(objects: dict[str, object], folder: pathlib.Path) -> Generation:
    capture = Capture(Collector(objects), Seat(folder, 0, 1, 0, 0))
    generation = Generation(1, 5, "ab" * 8)
    moment = capture.observe({"step": 5, "rng": rng.capture()})
    assert capture.needs_plan(moment)
    capture.make_plan(moment, {})
    assert not capture.needs_plan(moment)
    capture.start(moment, generation, 0, fresh=False).wait(60)
    capture.close()
    return generation


def test_everything_comes_back_bit_for_bit_and_training_goes_on_alike(tmp_path: pathlib.Path) -> None:
    objects = make()
    train(objects, 4)
    snapshot(objects, tmp_path)
    train(objects, 3)

    again = make()
    torch.rand(7)
    random.random()
    shard = LocalShard(tmp_path / "slot-0-0.img", Generation(1, 5, "ab" * 8))
    state = reload(Collector(again), Shards(shard, lambda rank: pytest.fail(f"asked for rank {rank}"), 0))
    rng.restore(state["rng"])
    assert state["step"] == 5
    train(again, 3)
    assert bits(again) == bits(objects)
    assert again["notes"]["seen"] == objects["notes"]["seen"]
    assert again["model"].head.weight is again["model"].embed.weight


def test_a_changed_script_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    objects = make()
    train(objects, 1)
    snapshot(objects, tmp_path)
    again = make()
    again["model"].extra = nn.Linear(2, 2)
    shards = Shards(
        LocalShard(tmp_path / "slot-0-0.img", Generation(1, 5, "ab" * 8)), lambda rank: pytest.fail("no"), 0
    )
    with pytest.raises(StateError, match=r"model/extra\.weight is in the script but not in the snapshot"):
        reload(Collector(again), shards)
    other = make()
    other["model"].norm = nn.BatchNorm1d(7)
    with pytest.raises(StateError, match=r"model/norm\.weight.*\(7,\).*\(6,\)"):
        reload(Collector(other), shards)


def test_what_has_no_json_form_is_refused_by_path() -> None:
    with pytest.raises(StateError, match=r"notes/inner.*builtins\.object"):
        flatten({"inner": object()}, "notes", [])
    with pytest.raises(StateError, match=r"protect\(thing=\.\.\.\) got a object"):
        Collector({"thing": object()})


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, None, True, "x", 1e-300, float("inf")]},
        {1: "int key", ("t", 2): [b"\x00\xff", {3, 1}]},
        {"$odd": {"nested": (1, (2,))}},
        {"z": 1 + 2j, "d": torch.bfloat16, "s": np.float32(0.1)},
    ],
)
def test_trees_survive_json(value: object) -> None:
    import json

    tensors: list[tuple[str, torch.Tensor]] = []
    tree = json.loads(json.dumps(flatten(value, "p", tensors)))
    assert unflatten(tree, dict(tensors).__getitem__) == value


def test_parts_cover_a_leaf_exactly() -> None:
    for nbytes in (0, 4, 63, 64, 65, 1000, 4096, 100_001):
        for count in (1, 2, 3, 7, 100):
            ranges = [part_range(nbytes, i, count) for i in range(count)]
            assert [b for a, b in ranges][-1] == nbytes
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
            assert ranges[0][0] == 0


def test_only_equal_and_telling_tensors_are_replicas() -> None:
    digests = {0: {"a": "x", "b": "y"}, 1: {"a": "x", "b": "z"}, 2: {"a": "q", "b": "y"}, 3: {"a": "q"}}
    groups = group_equal(digests)
    assert groups == {"a": [(0, 1), (2, 3)], "b": [(0, 2)]}
    assert cut_of(3, groups) == {"a": (2, 3)}
    assert cut_of(0, groups) == {"a": (0, 1), "b": (0, 2)}
    assert rotating_sample(cut_of(0, groups), 5) == [("a", (0, 1)), ("b", (0, 2))]
    assert digest(torch.zeros(10_000)) is None
    assert digest(torch.full((3,), 2.0)) is None
    assert digest(torch.empty(0)) is None
    assert digest(torch.arange(4.0)) == digest(torch.arange(4.0)) is not None


def test_names_are_free_of_wrappers() -> None:
    assert clean("module._orig_mod.layers.0._checkpoint_wrapped_module.weight") == "layers.0.weight"
    assert clean("my_module.weight") == "my_module.weight"


def test_state_that_outgrows_its_room_gets_a_new_layout(tmp_path: pathlib.Path) -> None:
    notes: dict[str, object] = {"log": ""}
    model = nn.Linear(3, 3)
    capture = Capture(Collector({"model": model, "notes": notes}), Seat(tmp_path, 0, 1, 0, 0))
    for step, size in enumerate((10, 50_000, 300_000, 5)):
        notes["log"] = "x" * size
        moment = capture.observe({"step": step})
        if capture.plan is None:
            capture.make_plan(moment, {})
        capture.start(moment, Generation(1, step, "cd" * 8), step % 2, fresh=False).wait(60)
        fresh: dict[str, object] = {"log": None}
        reload(Collector({"model": copy.deepcopy(model), "notes": fresh}),
               Shards(LocalShard(tmp_path / f"slot-0-{step % 2}.img", Generation(1, step, "cd" * 8)), lambda r: pytest.fail("no"), 0))  # fmt: skip
        assert fresh == notes
    capture.close()


def test_bytes_that_do_not_verify_are_not_loaded(tmp_path: pathlib.Path) -> None:
    objects = make()
    generation = snapshot(objects, tmp_path)
    path = tmp_path / "slot-0-0.img"
    with pytest.raises(ImageError, match="holds generation"):
        LocalShard(path, Generation(2, 5, "ef" * 8))
    with path.open("r+b") as file:
        file.seek(300_000 if path.stat().st_size > 400_000 else path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ImageError, match="do not verify"):
        LocalShard(path, generation)


def test_tensors_that_would_share_a_name_are_refused() -> None:
    for notes in ({"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}, {1: torch.ones(1), "1": torch.zeros(1)}):
        with pytest.raises(StateError, match="two tensors of the state are both called"):
            Collector({"notes": notes}).collect()


def again_from(objects: dict[str, object], fresh: dict[str, object], folder: pathlib.Path) -> None:
    generation = snapshot(objects, folder)
    reload(Collector(fresh), Shards(LocalShard(folder / "slot-0-0.img", generation), lambda r: pytest.fail("no"), 0))


def test_fused_optimizers_over_channels_last_go_on_alike(tmp_path: pathlib.Path) -> None:
    def build() -> dict[str, object]:
        torch.manual_seed(1)
        model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)}

    def step(objects: dict[str, object]) -> None:
        x = torch.sin(torch.arange(2 * 3 * 6 * 6.0)).reshape(2, 3, 6, 6)
        objects["model"](x).square().mean().backward()
        objects["optimizer"].step()
        objects["optimizer"].zero_grad()

    objects, fresh = build(), build()
    step(objects)
    again_from(objects, fresh, tmp_path)
    step(objects)
    step(fresh)
    assert torch.equal(objects["model"].weight, fresh["model"].weight)


def test_state_of_an_optimizer_as_a_whole_and_late_buffers_come_back(tmp_path: pathlib.Path) -> None:
    class Cached(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("cache", None)

    def build() -> dict[str, object]:
        model = Cached()
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    objects, fresh = build(), build()
    objects["model"].cache = torch.arange(3.0)
    objects["optimizer"].state["global"] = {"count": 7, "ema": torch.arange(2.0)}
    again_from(objects, fresh, tmp_path)
    assert torch.equal(fresh["model"].cache, torch.arange(3.0))
    assert fresh["optimizer"].state["global"]["count"] == 7
    assert torch.equal(fresh["optimizer"].state["global"]["ema"], torch.arange(2.0))
    with pytest.raises(StateError, match=r"optimizer= is in the snapshot but not protected now"):
        again_from(objects, {"model": build()["model"]}, tmp_path)


def test_a_buffer_shared_between_modules_comes_back(tmp_path: pathlib.Path) -> None:
    def build() -> dict[str, object]:
        shared, model = torch.zeros(3), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        for part in model:
            part.register_buffer("table", shared)
        return {"model": model}

    objects, fresh = build(), build()
    objects["model"][0].table += torch.arange(3.0)
    again_from(objects, fresh, tmp_path)
    assert fresh["model"][0].table is fresh["model"][1].table
    assert torch.equal(fresh["model"][1].table, torch.arange(3.0))


# --- names that would be the same -------------------------------------------------------------------------------------


class Remembering(nn.Linear):
    """Has extra state: a tensor."""

    def __init__(self, mark: float = 0.0) -> None:
        super().__init__(2, 2)
        self.mark = torch.tensor([mark])

    def get_extra_state(self) -> torch.Tensor:
        return self.mark

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.mark = state


class Holder(nn.Module):
    """Keeps a model as ``module``, as wrappers do, and has submodules of its own."""

    def __init__(self, module: nn.Module, **own: nn.Module) -> None:
        super().__init__()
        self.module = module
        for name, part in own.items():
            self.add_module(name, part)


def buffered(buffer: torch.Tensor | None, *, persistent: bool = True) -> nn.Module:
    part = nn.Module()
    part.register_buffer("cache", buffer, persistent=persistent)
    return part


@pytest.mark.parametrize(
    ("inner", "outer", "place"),
    [
        (nn.Linear(3, 2), nn.Linear(3, 2), ".weight"),
        (nn.Linear(3, 2), nn.Linear(4, 2), ".weight"),
        (buffered(torch.zeros(2)), buffered(torch.ones(2)), ".cache"),
        (buffered(torch.zeros(2), persistent=False), buffered(torch.ones(2), persistent=False), ".cache"),
        (buffered(None), buffered(torch.ones(2)), ".cache"),
        (nn.ParameterDict({"cache": torch.zeros(2)}), buffered(torch.ones(2)), ".cache"),
        (Remembering(1.0).requires_grad_(False), Remembering(2.0), ".weight"),
    ],
)
def test_different_tensors_that_would_share_a_name_are_refused(inner: nn.Module, outer: nn.Module, place: str) -> None:
    model = Holder(nn.ModuleDict({"head": inner}), head=outer)
    with pytest.raises(StateError, match="Rename one of the submodules") as caught:
        Collector({"model": model})
    for path in (f"model.module.head{place}", f"model.head{place}", f"'model/head{place}'"):
        assert path in str(caught.value)


def test_extra_states_that_would_share_a_name_are_refused() -> None:
    inner, outer = Remembering(1.0), Remembering(2.0)
    outer.weight, outer.bias = inner.weight, inner.bias
    with pytest.raises(StateError, match=r"model\.module\.head and model\.head would both be"):
        Collector({"model": Holder(nn.ModuleDict({"head": inner}), head=outer)})
    root = type("Root", (Holder, Remembering), {})(Remembering(1.0))
    del root.weight, root.bias
    root.mark = torch.ones(1)
    with pytest.raises(StateError, match=r"model\._extra_state and model\.module\._extra_state would both be"):
        Collector({"model": root})


def test_a_buffer_made_later_under_a_name_in_use_is_refused_at_the_boundary() -> None:
    model = Holder(nn.ModuleDict({"head": buffered(None)}), head=buffered(None))
    collector = Collector({"model": model})
    collector.collect()
    model.head.cache = torch.zeros(2)
    with pytest.raises(StateError, match=r"model\.module\.head\.cache and model\.head\.cache would both be called"):
        collector.collect()


@pytest.mark.parametrize("key", ["head", "other"])
def test_one_tensor_under_two_names_is_no_clash(tmp_path: pathlib.Path, key: str) -> None:
    def build() -> dict[str, object]:
        part = nn.Sequential(Remembering(1.0), nn.BatchNorm1d(2))
        return {"model": Holder(nn.ModuleDict({"head": part}), **{key: part})}

    objects, fresh = build(), build()
    again_from(objects, fresh, tmp_path)
    assert bits(fresh) == bits(objects)
    assert "model/head.0.weight" in bits(fresh)
    names = dict(full_state({"model": fresh["model"]}))
    assert {name.partition(".")[0] for name in names} == {"head", key}


def test_the_whole_weights_have_no_name_twice() -> None:
    model = Holder(nn.ModuleDict({"head": nn.Linear(3, 2)}), head=nn.Linear(3, 2))
    with pytest.raises(StateError, match=r"model\.module\.head\.weight and model\.head\.weight would both be called"):
        dict(full_state({"model": model}))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel, checkpointed])
def test_wrappers_change_no_names(tmp_path: pathlib.Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    def build(mark: float) -> nn.Module:
        return nn.Sequential(Remembering(mark), nn.BatchNorm1d(2))

    plain, wrapped = {"model": build(1.0)}, {"model": wrap(build(2.0))}
    late = {"n_averaged"} & set(wrapped["model"].state_dict())
    assert set(bits(wrapped)) - set(bits(plain)) == {f"model/{name}" for name in late}
    assert set(dict(full_state(wrapped))) - set(dict(full_state(plain))) == late


@pytest.mark.parametrize("wrap", [nn.DataParallel, checkpointed])
def test_extra_state_of_what_is_wrapped_comes_back_with_and_without(
    tmp_path: pathlib.Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    for index, (one, other) in enumerate([(wrap, wrap), (wrap, nn.Identity), (nn.Identity, wrap)]):
        saved, live = Remembering(3.0), Remembering()
        folder = tmp_path / str(index)
        folder.mkdir()
        again_from(
            {"model": saved if one is nn.Identity else one(saved)},
            {"model": live if other is nn.Identity else other(live)},
            folder,
        )
        assert live.mark == 3.0


def test_a_part_of_the_same_name_without_extra_state_is_no_clash(tmp_path: pathlib.Path) -> None:
    def build(mark: float) -> dict[str, object]:
        return {"model": Holder(nn.ModuleDict({"head": Remembering(mark)}), head=nn.ReLU())}

    objects, fresh = build(5.0), build(0.0)
    again_from(objects, fresh, tmp_path)
    assert fresh["model"].module["head"].mark == 5.0
    with pytest.raises(StateError, match="model/head has extra state in the snapshot but takes none"):
        again_from(objects, {"model": Holder(nn.ModuleDict({"head": nn.Linear(2, 2)}))}, tmp_path)


def test_a_module_whose_name_has_a_slash_comes_back(tmp_path: pathlib.Path) -> None:
    def build() -> dict[str, object]:
        return {"model": nn.ModuleDict({"extra/head": Remembering(1.0), "head": Remembering(2.0)})}

    objects, fresh = build(), build()
    again_from(objects, fresh, tmp_path)
    assert bits(fresh) == bits(objects)
