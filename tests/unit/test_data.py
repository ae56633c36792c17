"""ElasticSampler: every sample once, in one order, whatever the world does."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.data import ElasticSampler, SampleIndex, StepPlan, epoch_order
from outlast.errors import StateError

WORLDS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def plans(sampler: ElasticSampler, world: int) -> list[StepPlan]:
    """What every rank of ``world`` does in the sampler's next step."""
    done = []
    for rank in range(world):
        sampler.set_world(rank, world)
        done.append(sampler.plan(sampler.position))
    return done


def own_samples(plan: StepPlan) -> list[SampleIndex]:
    """Without the padding."""
    pairs = zip(plan.micro_batches, plan.weights, strict=True)
    return [index for batch, weight in pairs if weight > 0 for index in batch]


@pytest.mark.parametrize(
    ("seed", "epoch", "order"),
    [
        (7, 0, [9, 0, 3, 2, 6, 4, 1, 5, 8, 7]),
        (7, 1, [8, 3, 7, 0, 2, 9, 4, 5, 6, 1]),
        (2**64 - 1, 5, [5, 3, 8, 2, 0, 7, 6, 4, 1, 9]),
    ],
)
def test_the_order_never_changes(seed: int, epoch: int, order: list[int]) -> None:
    assert epoch_order(seed, epoch, 10).tolist() == order


def test_any_part_of_an_order_is_had_without_the_rest() -> None:
    whole = epoch_order(7, 2, 1000).tolist()
    assert epoch_order(7, 2, 1000, 313, 471).tolist() == whole[313:471]
    huge = epoch_order(7, 2, 10**15, 10**14, 10**14 + 3).tolist()
    assert len(set(huge)) == 3
    assert all(0 <= index < 10**15 for index in huge)


def test_orders_look_like_chance() -> None:
    order = epoch_order(1, 0, 100_000).astype(float)
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    first = [int(epoch_order(seed, epoch, 10, 0, 1)[0]) for seed in range(50) for epoch in range(200)]
    deviation = (np.bincount(first, minlength=10) - 1000) ** 2 / 1000
    assert deviation.sum() < 28  # chi-squared with 9 degrees of freedom, p = 0.001


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_an_order_holds_each_sample_once(length: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(seed, epoch, length).tolist()) == list(range(length))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 8)), WORLDS)
def test_every_sample_is_used_once_in_one_order_over_any_worlds(
    length: int, global_batch: int, micro_batch: int | None, worlds: list[int]
) -> None:
    sampler = ElasticSampler(length, global_batch, seed=3, micro_batch=micro_batch)
    used: list[SampleIndex] = []
    for world in worlds:
        for plan in plans(sampler, world):
            used += own_samples(plan)
        sampler.advance()
        resumed = ElasticSampler(length, global_batch, seed=3, micro_batch=micro_batch)
        resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        sampler = resumed
    orders = (epoch_order(3, epoch, length).tolist() for epoch in itertools.count())
    expected = itertools.islice(itertools.chain.from_iterable(orders), len(worlds) * global_batch)
    assert [int(index) for index in used] == list(expected)
    assert [index.position for index in used] == list(range(len(worlds) * global_batch))
    assert all(index.epoch == index.position // length for index in used)


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(1, 20)), st.integers(1, 17))
def test_shares_and_micro_batches_are_balanced_and_weights_make_a_mean(
    global_batch: int, micro_batch: int | None, world: int
) -> None:
    sampler = ElasticSampler(1000, global_batch, micro_batch=micro_batch)
    done = plans(sampler, world)
    shares = [len(own_samples(plan)) for plan in done]
    assert max(shares) - min(shares) <= 1
    counts = {len(plan.micro_batches) for plan in done}
    largest = math.ceil(global_batch / world)
    assert counts == {1 if micro_batch is None else math.ceil(largest / micro_batch)}
    for plan, share in zip(done, shares, strict=True):
        sizes = [len(batch) if weight else 0 for batch, weight in zip(plan.micro_batches, plan.weights, strict=True)]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= (micro_batch or largest)
        assert sum(sizes) == share
        assert all(len(batch) == max(size, 1) for batch, size in zip(plan.micro_batches, sizes, strict=True))
        assert plan.weights == tuple(world * size / global_batch for size in sizes)
    assert sum(sum(plan.weights) for plan in done) == pytest.approx(world)


def test_64_over_3() -> None:
    sampler = ElasticSampler(1000, 64, seed=1, micro_batch=16)
    done = plans(sampler, 3)
    assert [[len(batch) for batch in plan.micro_batches] for plan in done] == [[10, 11], [10, 11], [11, 11]]
    assert sum(sum(plan.weights) for plan in done) == pytest.approx(3.0)
    losses = np.random.default_rng(0).random(1000)
    weighted = sum(
        weight * losses[list(batch)].mean()
        for plan in done
        for batch, weight in zip(plan.micro_batches, plan.weights, strict=True)
    )
    assert weighted / 3 == pytest.approx(losses[epoch_order(1, 0, 1000)[:64]].mean())


def test_equal_shares_in_one_micro_batch_weigh_exactly_one() -> None:
    for world in range(1, 20):
        sampler = ElasticSampler(100, 7 * world)
        sampler.set_world(world - 1, world)
        assert sampler.weights == (1.0,)
        assert sampler.weight(0, 0) == 1.0


