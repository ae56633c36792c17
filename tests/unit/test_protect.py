"""Leaves, plans, trees and reload, in one process with real torch objects."""

from __future__ import annotations

import copy
import itertools
import pathlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper as checkpointed
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from outlast.errors import ImageError, StateError
from outlast.protect import rng
from outlast.protect.capture import Capture, Seat
from outlast.protect.leaves import Collector, clean
from outlast.protect.plan import cut_of, group_equal, part_range, rotating_sample
from outlast.protect.reload import LocalShard, Shards, _device_of, reload
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
        {frozenset({1, 2}): {frozenset({3}), frozenset()}},
        {"$odd": {"nested": (1, (2,))}},
        {"z": 1 + 2j, "d": torch.bfloat16, "s": np.float32(0.1)},
    ],
)
def test_trees_survive_json(value: object) -> None:
    import json

    tensors: list[tuple[str, torch.Tensor]] = []
    tree = json.loads(json.dumps(flatten(value, "p", tensors)))
    assert unflatten(tree, dict(tensors).__getitem__) == value


def test_frozen_sets_of_earlier_images_come_back() -> None:
    assert unflatten({"$set": [{"$set": [1]}]}, lambda name: pytest.fail(name)) == {frozenset({1})}
    assert unflatten({"$dict": [[{"$set": [1]}, 2]]}, lambda name: pytest.fail(name)) == {frozenset({1}): 2}


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


# --- what else holds the live objects ---------------------------------------------------------------------------------


def test_trained_tensors_in_a_dict_stay_what_the_optimizer_trains(tmp_path: pathlib.Path) -> None:
    def build() -> dict[str, object]:
        torch.manual_seed(1)
        weights = {"w": nn.Parameter(torch.randn(3, 2).t()), "deep": [{"b": torch.randn(3, requires_grad=True)}]}
        trained = [weights["w"], weights["deep"][0]["b"]]
        return {"weights": weights, "optimizer": torch.optim.Adam(trained, lr=0.1)}

    def step(objects: dict[str, object]) -> None:
        weights, optimizer = objects["weights"], objects["optimizer"]
        optimizer.zero_grad()
        (weights["w"] * weights["deep"][0]["b"]).square().sum().backward()
        optimizer.step()

    objects, fresh = build(), build()
    step(objects)
    before = fresh["weights"]["w"], fresh["weights"]["deep"][0]["b"]
    again_from(objects, fresh, tmp_path)
    assert fresh["weights"]["w"] is before[0]
    assert fresh["weights"]["deep"][0]["b"] is before[1]
    assert fresh["weights"]["w"].stride() == (1, 2)
    step(objects)
    step(fresh)
    assert torch.equal(objects["weights"]["w"], fresh["weights"]["w"])
    assert torch.equal(objects["weights"]["deep"][0]["b"], fresh["weights"]["deep"][0]["b"])


def test_trained_tensors_of_another_shape_are_refused_by_path(tmp_path: pathlib.Path) -> None:
    saved, live = ({"s": {"w": torch.ones(size, requires_grad=True)}} for size in (3, 2))
    with pytest.raises(StateError, match=r"'s/w' is \(2,\) torch\.float32 in the script but \(3,\)"):
        again_from(saved, live, tmp_path)
    with pytest.raises(StateError, match="t does not take its state"):
        again_from({"t": torch.ones(1)}, {"t": torch.zeros(2)}, tmp_path)


def test_what_a_script_holds_of_dicts_and_lists_comes_back_in_place(tmp_path: pathlib.Path) -> None:
    def build(value: int) -> tuple[dict[str, object], list[object]]:
        held: list[object] = [torch.full((2,), value), np.full((2, 2), value, order="F"), list(range(value)), {value}]
        held.append(torch.full((), value))
        tensor, array, numbers, seen, inner = held
        state = {"tensor": tensor, "deep": {"array": array, "numbers": numbers}, "seen": seen, "pair": (inner, value)}
        return {"state": state, "again": state, "list": [state["deep"]]}, held

    objects, _ = build(3)
    fresh, held = build(1)
    again_from(objects, fresh, tmp_path)
    state = fresh["state"]
    places = [state["tensor"], state["deep"]["array"], state["deep"]["numbers"], state["seen"], state["pair"][0]]
    assert all(place is mine for place, mine in zip(places, held, strict=True))
    assert held[0].tolist() == [3, 3]
    assert held[1].tolist() == [[3, 3], [3, 3]]
    assert held[1].flags.f_contiguous
    assert held[2:4] == [[0, 1, 2], {3}]
    assert state["pair"] == (torch.tensor(3), 3)


