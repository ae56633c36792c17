"""When a plan still holds: leaves that move, come and go, and what ranks that share a leaf's copy may rely on."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from outlast.protect.capture import MOST_FAILED_PLANS, Capture, Moment, Seat
from outlast.protect.leaves import Collector
from outlast.protect.shards import LocalShard, Shards
from outlast.snapshot.identity import Generation

GENERATION = Generation(1, 5, "ab")


class Protected:
    """A model and an optimizer whose state a test changes by hand, on rank 0 of two."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.model = nn.Linear(30, 30)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.state = self.optimizer.state[self.model.weight]
        self.capture = Capture(Collector({"model": self.model, "optimizer": self.optimizer}), Seat(folder, 0, 2, 0, 0))

    def observe(self) -> Moment:
        return self.capture.observe({})

    def plan(self) -> frozenset[str]:
        """As if both ranks held alike what may be voted on; returns the names of that."""
        moment = self.observe()
        voted = self.capture.votable(moment)
        self.capture.make_plan(moment, dict.fromkeys(voted, (0, 1)), voted)
        return frozenset(key.split("@")[0].rpartition("/")[2] for key in voted)

    def is_good(self) -> bool:
        return not self.capture.needs_plan(self.observe())


@pytest.fixture
def protected(tmp_path: pathlib.Path) -> Iterator[Protected]:
    found = Protected(tmp_path)
    yield found
    found.capture.close()


def test_tensors_that_only_moved_are_read_where_they_are_now(protected: Protected, tmp_path: pathlib.Path) -> None:
    capture, state = protected.capture, protected.state
    state["mean"] = torch.randn(30, 30)
    capture.make_plan(protected.observe(), {})
    state["mean"] = wanted = torch.randn(30, 30)
    moment = protected.observe()
    assert not capture.needs_plan(moment)
    ticket = capture.start(moment, GENERATION, 0, fresh=False)
    state["mean"] = torch.zeros(30, 30)
    ticket.wait(30)
    image = LocalShard(tmp_path / "slot-0-0.img", GENERATION)
    assert torch.equal(Shards(image, {}.__getitem__, 0).tensor("optimizer/state/model/weight/mean"), wanted)
    image.close()


@pytest.mark.parametrize(
    "other", [torch.ones(30, 31), torch.ones(30, 30, dtype=torch.float64), torch.ones(30, 60)[:, ::2]]
)
def test_a_tensor_of_another_form_needs_a_plan(protected: Protected, other: torch.Tensor) -> None:
    protected.state["mean"] = torch.ones(30, 30)
    protected.plan()
    assert protected.is_good()
    protected.state["mean"] = other
    assert not protected.is_good()


def test_new_state_is_shared_by_the_next_plan(protected: Protected) -> None:
    protected.plan()
    protected.state["mean"] = torch.ones(30, 30)
    assert not protected.is_good()
    assert "mean" in protected.plan()
    assert protected.is_good()
    assert not protected.capture.unsteady


def test_growing_state_is_stored_whole_until_it_stays_the_same(protected: Protected) -> None:
    for index in range(2 * MOST_FAILED_PLANS + 4):
        protected.state[f"past-{index}"] = torch.ones(30, 30)
        if index < 2 * MOST_FAILED_PLANS and index % 2 == 0:
            protected.plan()
        elif index < 2 * MOST_FAILED_PLANS:
            assert not protected.is_good()
        elif index == 2 * MOST_FAILED_PLANS:
            voted = protected.plan()
            assert f"past-{index - 1}" in voted
            assert f"past-{index}" not in voted, "it was not there before: it may be gone at the next boundary"
        else:
            assert protected.is_good()
            assert protected.capture.unsteady
    assert not protected.is_good(), "the same as before: worth a plan"
    assert f"past-{index}" in protected.plan()
    assert protected.is_good()
    assert not protected.capture.unsteady


def test_no_copy_while_what_others_hold_a_part_of_is_gone(protected: Protected) -> None:
    """State under a new name at every step ends the loop too: such names are not voted on."""
    good = []
    for index in range(12):
        protected.state.clear()
        protected.state[f"at-{index}"] = torch.ones(30, 30)
        if index % 2 == 0:
            voted = protected.plan()
        else:
            gone = [key for key in protected.capture.plan.cut if "at-" in key] if protected.capture.plan else []
            good.append(protected.is_good())
            assert not (good[-1] and gone)
    assert good[0] is False
    assert good[-1] is True
    assert voted == {"weight", "bias"}
