"""Random augmentations in DataLoader workers come out the same wherever a run is restarted."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from outlast.data import ElasticSampler, SampleIndex
from outlast.errors import RequestError
from outlast.loading import SeededDataset, attach, seed_generators

LENGTH = 11


class Noisy(Dataset[Any]):
    """A sample is its index and one draw from each of the three global generators."""

    opened = False

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return int(index), random.random(), float(np.random.random()), float(torch.rand(()))


class Batched(Noisy):
    """One that fetches whole batches."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, float, float, float]]:
        return [self[index] for index in indices]


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def draw(dataset: Any, done: int, steps: int, workers: int, micro_batch: int | None = 2) -> list[list[Any]]:
    """The micro-batches of ``steps`` steps after ``done`` ones, as a new process would get them."""
    sampler = ElasticSampler(LENGTH, 4, seed=5, micro_batch=micro_batch)
    for _ in range(done):
        sampler.advance()
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list, timeout=60)
    assert attach(loader, sampler.seed)
    torch.manual_seed(done)
    return list(itertools.islice(loader, steps * sampler.micro_batches))


@pytest.mark.parametrize(
    "dataset", [Noisy(), Batched(), Subset(Batched(), range(LENGTH))], ids=lambda d: type(d).__name__
)
def test_batches_are_the_same_wherever_it_is_restarted(dataset: Dataset[Any]) -> None:
    whole = draw(dataset, 0, 6, workers=2)
    assert draw(dataset, 2, 4, workers=2) == whole[4:]
    assert draw(dataset, 3, 3, workers=1) == whole[6:]


def test_every_sample_of_every_epoch_draws_anew() -> None:
    samples = [sample for batch in draw(Noisy(), 0, 6, workers=1) for sample in batch]
    draws = [sample[1:] for sample in samples]
    assert len(set(draws)) == len(draws) == 24


def test_a_sample_does_not_depend_on_how_batches_are_cut() -> None:
    halves, whole = draw(Noisy(), 0, 3, workers=2), draw(Noisy(), 0, 3, workers=1, micro_batch=None)
    assert list(itertools.chain(*halves)) == list(itertools.chain(*whole))


def test_seeds_differ_and_are_pinned() -> None:
    seed_generators(7, 1, 2)
    first = (random.random(), float(np.random.random()), float(torch.rand(())))
    seed_generators(7, 1, 2)
    assert first == (random.random(), float(np.random.random()), float(torch.rand(())))
    assert first == (0.1803466946332979, 0.09654380673134544, 0.7709532380104065)
    seed_generators(7, 2, 1)
    assert first != (random.random(), float(np.random.random()), float(torch.rand(())))


def test_the_main_process_keeps_its_own_generators() -> None:
    dataset = SeededDataset(Noisy(), 5)
    random.seed(1)
    expected = random.random()
    random.seed(1)
    assert dataset[SampleIndex(3, 0, 0)][1] == expected


def test_indices_of_other_samplers_are_left_alone() -> None:
    loader = DataLoader(Noisy(), batch_size=4, num_workers=1, collate_fn=list, timeout=60)
    assert attach(loader, 5)
    torch.manual_seed(1)
    first = list(loader)
    torch.manual_seed(2)
    assert first != list(loader)


def test_the_wrapped_dataset_is_seen_through() -> None:
    dataset = SeededDataset(Noisy(), 5)
    assert len(dataset) == LENGTH
    dataset.opened = True
    assert dataset._dataset.opened is True
    assert not hasattr(dataset, "missing")
    again = pickle.loads(pickle.dumps(dataset))
    assert isinstance(again, SeededDataset)
    assert again.opened is True


def open_dataset(_: int) -> None:
    info: Any = get_worker_info()
    info.dataset.opened = True


class NeedsOpening(Noisy):
    def __getitem__(self, index: int) -> Any:
        assert self.opened
        return super().__getitem__(index)


def test_a_workers_initialisation_reaches_the_dataset() -> None:
    sampler = ElasticSampler(LENGTH, 4, seed=5)
    loader = DataLoader(
        NeedsOpening(), batch_sampler=sampler, num_workers=1, worker_init_fn=open_dataset, collate_fn=list, timeout=60
    )
    assert attach(loader, 5)
    assert len(next(iter(loader))) == 4


def test_attaching_twice_wraps_once() -> None:
    loader = DataLoader(Noisy(), num_workers=1)
    assert attach(loader, 5)
    assert attach(loader, 5)
    assert isinstance(loader.dataset, SeededDataset)
    assert isinstance(loader.dataset._dataset, Noisy)


def test_loaders_that_need_nothing_are_left_alone() -> None:
    single, stream = DataLoader(Noisy()), DataLoader(Endless(), num_workers=1)
    assert not attach(single, 5)
    assert not attach(stream, 5)
    assert isinstance(single.dataset, Noisy)
    assert isinstance(stream.dataset, Endless)


def test_running_workers_are_no_place_to_attach_to() -> None:
    loader = DataLoader(Noisy(), num_workers=1, persistent_workers=True, timeout=60)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(RequestError, match="before iterating"):
        attach(loader, 5)
    del iterator, loader


def test_a_spawned_worker_gets_the_same_samples() -> None:
    sampler = ElasticSampler(LENGTH, 4, seed=5, micro_batch=2)
    loader = DataLoader(
        Noisy(), batch_sampler=sampler, num_workers=1, collate_fn=list, timeout=120, multiprocessing_context="spawn"
    )
    attach(loader, 5)
    assert list(itertools.islice(loader, 2)) == draw(Noisy(), 0, 1, workers=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_where_it_was(workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make() -> Any:
        sampler = ElasticSampler(LENGTH, 4, seed=5, micro_batch=2)
        loader = StatefulDataLoader(
            Noisy(), batch_sampler=sampler, num_workers=workers, collate_fn=list, timeout=60 * (workers > 0)
        )
        attach(loader, sampler.seed)
        return loader

    loader = make()
    iterator = iter(loader)
    list(itertools.islice(iterator, 5))
    state = loader.state_dict()
    rest = [[sample[0] for sample in next(iterator)] for _ in range(4)]
    again = make()
    again.load_state_dict(state)
    assert [[sample[0] for sample in batch] for batch in itertools.islice(again, 4)] == rest