def test_memory_that_was_shared_only_at_the_start_is_written_once(tmp_path: pathlib.Path) -> None:
    def build(*, apart: bool) -> dict[str, object]:
        model, flat = nn.Linear(2, 2), torch.zeros(4)
        average = model.weight.data + 1 if apart else model.weight.data
        views = {"one": flat[:2], "two": flat[2:], "third": torch.ones(2) * 7 if apart else flat[:2]}
        return {"model": model, "average": {"w": average, "b": model.bias, **views}}

    objects, fresh = build(apart=True), build(apart=False)
    one, two = fresh["average"]["one"], fresh["average"]["two"]
    again_from(objects, fresh, tmp_path)
    assert bits(fresh) == bits(objects)
    assert fresh["average"]["b"] is fresh["model"].bias
    assert fresh["average"]["one"] is one
    assert fresh["average"]["two"] is two


def test_tensors_over_what_was_filled_are_filled_where_they_go_beyond(tmp_path: pathlib.Path) -> None:
    def build() -> tuple[torch.Tensor, dict[str, object]]:
        flat = torch.zeros(4, 3)
        model = nn.Linear(3, 1, bias=False)
        model.weight.data = flat[3:]
        views = {"head": flat[:1], "third": flat[2], "all": flat.t(), "tail": flat.view(-1)[6:].numpy()}
        return flat, {"model": model, "views": views}

    saved, objects = build()
    saved += torch.arange(12.0).view(4, 3)
    live, fresh = build()
    again_from(objects, fresh, tmp_path)
    assert torch.equal(live, saved)
    assert fresh["views"]["all"].data_ptr() == live.data_ptr()
    assert fresh["views"]["tail"].base is not None


def test_tensors_that_parted_from_what_was_filled_are_replaced(tmp_path: pathlib.Path) -> None:
    flat, apart = torch.zeros(6, dtype=torch.complex64), torch.arange(6.0).to(torch.complex64)
    saved = {"head": torch.ones(2, dtype=torch.complex64), "all": apart, "tail": torch.full((2,), 7 + 1j)}
    fresh = {"views": {"head": flat[:2], "all": flat, "tail": flat[4:]}}
    again_from({"views": saved}, fresh, tmp_path)
    assert bits(fresh) == bits({"views": saved})
    assert flat.tolist() == [1, 1, 0, 0, 7 + 1j, 7 + 1j]


def test_what_already_had_its_bits_is_written_no_more(tmp_path: pathlib.Path) -> None:
    saved = {"a": torch.ones(4), "b": torch.tensor([1.0, 1, 0, 0]), "c": torch.full((4,), 5.0)}
    flat = torch.zeros(8)
    again_from({"views": saved}, fresh := {"views": {"a": flat[:4], "b": flat[2:6], "c": flat[4:]}}, tmp_path)
    assert bits(fresh) == bits({"views": saved})


# --- tensors of other kinds ------------------------------------------------------------------------------------------


class Wrapping(torch.Tensor):
    """Its elements are those of another tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapping:
        made: Wrapping = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return function(*[a.inner if isinstance(a, cls) else a for a in args], **(kwargs or {}))


class Flattened(Wrapping):
    """One that says of which tensors it is made."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):  # type: ignore[no-untyped-def]
        return cls(inner["inner"])


@pytest.mark.parametrize("kind", [Wrapping, Flattened])
def test_tensors_around_others_are_refused_by_path(kind: type[Wrapping]) -> None:
    plain = nn.Parameter(torch.ones(300))
    optimizer = torch.optim.SGD([plain], lr=0.1)
    optimizer.state[plain]["moment"] = kind(torch.arange(300.0))
    with pytest.raises(StateError, match=rf"'o/state/o/parameter/0/moment' is a {kind.__name__} around"):
        Collector({"o": optimizer}).collect()
    with pytest.raises(StateError, match=rf"'model/cache' is a {kind.__name__} around"):
        Collector({"model": buffered(kind(torch.ones(2)))}).collect()
    assert Collector({"t": torch.empty(0), "o": torch.optim.SGD([nn.Parameter(torch.ones(2))])}).collect().leaves


def test_expanded_buffers_come_back(tmp_path: pathlib.Path) -> None:
    objects, fresh = ({"model": buffered(torch.full((1, 4), v).expand(3, 4))} for v in (2.0, 0.0))
    again_from(objects, fresh, tmp_path)
    assert torch.equal(fresh["model"].cache, torch.full((3, 4), 2.0))
    assert fresh["model"].cache.stride() == (0, 1)