def test_more_ranks_than_samples_are_padded_with_weight_0() -> None:
    sampler = ElasticSampler(10, 2, micro_batch=1)
    done = plans(sampler, 4)
    assert [plan.weights for plan in done] == [(0.0,), (2.0,), (0.0,), (2.0,)]
    assert all(len(batch) == 1 for plan in done for batch in plan.micro_batches)
    assert all(index.position < 2 for plan in done for batch in plan.micro_batches for index in batch)


def test_a_global_batch_reaches_into_the_next_epoch() -> None:
    sampler = ElasticSampler(5, 4, seed=2)
    sampler.advance()
    (batch,) = sampler.plan(sampler.position).micro_batches
    assert [index.epoch for index in batch] == [0, 1, 1, 1]
    assert [int(index) for index in batch] == [epoch_order(2, 0, 5)[4], *epoch_order(2, 1, 5)[:3]]


def test_iterating_gives_the_plans_and_moves_nothing() -> None:
    sampler = ElasticSampler(11, 4, seed=2, micro_batch=1)
    sampler.set_world(1, 2)
    drawn = list(itertools.islice(sampler, 20))
    planned = [list(batch) for step in range(10) for batch in sampler.plan(4 * step).micro_batches]
    assert drawn == planned
    assert sampler.position == 0
    for _ in range(3):
        sampler.advance()
    assert sampler.position == 12
    assert sampler.epoch == 1
    assert list(itertools.islice(sampler, 14)) == planned[6:]


def test_an_iterator_keeps_the_world_it_was_made_in() -> None:
    sampler = ElasticSampler(8, 4, seed=2)
    iterator = iter(sampler)
    first = next(iterator)
    sampler.set_world(0, 2)
    sampler.advance()
    assert len(next(iterator)) == len(first) == 4
    assert len(next(iter(sampler))) == 2


def test_an_iterator_can_be_moved() -> None:
    sampler = ElasticSampler(11, 4, seed=2, micro_batch=1)
    iterator = iter(sampler)
    list(itertools.islice(iterator, 6))
    state = json.loads(json.dumps(iterator.state_dict()))
    assert state == {"position": 4, "micro": 2}
    other = iter(sampler)
    other.load_state_dict(state)
    assert next(other) == next(iterator)


def test_length_counts_the_micro_batches_of_an_epoch() -> None:
    assert len(ElasticSampler(10, 4)) == 3
    assert len(ElasticSampler(10, 4, micro_batch=2)) == 6
    sampler = ElasticSampler(10, 4, micro_batch=2)
    sampler.set_world(0, 2)
    assert len(sampler) == 3


def test_a_sample_index_is_an_int_that_survives_pickling() -> None:
    index = pickle.loads(pickle.dumps(SampleIndex(5, 2, 17)))
    assert isinstance(index, SampleIndex)
    assert (index, index.epoch, index.position) == (5, 2, 17)
    assert copy.deepcopy(index).position == 17
    assert [10, 11, 12][SampleIndex(1, 0, 0)] == 11
    assert np.arange(3)[[SampleIndex(2, 0, 0)]].tolist() == [2]


def test_a_sampler_can_be_copied() -> None:
    sampler = ElasticSampler(10, 4, seed=1)
    sampler.advance()
    again = pickle.loads(pickle.dumps(sampler))
    assert next(iter(again)) == next(iter(sampler))


@pytest.mark.parametrize("name", ["seed", "length", "global_batch"])
def test_a_state_of_another_order_is_refused(name: str) -> None:
    sampler = ElasticSampler(10, 4, seed=1)
    state = sampler.state_dict() | {name: 99}
    with pytest.raises(StateError, match=f"{name}=99"):
        sampler.load_state_dict(state)


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(StateError, match="position is missing"):
        ElasticSampler(10, 4).load_state_dict({"seed": 0, "length": 10, "global_batch": 4})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"length": 0, "global_batch": 4}, ValueError, "length .* at least 1, not 0"),
        ({"length": 10, "global_batch": 0}, ValueError, "global_batch must be at least 1"),
        ({"length": 10, "global_batch": 4, "micro_batch": 0}, ValueError, "micro_batch must be at least 1"),
        ({"length": 10, "global_batch": 4, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"length": 10, "global_batch": 4, "seed": 2**64}, ValueError, "seed must be less than"),
        ({"length": [1, 2], "global_batch": 4}, TypeError, "length .* whole number"),
        ({"length": 10, "global_batch": 4.0}, TypeError, "global_batch must be a whole number, not 4.0"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ElasticSampler(**arguments)


def test_a_world_that_cannot_be_is_refused() -> None:
    sampler = ElasticSampler(10, 4)
    with pytest.raises(ValueError, match="rank must be less than world"):
        sampler.set_world(2, 2)
    with pytest.raises(ValueError, match="world must be at least 1"):
        sampler.set_world(0, 0)
    with pytest.raises(ValueError, match="micro must be less than"):
        sampler.weight(0, 1)
    with pytest.raises(ValueError, match="position must be at least 0"):
        sampler.plan(-1)


def test_numpy_numbers_are_taken() -> None:
    sampler = ElasticSampler(np.int64(10), np.int32(4), np.uint64(2**64 - 1))
    assert json.dumps(sampler.state_dict())
