"""What becomes of replicated state, of generators and of the position in the data when the world changes."""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset

from outlast.checkpoint.store import ObjectInfo
from outlast.data import ElasticSampler, epoch_order
from outlast.errors import CheckpointError, ImageError, ObjectMissing, StateError, StoreUnavailable
from outlast.protect import rng
from outlast.protect.leaves import Collector
from outlast.protect.reload import LocalShard, Shards, reload
from outlast.rank import sources
from outlast.rank.batches import Batches
from outlast.rank.restoring import restore
from outlast.snapshot.image import BLOCK
from support.shards import GENERATION, Objects, image

# --- another number of ranks, without sharding --------------------------------------------------------------------------


def replica(rank: int) -> dict[str, Any]:
    """What a data-parallel rank protects after some training: the same weights, its own statistics and notes."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 50_000, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model[1].running_mean += rank
    return {
        "model": model,
        "optimizer": optimizer,
        "sampler": ElasticSampler(1000, 64, seed=7),
        "notes": {"rank": rank, "t": torch.full((3,), float(rank))},
    }


def fresh() -> dict[str, Any]:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 50_000, bias=False))
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1.0),
        "sampler": ElasticSampler(1000, 64, seed=7),
        "notes": {},
    }


@pytest.fixture
def three(tmp_path: pathlib.Path) -> pathlib.Path:
    """The images of three replicas."""
    for rank in range(3):
        objects = replica(rank)
        objects["sampler"]._position = 640
        torch.manual_seed(50 + rank)
        image(tmp_path, objects, rank, 3)
    return tmp_path


class Note:
    """Keeps what a rank sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send(self, op: str, **fields: Any) -> None:
        self.sent.append((op, fields))


def message(folder: pathlib.Path, world: int = 3, **images: Any) -> dict[str, Any]:
    plan = {"generation": str(GENERATION), "direct": True, "world": world, "sources": {}}
    places = {str(rank): {"path": str(folder / f"slot-{rank}-0.img")} for rank in range(world)}
    return {"op": "restore", "plan": plan, "images": places | images}


