"""Which samples a step trains on: a pure function of (seed, epoch) and of a position counted in global samples.

The stream of global samples is epoch after epoch, each a permutation of the dataset. Step after step takes the next
``global_batch`` samples of it; a global batch may reach over the end of an epoch into the next one's order, so that
none is partial. Ranks only differ in which part of a global batch they take, so that the order survives any restart,
and any change of the world, at any step.

The order of an epoch is computed sample by sample, so that a restart costs nothing and billions of samples need no
memory: a Feistel network over the next power of four (Luby and Rackoff 1988, "How to construct pseudorandom
permutations"), walked until it is back within the dataset (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains"). Its round function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), its keys are drawn from
(seed, epoch) by the same. It is integer arithmetic alone, so it is the same everywhere and for ever.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Self, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from outlast.errors import StateError

Words = NDArray[np.uint64]

_ROUNDS = 10
_WORD = 2**64
_IDENTITY = ("seed", "length", "global_batch")


class SampleIndex(int):
    """An index into the dataset that knows its place: ``epoch``, and ``position`` in the stream of global samples."""

    epoch: int
    position: int

    def __new__(cls, index: int, epoch: int, position: int) -> Self:
        self = super().__new__(cls, index)
        self.epoch = epoch
        self.position = position
        return self

    def __reduce__(self) -> tuple[type[Self], tuple[int, int, int]]:
        return type(self), (int(self), self.epoch, self.position)


@dataclass(frozen=True)
class StepPlan:
    """One rank's part of one step. ``weights[i]`` multiplies the mean loss of ``micro_batches[i]``.

    A micro-batch without samples of its own is padded with one sample and has weight 0, so that every rank runs the
    same number of forward and backward passes.
    """

    micro_batches: tuple[tuple[SampleIndex, ...], ...]
    weights: tuple[float, ...]


def _mix(words: Words) -> Words:
    """SplitMix64's finaliser: every bit of a word decides every bit of its image."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> Words:
    start = int(_mix(np.array([seed], np.uint64))[0])
    steps = [(start + (epoch * _ROUNDS + number + 1) * 0x9E3779B97F4A7C15) % _WORD for number in range(_ROUNDS)]
    return _mix(np.array(steps, np.uint64))


