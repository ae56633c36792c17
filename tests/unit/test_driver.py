"""The driver: events reach the machine in order, instructions reach agents in order, and nothing waits for anybody."""

from __future__ import annotations

import asyncio
import errno
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from outlast import messages as m
from outlast.checkpoint.line import Retention
from outlast.clock import SystemClock
from outlast.controller import link
from outlast.controller.archivist import Archivist, Charge
from outlast.controller.controller_actor import CRASH_STATUS
from outlast.controller.driver import Driver, Logs
from outlast.controller.keptfile import read_kept
from outlast.controller.link import AgentDied
from outlast.errors import RequestError
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import Inventory
from outlast.telemetry.metrics_log import read_metrics
from support.archives import MARK, folder, upload
from support.controller_world import (
    ATTEMPT,
    FakeAgent,
    FakeAgents,
    ScriptedMachine,
    controller_config,
    heartbeat,
    node_config,
    until,
    world,
)


def test_events_reach_the_machine_in_order_and_ticks_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            note = m.Note("node-0", 0, "note", "hello")
            assert w.send(heartbeat(), note) == {"controller": "c0ffee", "known": True}
            await until(lambda: len(w.machine.of(m.Tick)) >= 3)
            assert [event for event in w.machine.seen if not isinstance(event, m.Tick)] == [heartbeat(), note]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "events",
    [
        "no json",
        "{}",
        "[3]",
        '[{"type": "Bogus", "node": "node-0"}]',
        '[{"type": "Heartbeat", "node": "node-0"}]',
        '[{"type": "DumpStacks", "node": "node-0", "reason": "I am no event"}]',
        '[{"type": "Note", "node": "node-1", "rank": 0, "kind": "x", "text": "of another"}]',
        '[{"type": "Metrics", "node": "node-0", "attempt": "x", "rank": 0, "step": 1, "metrics": {}}]',
    ],
)
def test_nonsense_is_refused_with_a_reason(tmp_path: Path, events: str) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            if events != "{}":
                assert "refused" in w.driver.receive("node-0", events)
                assert "bad-message" in w.kinds()
            assert not w.driver.receive("node-9", events)["known"]
            await until(lambda: w.machine.of(m.Tick))
            assert {type(event) for event in w.machine.seen} == {m.Tick}

    asyncio.run(scenario())


def test_instructions_arrive_in_order_each_at_its_node(tmp_path: Path) -> None:
    generation = Generation.of(ATTEMPT, 5)
    permit = m.Permit(("node-0", "node-1"), generation, 1, False, {"node-1": (0,)})
    decided: list[m.Instruction] = [m.Stop("node-0", ATTEMPT), permit, m.Commit(("node-1",), generation)]

    async def scenario() -> None:
        async with world(tmp_path, nodes=2, answers={m.Note: decided}) as w:
            w.send(m.Note("node-0", None, "go", ""))
            made = w.agents.made
            await until(lambda: len(made) == 2 and all(len(agent.calls) >= 2 for agent in made.values()))
            assert made["node-0"].calls == ["join", ["Stop", "Permit"]]
            assert made["node-1"].calls == ["join", ["Permit", "Commit"]]

    asyncio.run(scenario())


@dataclass
class Listener(FakeAgent):
    """Keeps what it is told in full."""

    told: list[dict[str, Any]] = field(default_factory=list)

    async def perform(self, instructions: str) -> None:
        self.told += json.loads(instructions)


def test_what_is_for_several_nodes_names_each_its_own(tmp_path: Path) -> None:
    generation, both = Generation.of(ATTEMPT, 5), ("node-0", "node-1")
    decided: list[m.Instruction] = [
        m.Upload(both, generation, "file:///store/default/demo", 1000),
        m.Proceed(both, generation),
        m.Release("node-1"),
    ]

    async def scenario() -> None:
        async with world(tmp_path, nodes=0, answers={m.Note: decided}) as w:
            agents = {node: Listener() for node in both}
            w.agents.made.update(agents)
            for node in both:
                w.driver.add_node(node_config(tmp_path, node))
            await until(lambda: all(agent.calls for agent in agents.values()))
            w.send(m.Note("node-0", None, "go", ""))
            await until(lambda: len(agents["node-0"].told) == 2 and len(agents["node-1"].told) == 3)
            for node, agent in agents.items():
                upload = m.Upload((node,), generation, "file:///store/default/demo", 1000)
                wanted: list[m.Instruction] = [upload, m.Proceed((node,), generation)]
                assert [m.from_json(item) for item in agent.told[:2]] == wanted
            assert m.from_json(agents["node-1"].told[2]) == m.Release("node-1")

    asyncio.run(scenario())