def test_arrays_without_a_dimension_come_back_so(tmp_path: pathlib.Path) -> None:
    fresh: dict[str, object] = {"state": {}}
    again_from({"state": {"x": np.array(3.5)}}, fresh, tmp_path)
    assert fresh["state"]["x"].shape == ()
    assert fresh["state"]["x"] == 3.5


def test_conjugated_and_negated_states_of_an_optimizer_come_back(tmp_path: pathlib.Path) -> None:
    def build(value: complex) -> dict[str, object]:
        plain = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        optimizer = torch.optim.SGD([plain], lr=0.1)
        moment = torch.full((3,), value, dtype=torch.complex64).conj()
        optimizer.state[plain] |= {"conj": moment, "neg": torch.full((3,), value, dtype=torch.complex64).conj().imag}
        return {"optimizer": optimizer}

    objects, fresh = build(1 + 2j), build(0j)
    again_from(objects, fresh, tmp_path)
    ((_, state),) = fresh["optimizer"].state.items()
    assert state["conj"].tolist() == [1 - 2j] * 3
    assert state["neg"].tolist() == [-2.0] * 3


# --- modules that change after protect -------------------------------------------------------------------------------


def test_parameters_and_parts_put_in_after_protect_are_refused_by_name() -> None:
    def changed(change: Callable[[nn.Module], object]) -> Collector:
        model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.ReLU())
        collector = Collector({"model": model})
        change(model)
        return collector

    with pytest.raises(StateError, match=r"model\.0\.weight was put into the model after protect"):
        changed(lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 3)))).collect()
    with pytest.raises(StateError, match=r"model\.1 was put into the model after protect"):
        changed(lambda m: m.__setitem__(1, nn.Linear(3, 2))).collect()
    with pytest.raises(StateError, match=r"model\.1\.table was put into the model after protect"):
        changed(lambda m: m[1].add_module("table", nn.BatchNorm1d(2, affine=False))).collect()
    for harmless in (
        lambda m: m.__setitem__(2, nn.Tanh()),
        lambda m: m.__setitem__(1, checkpointed(m[1])),
        lambda m: m.double(),
        lambda m: nn.utils.parametrize.register_parametrization(m[1], "weight", nn.Identity()),
    ):
        changed(harmless).collect()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """One rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_tensors_in_a_dict_are_filled_and_whole_parameters_after_an_evaluation_are_no_change(
    tmp_path: pathlib.Path, mesh: DeviceMesh
) -> None:
    def build(value: float) -> dict[str, object]:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        fully_shard(model, mesh=mesh)
        weight = nn.Parameter(distribute_tensor(torch.full((4, 2), value), mesh, [Shard(0)]))
        return {"model": model, "weights": {"w": weight}, "optimizer": torch.optim.SGD([weight], lr=0.1)}

    objects, fresh = build(2.0), build(0.0)
    collector, weight = Collector(fresh), fresh["weights"]["w"]
    with torch.no_grad():
        fresh["model"](torch.ones(3))
    assert not isinstance(fresh["model"][0].weight, DTensor)
    assert "model/0.weight" in collector.collect().leaves
    again_from(objects, fresh, tmp_path)
    assert fresh["weights"]["w"] is weight
    assert torch.equal(weight.to_local(), torch.full((4, 2), 2.0))


# --- optimizers with state of their own ------------------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Steps less and less, and averages in a tensor of its own."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.count, self.average = 0, torch.zeros(2)

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.count += 1
        self.average += self.count
        super().step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.div_(self.count)

    def state_dict(self) -> dict[str, object]:
        return {**super().state_dict(), "count": self.count, "average": self.average}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.count, self.average = state["count"], state["average"]  # type: ignore[assignment]
        super().load_state_dict({k: v for k, v in state.items() if k in ("state", "param_groups")})


def test_what_an_optimizer_keeps_beside_its_states_comes_back(tmp_path: pathlib.Path) -> None:
    def build() -> dict[str, object]:
        torch.manual_seed(1)
        model = nn.Linear(2, 2, dtype=torch.bfloat16)
        return {"model": model, "optimizer": Counting(model.parameters(), lr=0.1, momentum=0.9)}

    def step(objects: dict[str, object]) -> None:
        objects["model"](torch.ones(2, dtype=torch.bfloat16)).sum().backward()
        objects["optimizer"].step()

    objects, fresh = build(), build()
    for _ in range(3):
        step(objects)
    groups = fresh["optimizer"].param_groups
    again_from(objects, fresh, tmp_path)
    assert fresh["optimizer"].count == 3
    assert fresh["optimizer"].param_groups is groups
    for each in (objects, fresh):
        each["optimizer"].zero_grad()
        step(each)
    assert bits(fresh) == bits(objects)
    plain = {"model": fresh["model"], "optimizer": torch.optim.SGD(fresh["model"].parameters(), lr=0.1)}
    with pytest.raises(StateError, match=r"optimizer: state_dict\(\) has 'count', 'average' beside"):
        again_from(objects, plain, tmp_path)


def test_a_wrapped_optimizer_and_its_averager_come_back(tmp_path: pathlib.Path) -> None:
    def build() -> torch.optim.Optimizer:
        averager = PeriodicModelAverager.__new__(PeriodicModelAverager)
        averager.step = 0
        inner = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=0.1)
        return PostLocalSGDOptimizer(inner, averager)

    saved, live = build(), build()
    saved.averager.step = 7
    again_from({"optimizer": saved}, {"optimizer": live}, tmp_path)
    assert live.averager.step == 7
    assert live.param_groups is live.optim.param_groups


class SharpnessAware(torch.optim.Optimizer):
    """As davda54/sam has it: torch's ``state_dict()``, groups in common with the one inside, states apart."""

    def __init__(self, params: object, **options: object) -> None:
        super().__init__(params, {"rho": 0.05, **options})  # type: ignore[arg-type]
        self.base_optimizer = torch.optim.SGD(self.param_groups, **options)  # type: ignore[arg-type]
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], object]) -> None:  # type: ignore[override]
        parameters = [(p, group["rho"]) for group in self.param_groups for p in group["params"]]
        for parameter, rho in parameters:
            self.state[parameter]["old_p"] = parameter.data.clone()
            parameter.add_(parameter.grad * rho / (parameter.grad.norm() + 1e-12))
        self.zero_grad()
        torch.enable_grad()(closure)()
        for parameter, _ in parameters:
            parameter.data = self.state[parameter]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()