@pytest.fixture(autouse=True)
def token(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("secret")
    monkeypatch.setenv("OUTLAST_TOKEN_FILE", str(tmp_path / "token"))


def same_weights(objects: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether weights and optimizer states are equal bit for bit (statistics apart)."""
    pairs = zip(objects["model"].parameters(), expected["model"].parameters(), strict=True)
    return all(
        torch.equal(mine, theirs)
        and all(
            torch.equal(objects["optimizer"].state[mine][key], value)
            for key, value in expected["optimizer"].state[theirs].items()
        )
        for mine, theirs in pairs
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_another_world_goes_on_with_rank_0s_state(three: pathlib.Path, world: int) -> None:
    for rank in range(world):
        objects, link = fresh(), Note()
        restored = restore(link, message(three), Collector(objects), None, rank, world)
        assert restored.resized
        assert restored.step == 5
        assert same_weights(objects, replica(0))
        assert torch.equal(objects["model"][1].running_mean, replica(0)["model"][1].running_mean)
        assert objects["notes"]["rank"] == 0
        assert torch.equal(objects["notes"]["t"], torch.zeros(3))
        assert objects["sampler"].position == 640
        assert objects["optimizer"].param_groups[0]["lr"] == 1e-3
        expected = [] if rank else ["notes: each of the 3 old ranks had a state of its own"]
        assert [fields["text"].split(",")[0] for _, fields in link.sent] == expected
        assert all(fields["kind"] == "per-rank-state" for _, fields in link.sent)


def test_the_same_world_takes_each_its_own(three: pathlib.Path) -> None:
    for rank in range(3):
        objects, link = fresh(), Note()
        restored = restore(link, message(three), Collector(objects), None, rank, 3)
        assert not restored.resized
        assert objects["notes"]["rank"] == rank
        assert torch.equal(objects["model"][1].running_mean, replica(rank)["model"][1].running_mean)
        restored.set_generators(rank, 3)
        drawn = torch.rand(3)
        torch.manual_seed(50 + rank)
        assert torch.equal(drawn, torch.rand(3))
        assert link.sent == []


def test_a_hook_chooses_among_all_old_states(three: pathlib.Path) -> None:
    seen: list[Any] = []

    def choose(old: Any) -> Mapping[str, Any]:
        seen.extend(
            [len(old), sorted(old[0]), [state["notes"]["rank"] for state in old], old[-1]["notes"]["t"].tolist()]
        )
        return {"notes": {"rank": sum(state["notes"]["rank"] for state in old[:3])}}

    objects, link = fresh(), Note()
    restore(link, message(three), Collector(objects), choose, 0, 2)
    assert seen == [3, ["notes", "sampler"], [0, 1, 2], [2.0, 2.0, 2.0]]
    assert objects["notes"] == {"rank": 3}
    assert objects["sampler"].position == 640
    assert link.sent == []
    with pytest.raises(StateError, match=r"on_resize gave a state for model, .*: sampler, notes"):
        restore(Note(), message(three), Collector(fresh()), lambda old: {"model": {}}, 0, 2)
    with pytest.raises(IndexError, match="3 ranks"):
        restore(Note(), message(three), Collector(fresh()), lambda old: old[3], 0, 2)
    restore(Note(), message(three), Collector(objects := fresh()), lambda old: None, 1, 2)
    assert objects["notes"]["rank"] == 0


def test_the_hook_is_not_asked_in_the_same_world(three: pathlib.Path) -> None:
    restore(Note(), message(three), Collector(fresh()), lambda old: pytest.fail("asked"), 0, 3)


def test_what_does_not_fit_is_named_with_the_checkpoint(three: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Objects(**{f"k{rank}": (three / f"slot-{rank}-0.img").read_bytes() for rank in range(3)})
    monkeypatch.setattr(sources, "open_store", lambda url: store)
    told = message(three, **{str(rank): {"url": "s3://bucket", "key": f"k{rank}"} for rank in range(3)})
    objects = fresh()
    objects["model"][0], objects["model"][1] = nn.Linear(40, 31), nn.BatchNorm1d(30).double()
    objects["optimizer"] = torch.optim.AdamW(objects["model"].parameters())
    words = r"does not fit the checkpoint of generation 1-\w+-5 at s3://bucket: .*'model/0.weight' is \(31, 40\).*\(30, 40\)"
    with pytest.raises(StateError, match=words) as caught:
        restore(link := Note(), told, Collector(objects), None, 0, 2)
    assert "'model/1.weight' is (30,) torch.float64" in str(caught.value)
    assert link.sent == [], "the checkpoint is not to blame"


@pytest.mark.parametrize(
    ("harm", "trouble"),
    [
        (lambda store: store.objects.pop("k1"), "bad"),
        (lambda store: store.objects.update(k0=store.objects["k0"][:-3]), "bad"),
        (lambda store: setattr(store, "head", unavailable), "unavailable"),
    ],
)
def test_trouble_with_the_store_is_told(
    three: pathlib.Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Objects], Any], trouble: str
) -> None:
    store = Objects(**{f"k{rank}": (three / f"slot-{rank}-0.img").read_bytes() for rank in range(3)})
    harm(store)
    monkeypatch.setattr(sources, "open_store", lambda url: store)
    told = message(three, **{str(rank): {"url": "s3://bucket", "key": f"k{rank}"} for rank in range(3)})
    link = Note()
    with pytest.raises((CheckpointError, ObjectMissing, StoreUnavailable)) as caught:
        restore(link, told, Collector(fresh()), None, 0, 2)
    failed = ("restore-failed", {"generation": str(GENERATION), "reason": str(caught.value), "trouble": trouble})
    assert link.sent == [failed]


def unavailable(key: str) -> ObjectInfo:
    raise StoreUnavailable("503")


def test_damage_in_memory_is_no_fault_of_the_checkpoint(three: pathlib.Path) -> None:
    path = three / "slot-1-0.img"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageError, match="does not verify"):
        restore(link := Note(), message(three), Collector(fresh()), None, 0, 2)
    assert [(op, fields["trouble"]) for op, fields in link.sent] == [("restore-failed", "unavailable")]


def test_each_replica_reads_its_share_of_every_image(three: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is read whole when its ranks shared the weights among them."""
    store = Objects(**{f"k{rank}": (three / f"slot-{rank}-0.img").read_bytes() for rank in range(3)})
    monkeypatch.setattr(sources, "open_store", lambda url: store)
    told = message(three, **{str(rank): {"url": "s3://bucket", "key": f"k{rank}"} for rank in range(3)})
    objects = fresh()
    restore(Note(), told, Collector(objects), None, 1, 2)
    assert same_weights(objects, replica(0))
    state = sum(leaf.nbytes for leaf in Collector(objects).collect().leaves.values())
    assert sum(length for _, length in store.reads) <= state + 3 * 8 * BLOCK


# --- generators -------------------------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_derived_generators_are_others_for_each_rank_and_the_same_every_time() -> None:
    found = set()
    for key in [(7, 5, 0, 3), (7, 5, 1, 3), (7, 5, 0, 2), (7, 6, 0, 3), (8, 5, 0, 3)]:
        rng.derive(*key)
        first = draws()
        rng.derive(*key)
        assert first == draws()
        found |= set(first)
    assert len(found) == 15


def test_the_seed_is_rank_0s_and_outlives_resizes() -> None:
    torch.manual_seed(41)
    state = rng.capture()
    assert rng.seed_of(state) == 41
    rng.derive(rng.seed_of(state), 5, 1, 3)
    again = rng.capture(seed=rng.seed_of(state))
    assert rng.seed_of(again) == 41
    rng.restore(again)
    older = {key: value for key, value in state.items() if key != "seed"}
    assert rng.seed_of(older) == rng.seed_of(dict(older)) != 41


# --- data -------------------------------------------------------------------------------------------------------------


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return int(index)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_resizes_use_every_sample_once_in_one_order(data: st.DataObject) -> None:
    """The samples that loaders really gave, over an epoch and a half, when the world changes at any step."""
    length, batch = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 24))
    micro = data.draw(st.none() | st.integers(1, 6))
    steps, state, used, world = -(-3 * length // (2 * batch)), None, [], 1
    for step in range(steps):
        if step == 0 or data.draw(st.booleans()):
            world = data.draw(st.integers(1, 7))
            ranks = [Batches(loader(length, batch, micro, rank, world, state), 1) for rank in range(world)]
            for batches in ranks:
                batches.open()
        taken, weights = [], []
        for batches in ranks:
            parts = list(batches.step())
            assert [last for _, last, _ in parts] == [False] * (len(parts) - 1) + [True]
            taken.append([sample for part, _, weight in parts if weight for sample in part.tolist()])
            weights.append([weight for _, _, weight in parts])
            batches.finished()
        assert len({len(own) for own in weights}) == 1, "the same count of micro-batches on every rank"
        assert sum(map(sum, weights)) / world == pytest.approx(1.0)
        used += [sample for own in taken for sample in own]
        state = json.loads(json.dumps(ranks[-1].loader.batch_sampler.state_dict()))
    epochs = [epoch_order(3, epoch, length).tolist() for epoch in range(-(-steps * batch // length))]
    assert used == [sample for order in epochs for sample in order][: steps * batch]


def loader(length: int, batch: int, micro: int | None, rank: int, world: int, state: Any) -> DataLoader[int]:
    sampler = ElasticSampler(length, batch, seed=3, micro_batch=micro)
    if state is not None:
        sampler.load_state_dict(state)
    sampler.set_world(rank, world)
    return DataLoader(Numbers(length), batch_sampler=sampler)


def test_a_stateful_loader_follows_its_sampler_into_another_world(tmp_path: pathlib.Path) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make(world: int) -> dict[str, Any]:
        sampler = ElasticSampler(100, 12, seed=3, micro_batch=2)
        sampler.set_world(0, world)
        return {"loader": StatefulDataLoader(Numbers(100), batch_sampler=sampler)}

    objects = make(3)
    iterator = iter(objects["loader"])
    for _ in range(5 * 2 + 1):  # five steps of two micro-batches, and one that was drawn ahead
        next(iterator)
    image(tmp_path, objects, 0, 3, {})
    again = make(2)
    shard = LocalShard(tmp_path / "slot-0-0.img", GENERATION)
    reload(Collector(again), Shards(shard, lambda rank: pytest.fail("no"), 0, 3, resized=True))
    assert again["loader"].batch_sampler.position == 60
    assert next(iter(again["loader"])).tolist() == epoch_order(3, 0, 100)[60:62].tolist()
