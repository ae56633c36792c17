"""Ranks that stay at a boundary: held by a permit, and after the last step until it is durable."""

from __future__ import annotations

import json
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.utils.data import DataLoader, TensorDataset

from outlast.agent.keeper_calls import FETCH_S, UPLOAD_S
from outlast.controller.settings import Patience
from outlast.data import ElasticSampler
from outlast.errors import CapacityError
from outlast.protect.capture import Capture, Seat
from outlast.protect.leaves import Collector
from outlast.protect.shards import LocalShard, Shards
from outlast.rank import snapshots
from outlast.rank.link import AgentLink
from outlast.rank.pace import Pace
from outlast.rank.snapshots import RankSnapshots
from outlast.session import RESTORE_DEADLINE_S, Run
from outlast.snapshot.identity import Generation


class Agent:
    """The other end of a rank's link: sends, and waits for what the rank says."""

    def __init__(self, path: pathlib.Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self.link = AgentLink(str(path))
        self._sock, _ = self._listener.accept()
        self._sock.settimeout(30)
        self._lines = self._sock.makefile("rb")

    def send(self, op: str, **fields: Any) -> None:
        self._sock.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")

    def permit(self, step: int, attempt: int = 1, **fields: Any) -> str:
        generation = str(Generation(attempt, step, "ab"))
        self.send("permit", generation=generation, slot=attempt % 2, step=step, **{"replan": False, **fields})
        return generation

    def hear(self, *ops: str) -> dict[str, Any]:
        """The rank's next message, which must be one of these."""
        said: dict[str, Any] = json.loads(self._lines.readline())
        assert said["op"] in ops, said
        return said

    def close(self) -> None:
        self._sock.close()
        self._listener.close()


@pytest.fixture
def agent(tmp_path: pathlib.Path) -> Iterator[Agent]:
    agent = Agent(tmp_path / "agent.sock")
    yield agent
    agent.close()


@pytest.fixture
def ranks(tmp_path: pathlib.Path, agent: Agent) -> Iterator[RankSnapshots]:
    model = nn.Linear(4, 4)
    objects = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    capture = Capture(Collector(objects), Seat(tmp_path, 0, 1, 0, 0))
    found = RankSnapshots(agent.link, capture, lambda: {"step": 5}, lambda size: None, check=False)
    yield found
    found.close()


def at(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def planned(agent: Agent, ranks: RankSnapshots, step: int) -> None:
    agent.permit(step, replan=True)
    wait_for(ranks, lambda: bool(agent.link.permits))
    ranks.boundary(step)
    agent.hear("planned")
    train_step(ranks)


def train_step(ranks: RankSnapshots) -> None:
    for optimizer in ranks.capture.collector.optimizers.values():
        optimizer.step()


def answer(agent: Agent, ranks: RankSnapshots, step: int, **fields: Any) -> dict[str, Any]:
    """What the rank says to a permit, sent and obeyed at the boundary before ``step``."""
    agent.permit(step, **fields)
    wait_for(ranks, lambda: bool(agent.link.permits))
    ranks.boundary(step)
    return agent.hear("planned", "copied", "missed")


def wait_for(ranks: RankSnapshots, condition: Callable[[], bool]) -> None:
    with ranks.link.news:
        assert ranks.link.news.wait_for(condition, 30)


@pytest.mark.parametrize("word", ["proceed", "abort"])
def test_a_held_rank_stays_until_it_is_told(agent: Agent, ranks: RankSnapshots, word: str) -> None:
    planned(agent, ranks, 3)
    generation = agent.permit(5, hold=True)
    wait_for(ranks, lambda: bool(agent.link.permits))
    held = at(lambda: ranks.boundary(5))
    assert {agent.hear("busy", "copied")["op"] for _ in range(2)} == {"busy", "copied"}
    agent.send("proceed", generation=str(Generation(1, 4, "ab")))
    agent.send("abort", generation=str(Generation(1, 4, "ab")))
    held.join(0.2)
    assert held.is_alive(), "another generation's word is not for it"
    agent.send(word, generation=generation)
    agent.hear("idle")
    held.join(30)
    assert not held.is_alive()


def test_a_rank_that_is_not_held_goes_on(agent: Agent, ranks: RankSnapshots) -> None:
    planned(agent, ranks, 3)
    agent.permit(5)
    wait_for(ranks, lambda: bool(agent.link.permits))
    ranks.boundary(5)
    agent.hear("copied")


def test_ranks_wait_for_as_long_as_nodes_may_fetch_and_upload() -> None:
    assert RESTORE_DEADLINE_S > FETCH_S
    assert snapshots.HOLD_DEADLINE_S > UPLOAD_S == Patience().upload_s


def test_how_long_a_rank_was_held_is_no_part_of_its_step(agent: Agent, ranks: RankSnapshots) -> None:
    planned(agent, ranks, 3)
    pace, took = Pace(), []
    generation = agent.permit(5, hold=True)
    wait_for(ranks, lambda: bool(agent.link.permits))

    def step() -> None:
        pace.begin()
        pace.held(ranks.boundary(5))
        took.append(pace.end()[0])

    held = at(step)
    agent.hear("busy", "copied")
    time.sleep(0.5)
    agent.send("proceed", generation=generation)
    held.join(30)
    assert took
    assert took[0] < 0.4


def test_nobody_is_held_for_ever(agent: Agent, ranks: RankSnapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "HOLD_DEADLINE_S", 0.05)
    monkeypatch.setattr(snapshots, "FINAL_DEADLINE_S", 0.05)
    planned(agent, ranks, 3)
    agent.permit(5, hold=True)
    wait_for(ranks, lambda: bool(agent.link.permits))
    ranks.boundary(5)
    said = [agent.hear("busy", "copied", "note", "idle") for _ in range(4)]
    assert [message["kind"] for message in said if message["op"] == "note"] == ["hold-ended"]
    ranks.final(6)
    assert agent.hear("note")["kind"] == "final-snapshot-late"


def test_the_last_step_waits_for_its_snapshot(agent: Agent, ranks: RankSnapshots) -> None:
    """Through a permit of an earlier step, a plan that does not hold, a vote, and a snapshot that is given up."""
    ending = at(lambda: ranks.final(9))
    agent.permit(7)
    assert agent.hear("missed")["reason"] == "late"
    agent.permit(9, 2, hold=True)
    assert agent.hear("missed")["reason"] == "replan"
    agent.permit(9, 3, hold=True, replan=True)
    agent.hear("planned")
    first = agent.permit(9, 4, hold=True)
    agent.hear("copied")
    agent.send("abort", generation=first)
    second = agent.permit(9, 5, hold=True)
    assert agent.hear("copied")["generation"] == second
    ending.join(0.1)
    assert ending.is_alive()
    agent.send("proceed", generation=second)
    ending.join(30)
    assert not ending.is_alive()


@pytest.mark.parametrize("aborted", [True, False], ids=["aborted", "forgotten"])
def test_the_last_step_is_permitted_again_under_the_same_name(
    agent: Agent, ranks: RankSnapshots, aborted: bool
) -> None:
    """There is no later step, and a new controller may not know of the first permit."""
    ending = at(lambda: ranks.final(9))
    agent.permit(9, hold=True, replan=True)
    agent.hear("planned")
    for _ in range(2):
        generation = agent.permit(9, hold=True)
        assert agent.hear("copied")["generation"] == generation
        if aborted:
            agent.send("abort", generation=generation)
    agent.send("proceed", generation=generation)
    ending.join(30)
    assert not ending.is_alive()


def test_the_last_step_need_not_be_taken_again(agent: Agent, ranks: RankSnapshots) -> None:
    agent.send("proceed", generation=str(Generation(1, 9, "cd")))
    ending = at(lambda: ranks.final(9))
    ending.join(30)
    assert not ending.is_alive()


def test_trouble_reaches_a_rank_that_waits(agent: Agent, ranks: RankSnapshots) -> None:
    def full(size: int) -> None:
        raise CapacityError("too little memory")

    ranks.fits = full
    caught: list[BaseException] = []

    def end() -> None:
        try:
            ranks.final(9)
        except CapacityError as error:
            caught.append(error)

    ending = at(end)
    agent.permit(9, hold=True, replan=True)
    ending.join(30)
    assert [str(error) for error in caught] == ["too little memory"]


# --- gradients that are no part of a snapshot ----------------------------------------------------------------------------


def test_no_snapshot_where_gradients_may_be_summed_over_steps(
    agent: Agent, ranks: RankSnapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of run.steps make one of the optimizer's; the boundary between them is only good for a plan."""
    monkeypatch.setattr(snapshots, "HOLD_DEADLINE_S", 1.0)
    planned(agent, ranks, 3)
    ranks.boundary(4)
    missed = answer(agent, ranks, 5, hold=True)
    assert (missed["op"], missed["reason"], missed["sound"]) == ("missed", snapshots.ACCUMULATING, [4, 1])
    assert answer(agent, ranks, 6, replan=True)["op"] == "planned"
    train_step(ranks)
    assert answer(agent, ranks, 7)["op"] == "copied"
    missed = answer(agent, ranks, 8)
    assert (missed["op"], missed["sound"]) == ("missed", [7, 3])


def test_the_first_boundary_is_good_for_a_snapshot(agent: Agent, ranks: RankSnapshots) -> None:
    ranks.capture.make_plan(ranks.capture.observe({}), {})
    assert answer(agent, ranks, 5)["op"] == "copied"


def test_the_last_step_is_snapshot_whatever_was_summed_before_it(agent: Agent, ranks: RankSnapshots) -> None:
    planned(agent, ranks, 7)
    ranks.boundary(8)
    ranks.boundary(9)
    ending = at(lambda: ranks.final(10))
    generation = agent.permit(10, hold=True)
    agent.hear("copied")
    agent.send("proceed", generation=generation)
    ending.join(30)
    assert not ending.is_alive()


def test_without_an_optimizer_nothing_is_summed(agent: Agent, tmp_path: pathlib.Path) -> None:
    capture = Capture(Collector({"model": nn.Linear(4, 4)}), Seat(tmp_path, 0, 1, 0, 0))
    ranks = RankSnapshots(agent.link, capture, lambda: {"step": 5}, lambda size: None, check=False)
    assert answer(agent, ranks, 5, replan=True)["op"] == "planned"
    assert answer(agent, ranks, 6)["op"] == "copied"
    ranks.close()


# --- optimizers that make their state anew ------------------------------------------------------------------------------


class Anew(torch.optim.Optimizer):
    """Makes a new tensor of each state at every step; ``grow``: and one more, under a name of its own."""

    def __init__(self, parameters: Any, *, grow: bool) -> None:
        super().__init__(parameters, {})
        self.grow = grow

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["mean"] = 0.9 * state.get("mean", torch.ones_like(parameter)) + parameter
            if self.grow:
                state[f"past-{len(state)}"] = parameter.clone()
            parameter.mul_(0.99)


@pytest.fixture
def anew(agent: Agent, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> Iterator[RankSnapshots]:
    model = nn.Linear(40, 40)
    objects = {"model": model, "optimizer": Anew(model.parameters(), grow=request.param)}
    capture = Capture(Collector(objects), Seat(tmp_path, 0, 1, 0, 0))
    ranks = RankSnapshots(agent.link, capture, lambda: {}, lambda size: None, check=False)
    train_step(ranks)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("anew", [False], indirect=True)
def test_a_plan_holds_where_the_optimizer_only_makes_new_tensors(
    agent: Agent, anew: RankSnapshots, tmp_path: pathlib.Path
) -> None:
    assert answer(agent, anew, 1, replan=True)["op"] == "planned"
    layout = anew.capture.plan.layout if anew.capture.plan else None
    for step in range(2, 6):
        train_step(anew)
        live = anew.capture.collector.collect().leaves
        copied = answer(agent, anew, step)
        assert copied["op"] == "copied"
        assert anew.capture.plan is not None
        assert anew.capture.plan.layout is layout
        image = LocalShard(tmp_path / f"slot-0-{copied['slot']}.img", Generation.parse(copied["generation"]))
        shards = Shards(image, {}.__getitem__, 0)
        for name, leaf in live.items():
            assert torch.equal(shards.tensor(name), leaf.tensor)
        image.close()


@pytest.mark.parametrize("anew", [True], indirect=True)
def test_state_that_grows_at_every_step_is_held_and_told_once(agent: Agent, anew: RankSnapshots) -> None:
    said, replan = [], True
    for step in range(1, 12):
        agent.permit(step, replan=replan)
        wait_for(anew, lambda: bool(agent.link.permits))
        anew.boundary(step)
        message = agent.hear("planned", "copied", "missed", "note")
        if message["op"] == "note":
            assert message["kind"] == "state-unsteady"
            assert "optimizer/state/model/weight/past-" in message["text"]
            said.append("note")
            message = agent.hear("planned", "copied", "missed")
        replan = message["op"] == "missed"
        said.append(message["op"])
        train_step(anew)
    assert said == ["planned", "missed", "planned", "missed", "planned", "note", *["copied"] * 6]


# --- a whole run of one rank --------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A world of one, on a node of its own."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "token").write_text("secret")
    places = {"OUTLAST_MEMORY_DIR": "memory", "OUTLAST_TOKEN_FILE": "token", "OUTLAST_RUN_DIR": "run"}
    for name, place in places.items():
        monkeypatch.setenv(name, str(tmp_path / place))
    monkeypatch.setenv("GROUP_RANK", "0")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(agent: Agent, message: dict[str, Any], total: int) -> threading.Thread:
    """What a script does; the thread ends when it has written the weights."""

    def script() -> None:
        run = Run(agent.link, "gloo")
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sampler = ElasticSampler(8, 4, seed=1)
        loader = DataLoader(TensorDataset(torch.ones(8, 3)), batch_sampler=sampler)
        run.protect(model=model, optimizer=optimizer, sampler=sampler)
        for (x,) in run.steps(loader, total=total):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    agent.send("restore", protection={"slots": 2, "final": True}, **message)
    return at(script)


def test_a_job_ends_when_its_last_step_is_durable_and_so_it_does_when_it_is_restored_there(
    agent: Agent, alone: None, tmp_path: pathlib.Path
) -> None:
    weights = tmp_path / "run" / "final" / "model.safetensors"
    script = train(agent, {"plan": None}, total=2)
    ready = agent.hear("ready")
    assert ready["source"] == "none"
    assert ready["about"]["mesh"] is None
    assert [agent.hear("step")["step"] for _ in range(2)] == [1, 2]
    assert agent.hear("busy")["label"] == "final snapshot"
    agent.permit(2, 1, hold=True, replan=True)
    agent.hear("planned")
    generation = agent.permit(2, 2, hold=True)
    copied = agent.hear("copied")
    script.join(0.1)
    assert script.is_alive()
    assert not weights.exists()
    agent.send("proceed", generation=generation)
    assert [agent.hear("idle", "busy")["op"] for _ in range(3)] == ["idle", "busy", "idle"]
    digest = agent.hear("done")["digest"]
    script.join(30)
    weights.unlink()

    image = {"path": str(tmp_path / "memory" / f"slot-0-{copied['slot']}.img")}
    other = Agent(tmp_path / "other.sock")
    plan = {"generation": generation, "sources": {"0": "memory-local"}, "direct": False, "world": 1}
    script = train(other, {"plan": plan, "images": {"0": image}}, total=2)
    assert other.hear("ready")["restored_step"] == 2
    told = other.hear("step")
    assert (told["step"], told["total"]) == (2, 2)
    other.hear("busy")
    script.join(0.1)
    assert script.is_alive()
    other.send("proceed", generation=generation)
    assert [other.hear("idle", "busy")["op"] for _ in range(3)] == ["idle", "busy", "idle"]
    done = other.hear("done")
    assert (done["digest"], done["steps"]) == (digest, 2)
    script.join(30)
    assert weights.exists()
    other.close()