class Lookahead(torch.optim.Optimizer):
    """As it is often copied: its own ``state_dict()``, which takes the one inside along."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.defaults = optimizer, optimizer.param_groups, optimizer.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group["counter"] = 0

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.optimizer.step()
        for group in self.param_groups:
            group["counter"] += 1
            for fast in group["params"] if group["counter"] % 3 == 0 else ():
                slow = self.state[fast].setdefault("slow_param", torch.zeros_like(fast))
                slow += (fast - slow) / 2
                fast.copy_(slow)

    def state_dict(self) -> dict[str, object]:
        inner = self.optimizer.state_dict()
        return {"fast_state": inner["state"], "slow_state": dict(self.state), "param_groups": inner["param_groups"]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        super().load_state_dict({"state": state["slow_state"], "param_groups": state["param_groups"]})
        self.optimizer.load_state_dict({"state": state["fast_state"], "param_groups": state["param_groups"]})

    def slow(self) -> list[object]:
        return [self.state[parameter] for group in self.param_groups for parameter in group["params"]]


def sharpness_aware(model: nn.Module) -> SharpnessAware:
    return SharpnessAware(model.parameters(), lr=1e-2, momentum=0.9)


def lookahead(model: nn.Module) -> Lookahead:
    return Lookahead(torch.optim.Adam(model.parameters(), lr=1e-2))


@pytest.mark.parametrize(
    ("make", "protected"),
    [
        (sharpness_aware, lambda outer: {"outer": outer, "inner": outer.base_optimizer}),
        (sharpness_aware, lambda outer: {"inner": outer.base_optimizer, "outer": outer}),
        (sharpness_aware, lambda outer: {"inner": outer.base_optimizer}),
        (lookahead, lambda outer: {"inner": outer.optimizer, "slow": outer.slow()}),
    ],
)
def test_what_a_refused_wrapper_is_told_to_protect_is_enough(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    protected: Callable[[torch.optim.Optimizer], dict[str, object]],
    tmp_path: pathlib.Path,
) -> None:
    def build() -> tuple[dict[str, object], Callable[[int], None]]:
        torch.manual_seed(1)
        model = nn.Linear(4, 3)
        outer = make(model)
        schedule = torch.optim.lr_scheduler.ExponentialLR(outer, 0.9)

        def closure() -> None:
            model.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()

        def go_on(steps: int) -> None:
            for _ in range(steps):
                closure()
                outer.step(closure)
                schedule.step()

        return {"model": model, **protected(outer), "schedule": schedule}, go_on

    objects, go_on = build()
    go_on(7)
    fresh, go_on_afresh = build()
    again_from(objects, fresh, tmp_path)
    assert bits(fresh) == bits(objects)
    go_on(5)
    go_on_afresh(5)
    assert bits(fresh) == bits(objects)


def test_optimizers_around_one_with_a_state_of_its_own_are_refused_by_name() -> None:
    class Timm(Lookahead):
        def state_dict(self) -> dict[str, object]:
            return self.optimizer.state_dict()

    class Many(torch.optim.SGD):
        def __init__(self, params: list[nn.Parameter], held: Callable[[torch.optim.Optimizer], object]) -> None:
            super().__init__(params)
            self.each = held(torch.optim.Adam(params))

    def refused(outer: torch.optim.Optimizer, why: str, **others: object) -> None:
        with pytest.raises(StateError, match=why):
            Collector({"o": outer, **others})

    model = nn.Linear(2, 2)
    sam, ahead, timm = sharpness_aware(model), lookahead(model), Timm(torch.optim.Adam(model.parameters()))
    refused(sam, r"o: SharpnessAware\.base_optimizer is another .*\(SGD\).* Protect the optimizer that it wraps too$")
    refused(sam, "would miss", other=torch.optim.SGD(model.parameters()))
    for outer in (ahead, timm):
        why = (
            r"o: .*\.optimizer is another .*\(Adam\).* in its place, and the rest of its state as a dict, a list or an"
        )
        refused(outer, why)
        refused(outer, why, inner=outer.optimizer)
    for held in (lambda one: [one], lambda one: (1, one), lambda one: {"w": one}):
        refused(Many(list(model.parameters()), held), r"o: .*Many\.each is another")


def test_an_optimizer_that_is_hidden_in_another_still_takes_its_state(tmp_path: pathlib.Path) -> None:
    class Hiding(Counting):
        def __init__(self, params: list[nn.Parameter]) -> None:
            super().__init__(params, lr=0.1)
            self.hidden = [[torch.optim.SGD(params, lr=0.1, momentum=0.9)]]

        def state_dict(self) -> dict[str, object]:
            return {**super().state_dict(), "inner": self.hidden[0][0].state_dict()}

        def load_state_dict(self, state: dict[str, object]) -> None:
            super().load_state_dict(state)
            self.hidden[0][0].load_state_dict(state_dict=state["inner"])

    saved, live = (Hiding([nn.Parameter(torch.ones(2))]) for _ in range(2))
    inner = saved.hidden[0][0]
    (parameter,) = inner.param_groups[0]["params"]
    parameter.grad = torch.ones(2)
    inner.step()
    again_from({"o": saved}, {"o": live}, tmp_path)
    assert [state["momentum_buffer"].tolist() for state in live.hidden[0][0].state.values()] == [[1, 1]]


def test_what_an_optimizer_keeps_beside_its_states_comes_back_where_it_is_trained(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> torch.optim.Optimizer:
        return Counting([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1))

    def info(self: Shards, name: str) -> object:
        return {**told(self, name), **({"device": "cuda"} if "average" in name or "/lr" in name else {})}

    told, live = Shards.info, build()
    live.param_groups[0]["lr"] = 0.1
    monkeypatch.setattr(Shards, "info", info)
    assert _device_of(live) == torch.device("cpu")
    monkeypatch.setattr("outlast.protect.reload._device_of", lambda optimizer: torch.device("meta"))
    again_from({"o": build()}, {"o": live}, tmp_path)
    assert live.average.is_meta
    assert live.param_groups[0]["lr"].is_meta


def test_optimizers_whose_state_would_be_missed_are_refused_by_name() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    class Elsewhere(torch.optim.SGD):
        def state_dict(self) -> dict[str, object]:
            return {**super().state_dict(), "state": {0: {"slow": torch.ones(2)}}}

    class Forgetting(torch.optim.SGD):
        def state_dict(self) -> dict[str, object]:
            return {**super().state_dict(), "count": 3}

    class Rich(Counting):
        def state_dict(self) -> dict[str, object]:
            return {**super().state_dict(), "thing": object()}

    for kind, why in (
        (ZeroRedundancyOptimizer, r"o is a .*ZeroRedundancyOptimizer.* Use FSDP2"),
        (Elsewhere, r"o: .*Elsewhere\.state_dict\(\) has tensors that are not in the optimizer's own \.state"),
        (Forgetting, r"o: state_dict\(\) has 'count' beside states and groups.*give .*Forgetting one that takes it"),
        (Rich, r"o/others/__own__/thing.*builtins\.object"),
    ):
        with pytest.raises(StateError, match=why):
            Collector({"o": kind([nn.Parameter(torch.ones(2))], lr=0.1)})


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