def epoch_order(seed: int, epoch: int, length: int, start: int = 0, stop: int | None = None) -> Words:
    """Samples ``start:stop`` (default: all) of the permutation of ``range(length)`` that an epoch goes through.

    Pinned, see the module's docstring. Time and memory grow with ``stop - start`` alone.
    """
    places = np.arange(start, length if stop is None else stop, dtype=np.uint64)
    half = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    mask, keys = (np.uint64(1) << half) - np.uint64(1), _round_keys(seed, epoch)
    outside = np.ones(len(places), bool)
    while outside.any():
        left, right = places[outside] >> half, places[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        places[outside] = left << half | right
        outside = places >= length
    return places


@dataclass(frozen=True)
class Division:
    """How the stream of global samples is cut into steps, ranks and micro-batches. Pure."""

    length: int
    global_batch: int
    seed: int
    micro_batch: int | None
    rank: int = 0
    world: int = 1

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step: the same number on every rank, enough for the largest share."""
        largest_share = -(-self.global_batch // self.world)
        return 1 if self.micro_batch is None else -(-largest_share // self.micro_batch)

    def bounds(self, micro: int) -> tuple[int, int]:
        """First and last + 1 sample, counted within the global batch, of this rank's micro-batch ``micro``."""
        start = self.rank * self.global_batch // self.world
        share = (self.rank + 1) * self.global_batch // self.world - start
        count = self.micro_batches
        return start + micro * share // count, start + (micro + 1) * share // count

    def weight(self, micro: int) -> float:
        """``world * size / global_batch`` for the ``size`` own samples of micro-batch ``micro``."""
        first, stop = self.bounds(micro)
        return self.world * (stop - first) / self.global_batch

    def samples(self, position: int, micro: int) -> tuple[SampleIndex, ...]:
        """The samples of micro-batch ``micro`` of the step that begins at ``position`` (global samples)."""
        first, stop = self.bounds(micro)
        if first == stop:
            first = min(first, self.global_batch - 1)
            stop = first + 1
        return tuple(self._stream(position + first, position + stop))

    def _stream(self, position: int, stop: int) -> Iterator[SampleIndex]:
        while position < stop:
            epoch, place = divmod(position, self.length)
            count = min(stop - position, self.length - place)
            for offset, index in enumerate(epoch_order(self.seed, epoch, self.length, place, place + count).tolist()):
                yield SampleIndex(index, epoch, position + offset)
            position += count


@dataclass
class MicroBatches(Iterator[list[SampleIndex]]):
    """One rank's micro-batches from a position on, without end. Its state is its own, so that it can be moved."""

    division: Division
    position: int
    micro: int = field(default=0)

    def __next__(self) -> list[SampleIndex]:
        batch = list(self.division.samples(self.position, self.micro))
        self.micro += 1
        if self.micro == self.division.micro_batches:
            self.position, self.micro = self.position + self.division.global_batch, 0
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where it stands: the step's ``position`` in global samples and the next ``micro``-batch of it."""
        return {"position": self.position, "micro": self.micro}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where ``state_dict`` was taken."""
        self.position, self.micro = state["position"], state["micro"]


class ElasticSampler:
    """A ``batch_sampler`` for ``DataLoader``: this rank's share of each global batch, cut into micro-batches.

    ``length`` is the dataset's, ``global_batch`` the samples of a step over all ranks, ``seed`` (0 to 2**64 - 1)
    decides the order. ``micro_batch`` is the most samples that a rank takes at once; without it a share is one
    micro-batch. Shares are contiguous in the global batch and differ by at most one sample; so do a share's
    micro-batches.

    Iterating yields lists of ``SampleIndex`` without end, from the position consumed so far. It does not move that
    position, since a loader draws ahead: ``advance`` does, once a global step is done. ``outlast.Run`` calls it, and
    ``set_world``. Raises ValueError or TypeError for arguments that make no sense.
    """

    def __init__(
        self,
        length: SupportsIndex,
        global_batch: SupportsIndex,
        seed: SupportsIndex = 0,
        *,
        micro_batch: SupportsIndex | None = None,
    ) -> None:
        samples = _at_least(1, length, "length (the dataset's)")
        key = _at_least(0, seed, "seed")
        if key >= _WORD:
            raise ValueError(f"seed must be less than 2**64, not {key}")
        self._division = Division(
            length=samples,
            global_batch=_at_least(1, global_batch, "global_batch"),
            seed=key,
            micro_batch=None if micro_batch is None else _at_least(1, micro_batch, "micro_batch"),
        )
        self._position = 0

    @property
    def seed(self) -> int:
        """What decides the order, together with the epoch."""
        return self._division.seed

    @property
    def length(self) -> int:
        """Samples in the dataset."""
        return self._division.length

    @property
    def global_batch(self) -> int:
        """Samples of a step over all ranks."""
        return self._division.global_batch

    @property
    def rank(self) -> int:
        """Whose share this is."""
        return self._division.rank

    @property
    def world(self) -> int:
        """Among how many ranks a global batch is shared out."""
        return self._division.world

    @property
    def position(self) -> int:
        """Global samples consumed by finished steps."""
        return self._position

    @property
    def epoch(self) -> int:
        """The epoch that the next step begins in."""
        return self._position // self.length

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, the same number on every rank."""
        return self._division.micro_batches

    def set_world(self, rank: SupportsIndex, world: SupportsIndex) -> None:
        """Take rank ``rank``'s share of ``world``. Iterators made before keep theirs: make the loader's anew."""
        ranks = _at_least(1, world, "world")
        number = _at_least(0, rank, "rank")
        if number >= ranks:
            raise ValueError(f"rank must be less than world ({ranks}), not {number}")
        self._division = replace(self._division, rank=number, world=ranks)

    def advance(self) -> None:
        """A global step is done: its samples count as consumed."""
        self._position += self.global_batch

    def plan(self, position: SupportsIndex) -> StepPlan:
        """This rank's part of the step that begins at ``position`` (global samples). Pure."""
        start = _at_least(0, position, "position")
        return StepPlan(
            micro_batches=tuple(self._division.samples(start, micro) for micro in range(self.micro_batches)),
            weights=self.weights,
        )

    @property
    def weights(self) -> tuple[float, ...]:
        """``weight`` of each micro-batch of a step."""
        return tuple(self._division.weight(micro) for micro in range(self.micro_batches))

    def weight(self, step: SupportsIndex, micro: SupportsIndex) -> float:
        """The factor for the mean loss of micro-batch ``micro`` of step ``step``, both counted from 0.

        Summed over the micro-batches and averaged over the ranks, the weighted gradients are the mean over the global
        batch. The same for every step, since all global batches have one size.
        """
        _at_least(0, step, "step")
        number = _at_least(0, micro, "micro")
        if number >= self.micro_batches:
            raise ValueError(
                f"micro must be less than the micro-batches of a step ({self.micro_batches}), not {number}"
            )
        return self._division.weight(number)

    def state_dict(self) -> dict[str, int]:
        """JSON-able: ``seed``, ``length``, ``global_batch`` and ``position``, the global samples consumed."""
        return {
            "seed": self.seed,
            "length": self.length,
            "global_batch": self.global_batch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, in any world.

        Raises StateError when the state is of another order: another seed, dataset length or global batch.
        """
        missing = [name for name in (*_IDENTITY, "position") if name not in state]
        if missing:
            raise StateError(f"the state is no ElasticSampler's: {', '.join(missing)} is missing")
        for name in _IDENTITY:
            if state[name] != getattr(self, name):
                raise StateError(
                    f"the data position was saved with {name}={state[name]}, but this ElasticSampler has "
                    f"{name}={getattr(self, name)}: give it the same, or start the job afresh"
                )
        self._position = _at_least(0, state["position"], "position")

    def __iter__(self) -> MicroBatches:
        return MicroBatches(self._division, self._position)

    def __len__(self) -> int:
        """Micro-batches of an epoch, a last partial step counted whole: for progress bars, as iteration has no end."""
        return -(-self.length // self.global_batch) * self.micro_batches

    def __repr__(self) -> str:
        cut = self._division
        return (
            f"ElasticSampler(length={cut.length}, global_batch={cut.global_batch}, seed={cut.seed}, "
            f"micro_batch={cut.micro_batch}, rank={cut.rank}, world={cut.world}, position={self._position})"
        )


def _at_least(least: int, value: SupportsIndex, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from error
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number