def test_orders_to_the_store_are_answered_with_events(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    generation = Generation.of(ATTEMPT, 5)
    images = upload(folder(tmp_path / "store"), generation)
    answers: dict[type, list[m.Instruction]] = {
        m.Note: [m.Claim(ATTEMPT)],
        m.Claimed: [m.CommitCheckpoint(generation, 2, 1, images)],
        m.CheckpointCommitted: [m.Quarantine(generation, "flipped")],
    }
    archivist = Archivist(Charge(url, MARK, "c0ffee", Retention()), SystemClock())

    async def scenario() -> None:
        async with world(tmp_path, answers=answers, archivist=archivist) as w:
            assert w.driver.status()["store"] == {"url": url, "claimed": None, "last_error": None}
            w.send(m.Note("node-0", None, "go", ""))
            await until(lambda: "checkpoint-quarantined" in w.kinds())
            assert w.machine.of(m.Claimed) == [m.Claimed(ATTEMPT)]
            (event,) = w.machine.of(m.CheckpointCommitted)
            assert isinstance(event, m.CheckpointCommitted)
            assert event.checkpoint.generation == generation
            assert w.driver.status()["store"]["claimed"] == str(ATTEMPT)

    asyncio.run(scenario())


def test_a_bug_in_the_archivist_ends_the_run(tmp_path: Path) -> None:
    class Broken(Archivist):
        def submit(self, order: Any) -> None:
            super().submit("nonsense")  # type: ignore[arg-type]

        def _perform(self, order: Any) -> None:
            raise ZeroDivisionError

    archivist = Broken(Charge(f"file://{tmp_path}/store", MARK, "c0ffee", Retention()), SystemClock())

    async def scenario() -> None:
        config, clock = controller_config(tmp_path), SystemClock()
        machine = ScriptedMachine({m.Tick: [m.Claim(ATTEMPT)]})
        driver = Driver(config, "c0ffee", machine, FakeAgents(), Logs.open(config, clock), clock, archivist)
        async with asyncio.timeout(10):
            with pytest.raises(ExceptionGroup) as caught:
                await driver.run()
        assert caught.group_contains(ZeroDivisionError)

    asyncio.run(scenario())


def test_a_silent_agent_holds_up_nobody_and_is_not_called_gone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(link, "CALL_S", 0.05)
    decided: list[m.Instruction] = [m.Stop("node-0", ATTEMPT), m.Stop("node-1", ATTEMPT)]

    async def scenario() -> None:
        async with world(tmp_path, nodes=2, answers={m.Note: decided}) as w:
            await until(lambda: len(w.agents.made) == 2)
            w.agents.made["node-0"].trouble = lambda: asyncio.sleep(60)
            w.send(m.Note("node-1", None, "go", ""), node="node-1")
            await until(lambda: ["Stop"] in w.agents.made["node-1"].calls)
            await until(lambda: "agent-silent" in w.kinds())
            w.agents.made["node-0"].trouble = None
            w.send(m.Note("node-1", None, "go", ""), node="node-1")
            await until(lambda: "agent-answers" in w.kinds())
            assert not w.machine.of(m.NodeGone)

    asyncio.run(scenario())


def test_an_agent_that_ended_for_good_is_gone_and_can_be_made_again(tmp_path: Path) -> None:
    async def die() -> None:
        raise AgentDied("it left")

    async def scenario() -> None:
        async with world(tmp_path, answers={m.Note: [m.Register("node-0")]}) as w:
            await until(lambda: "node-0" in w.agents.made and w.agents.made["node-0"].calls)
            w.agents.made["node-0"].trouble = die
            w.send(m.Note("node-0", None, "go", ""))
            await until(lambda: w.machine.of(m.NodeGone))
            assert w.machine.of(m.NodeGone) == [m.NodeGone("node-0", "it left")]
            w.agents.made.clear()
            assert not w.driver.add_node(node_config(tmp_path, "node-0"))
            await until(lambda: "node-0" in w.agents.made and w.agents.made["node-0"].calls == ["join"])

    asyncio.run(scenario())


def test_making_an_agent_is_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(link, "RETRY_S", (0.01, 0.02))

    async def scenario() -> None:
        async with world(tmp_path, failures=3) as w:
            await until(lambda: "node-0" in w.agents.made and w.agents.made["node-0"].calls == ["join"])
            assert w.kinds().count("agent-silent") == 1

    asyncio.run(scenario())


def test_a_new_controller_finds_the_nodes_and_the_story_of_the_old(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, nodes=2) as w:
            seq = w.driver.log("something", "happened").seq
        async with world(tmp_path, nodes=0) as w:
            await until(lambda: len(w.agents.made) == 2)
            await until(lambda: all(agent.calls == ["join"] for agent in w.agents.made.values()))
            assert w.driver.status()["seq"] > seq
            with pytest.raises(RequestError, match="another configuration"):
                w.driver.add_node(node_config(tmp_path / "else", "node-1"))
            assert await w.driver.remove_node("node-1")
            assert not await w.driver.remove_node("node-1")
            assert w.agents.removed == ["node-1"]
        async with world(tmp_path, nodes=0) as w:
            await until(lambda: w.agents.made)
            assert list(w.agents.made) == ["node-0"]

    asyncio.run(scenario())
    assert (tmp_path / "control" / "nodes.json").stat().st_mode & 0o777 == 0o600


def test_a_node_that_is_gone_is_shown_until_it_is_removed_again(tmp_path: Path) -> None:
    """The operator removes it by each of its passes until it is not shown any more; a supervisor does so once."""

    async def scenario() -> None:
        async with world(tmp_path, nodes=2) as w:
            w.machine.nodes |= {"node-1": {"state": "lost"}}
            assert set(w.driver.status()["nodes"]) == {"node-0", "node-1"}
            assert await w.driver.remove_node("node-1")
            assert set(w.driver.status()["nodes"]) == {"node-0", "node-1"}
            assert not await w.driver.remove_node("node-1")
            assert set(w.driver.status()["nodes"]) == {"node-0"}
            w.driver.add_node(node_config(tmp_path, "node-1"))
            assert set(w.driver.status()["nodes"]) == {"node-0", "node-1"}

    asyncio.run(scenario())


def test_metrics_have_one_line_per_step_of_the_attempt_in_force(tmp_path: Path) -> None:
    def line(step: int, attempt: Attempt = ATTEMPT) -> dict[str, Any]:
        values = {"loss": 0.1 * step, "ratio": float("nan")}
        common = {"type": "Metrics", "node": "node-0", "rank": 0, "total": 20}
        return {**common, "attempt": str(attempt), "step": step, "metrics": values}

    async def scenario() -> None:
        async with world(tmp_path, answers={m.Note: [m.Stop("node-0", ATTEMPT)]}) as w:
            w.send(m.Note("node-0", None, "go", ""))
            await until(lambda: w.machine.of(m.Note))
            zombie = Attempt(1, "f" * 16)
            w.driver.receive("node-0", json.dumps([line(1), line(2), line(2), line(3, zombie)]))
            status = w.driver.status()
            assert status["metrics"] == {"step": 2, "attempt": 1, "rank": 0, "loss": 0.2, "ratio": "nan"}
            json.dumps(status, allow_nan=False)
            assert status["total"] == 20

    asyncio.run(scenario())
    assert [line.step for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_heartbeat_that_comes_with_metrics_counts_although_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    async def scenario() -> None:
        async with world(tmp_path) as w:
            monkeypatch.setattr(w.driver._logs.metrics, "append", full)
            fields = {"node": "node-0", "rank": 0, "attempt": str(ATTEMPT), "step": 1, "metrics": {"loss": 1.0}}
            metrics = {"type": "Metrics", **fields}
            answer = w.driver.receive("node-0", json.dumps([metrics, m.to_json(heartbeat())]))
            assert "refused" not in answer
            await until(lambda: w.machine.of(m.Heartbeat))

    asyncio.run(scenario())


def test_info_of_agents_is_in_the_status(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            info = {"type": "Info", "node": "node-0", "fields": {"agent_pid": 7}}
            w.driver.receive("node-0", json.dumps([info]))
            assert w.driver.status()["nodes"] == {"node-0": {"state": "working", "agent_pid": 7}}

    asyncio.run(scenario())


def test_the_end_is_final_also_for_the_next_controller(tmp_path: Path) -> None:
    ending: list[m.Instruction] = [m.Emit("done", "all done", {"n": 1}), m.Finish("succeeded", "all steps done")]

    async def scenario() -> None:
        async with world(tmp_path, answers={m.StopRequested: ending}) as w:
            assert w.driver.request_stop("enough")
            await until(lambda: w.driver.finished)
            assert w.machine.of(m.Finalized)
            assert w.kinds()[-2:] == ["done", "finished"]
            assert not w.driver.request_stop("again")
        async with world(tmp_path, nodes=0) as w:
            assert w.driver.finished
            assert (w.driver.status()["outcome"], w.driver.status()["reason"]) == ("succeeded", "all steps done")
            await asyncio.sleep(0.05)
            assert w.machine.seen == []
            assert w.agents.made == {}

    asyncio.run(scenario())


def test_what_is_to_be_remembered_is_there_for_the_next_controller(tmp_path: Path) -> None:
    kept = m.Kept(1.0, 2.0, (3.0,), ((5, "ValueError: x", 2),), m.Size(3, 2, 1), True)

    async def scenario() -> None:
        async with world(tmp_path, answers={m.Note: [m.Remember(kept)]}) as w:
            assert read_kept(w.config.kept_file) == m.Kept()
            w.send(m.Note("node-0", None, "go", ""))
            await until(lambda: w.config.kept_file.exists())
            assert read_kept(w.config.kept_file) == kept
            assert w.config.kept_file.stat().st_mode & 0o777 == 0o600
            w.config.kept_file.write_text("[")
            with pytest.raises(RequestError, match=r"kept\.json"):
                read_kept(w.config.kept_file)

    asyncio.run(scenario())


def test_waiting_for_events(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path, nodes=0) as w:
            seq = w.driver.status()["seq"]
            assert await w.driver.events_after(seq, 0.0, 10) == []
            assert await w.driver.events_after(seq, 0.02, 10) == []
            waiting = asyncio.create_task(w.driver.events_after(seq, 5.0, 10))
            await asyncio.sleep(0.01)
            w.driver.log("news", "here")
            assert [event.kind for event in await waiting] == ["news"]

    asyncio.run(scenario())


def test_a_driver_that_was_held_up_hears_its_nodes_before_it_ticks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as w:
            await until(lambda: w.machine.of(m.Tick))
            w.machine.seen.clear()
            w.send(heartbeat())
            time.sleep(0.6)
            await until(lambda: w.machine.of(m.Tick))
            assert w.machine.seen[0] == heartbeat()
            assert w.driver.status()["lag_s"]["worst"] >= 0.5
            assert "controller-late" in w.kinds()

    asyncio.run(scenario())


def test_at_the_end_nodes_confirm_that_no_rank_is_left(tmp_path: Path) -> None:
    ending: list[m.Instruction] = [m.Stop("node-0", ATTEMPT), m.Finish("failed", "no nodes")]

    async def scenario() -> None:
        async with world(tmp_path, nodes=2, answers={m.StopRequested: ending}) as w:
            w.send(heartbeat())
            w.send(heartbeat("node-1"), node="node-1")
            await until(lambda: len(w.agents.made) == 2)
            w.driver.request_stop("enough")
            await until(lambda: ["Stop"] in w.agents.made["node-1"].calls)
            never = Attempt(ATTEMPT.number + 1, "c0ffee")
            inventory = Inventory("node-0", ())
            w.send(m.Stopped("node-0", ATTEMPT, inventory), m.Stopped("node-0", never, inventory))
            await asyncio.sleep(0.05)
            assert not w.driver.finished
            w.send(m.Stopped("node-1", never, inventory), node="node-1")
            await until(lambda: w.driver.finished)
            assert w.machine.of(m.Stopped) == [m.Stopped("node-0", ATTEMPT, inventory)]
            assert w.driver.status()["outcome"] == "failed"

    asyncio.run(scenario())


def test_a_bug_in_the_machine_ends_the_run(tmp_path: Path) -> None:
    async def scenario() -> None:
        config, clock = controller_config(tmp_path), SystemClock()
        machine = ScriptedMachine()
        machine.handle = lambda event, now: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        driver = Driver(config, "c0ffee", machine, FakeAgents(), Logs.open(config, clock), clock)
        with pytest.raises(ExceptionGroup):
            await driver.run()

    asyncio.run(scenario())


ENDED = """
import asyncio, errno
from types import SimpleNamespace
from outlast.controller import controller_actor

def full(*_):
    raise OSError(errno.ENOSPC, "no space left")

async def crash():
    full()

async def main():
    actor = SimpleNamespace(_logs=SimpleNamespace(events=SimpleNamespace(append=full)))
    task = asyncio.get_running_loop().create_task(crash())
    task.add_done_callback(lambda it: controller_actor.ControllerActor._ended(actor, it))
    await asyncio.sleep(30)

asyncio.run(main())
"""


def test_a_controller_that_cannot_write_why_it_ends_ends_all_the_same() -> None:
    """Ray starts another one: a disk that was full for a moment is no reason to have none."""
    done = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == CRASH_STATUS, done
    assert "no space left" in done.stderr
