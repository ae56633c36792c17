"""What a run leaves, and what of a status the supervisor acts on."""

from __future__ import annotations

import asyncio
import itertools
import json
import pathlib
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.config import NodeConfig
from outlast.errors import TransferError
from outlast.local.board import Board, Replacements
from outlast.local.care import NodeCare
from outlast.local.folders import RunFolders
from outlast.local.history import History
from outlast.local.report import CAUSES, SOURCES, build_report


def test_a_long_temporary_folder_is_not_used_for_sockets(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folders = RunFolders.create(tmp_path / "run")
    try:
        assert len(str(folders.short)) <= 40
    finally:
        folders.remove()


def test_an_empty_status_still_makes_a_whole_report() -> None:
    report = build_report({}, [], {"python": "3.11"}, 1.5, "Ray did not start")
    assert report["phase"] == "Failed"
    assert report["reason"] == "Ray did not start"
    assert report["goodput"]["lost_s"] == dict.fromkeys(CAUSES, 0.0)
    assert report["snapshots"] == {"count": 0, "bytes": 0, "stall_s": 0.0}
    assert report["checkpoints"] == {
        **dict.fromkeys(("count", "bytes", "skipped", "failed"), 0),
        **dict.fromkeys(("last_step", "url")),
    }
    assert report["resizes"] == []
    assert report["weights_digest"] is None
    json.dumps(report)


def test_what_the_status_says_is_reported() -> None:
    status = {
        "outcome": "succeeded",
        "step": 60,
        "total": 60,
        "attempt": 3,
        "goodput": {"ratio": 0.8, "lost_s": {"detect": 1.0}},
        "recoveries": [
            {"cause": "node-loss", "detect_s": 1.4, "restore_sources": {"memory-local": 3, "memory-decode": 1}}
        ],
        "snapshots": {"count": 5, "bytes": 1000, "stall_s": 0.01},
        "checkpoints": {"count": 2, "bytes": 800, "skipped": 1, "last_step": 40, "url": "file:///s/default/j"},
        "resizes": [{"step": 20, "from": 4, "to": 3}],
        "weights_digest": "ab" * 32,
        "nodes": {"node-0": {"keeper_pid": 7}, "node-1": {"environment": {"torch": "2.13.0", "threads": 1}}},
    }
    report = build_report(status, [{"fault": "node-loss@40:2"}], {"torch": None, "cores": 2}, 12.34567, "")
    assert report["phase"] == "Succeeded"
    assert (report["steps"], report["attempts"], report["wall_s"]) == (60, 3, 12.346)
    (recovery,) = report["recoveries"]
    assert recovery["restore_sources"] == {**dict.fromkeys(SOURCES, 0), "memory-local": 3, "memory-decode": 1}
    assert recovery["lost_steps"] is None
    assert report["checkpoints"] == {**status["checkpoints"], "failed": 0}
    assert report["resizes"] == status["resizes"]
    assert report["goodput"]["lost_s"]["detect"] == 1.0
    assert report["environment"] == {"torch": "2.13.0", "threads": 1, "cores": 2}
    assert report["faults"] == [{"fault": "node-loss@40:2"}]


def test_board_knows_seats_and_the_lost() -> None:
    nodes = {
        "node-0": {"state": "active", "seat": 0},
        "node-1": {"state": "lost", "seat": 1},
        "node-2": {"state": "active", "seat": 1},
        "node-3": {"state": "spare", "seat": None},
    }
    board = Board({"nodes": nodes, "phase": "Running", "step": 7, "attempt": 2})
    assert board.seats() == {0: "node-0", 1: "node-2"}
    assert board.lost() == {"node-1"}
    assert board.running
    assert Board().seats() == {}
    assert Board().outcome is None


def test_a_node_is_replaced_once_after_the_delay() -> None:
    replacements = Replacements(5.0)
    assert replacements.due({"node-1"}, 100.0) == []
    assert replacements.due({"node-1"}, 104.9) == []
    assert replacements.due({"node-1", "node-2"}, 105.0) == ["node-1"]
    assert replacements.due({"node-1", "node-2"}, 105.1) == ["node-1"], "until it is done"
    replacements.done("node-1")
    assert replacements.due({"node-1", "node-2"}, 110.0) == ["node-2"]
    assert replacements.due(set(), 111.0) == []
    assert replacements.due({"node-1"}, 200.0) == []


def test_a_node_that_comes_back_is_not_replaced() -> None:
    replacements = Replacements(5.0)
    assert replacements.due({"node-1"}, 100.0) == []
    assert replacements.due(set(), 104.0) == []
    assert replacements.due({"node-1"}, 106.0) == []


class _Cloud:
    """Nodes, controller and output of ``NodeCare``, as a list of what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.going: set[str] = set()
        self.gone: set[str] = set()
        self.answers = True

    def lost(self) -> set[str]:
        return self.gone

    def leaving(self) -> set[str]:
        return self.going

    def paused(self) -> dict[str, int]:
        return {}

    async def lose(self, node: str) -> None:
        self.asked.append(f"lose {node}")

    async def create(self) -> NodeConfig:
        return NodeConfig.model_construct(node="new")

    async def remove_node(self, node: str) -> None:
        self.asked.append(f"remove {node}")

    async def add_node(self, config: NodeConfig) -> None:
        if not self.answers:
            raise TransferError("no controller")
        self.asked.append(f"add {config.node}")

    def progress(self, text: str) -> None:
        del text


def _care(cloud: _Cloud) -> NodeCare:
    return NodeCare(cloud, cloud, cloud, Replacements(0.0))  # type: ignore[arg-type]


def test_a_node_that_leaves_is_replaced_when_it_has_left() -> None:
    async def main() -> list[str]:
        cloud = _Cloud()
        care, board = _care(cloud), Board({"nodes": {"node-1": {"state": "gone", "seat": None}}})
        cloud.going = {"node-1"}
        await care.tend(board)
        assert cloud.asked == [], "it has time left"
        cloud.going, cloud.gone = set(), {"node-1"}
        await care.tend(board)
        await care.tend(board)
        return cloud.asked

    assert asyncio.run(main()) == ["lose node-1", "remove node-1", "add new"]


def _asked(wanted: int, **states: str) -> Board:
    workers = {"wanted": wanted, "wanted_spares": 1, "asked": True}
    return Board({"workers": workers, "nodes": {name: {"state": state} for name, state in states.items()}})


@pytest.mark.parametrize(
    ("board", "asked"),
    [
        (_asked(1, a="active", b="spare"), []),
        (_asked(1, a="active", b="spare", c="left"), ["lose c", "remove c"]),
        (_asked(1, a="active", b="lost", c="left"), ["lose c", "remove c", "lose b", "remove b", "add new-0"]),
        (_asked(3, a="active", b="spare", c="left"), ["lose c", "remove c", "add new-0", "add new-1"]),
        (_asked(2, a="active", b="leaving"), ["add new-0", "add new-1"]),
        (Board({"nodes": {"a": {"state": "active"}, "b": {"state": "left"}}}), ["lose b", "remove b", "add new-0"]),
    ],
)
def test_as_many_nodes_as_were_asked_for(board: Board, asked: list[str]) -> None:
    async def main() -> list[str]:
        cloud = _Cloud()
        names = (f"new-{number}" for number in itertools.count())

        async def create() -> NodeConfig:
            return NodeConfig.model_construct(node=next(names))

        cloud.create = create  # type: ignore[method-assign]
        care = _care(cloud)
        for _ in range(3):
            await care.tend(board)
        return cloud.asked

    assert asyncio.run(main()) == asked


def test_a_node_that_joins_is_registered_as_soon_as_there_is_a_controller() -> None:
    async def main() -> list[str]:
        cloud = _Cloud()
        care = _care(cloud)
        cloud.answers = False
        await care.introduce(NodeConfig.model_construct(node="node-7"))
        await care.introduce(NodeConfig.model_construct(node="node-8"))
        with pytest.raises(TransferError):
            await care.tend(Board())
        cloud.answers = True
        await care.tend(Board())
        await care.tend(Board())
        return cloud.asked

    assert asyncio.run(main()) == ["add node-7", "add node-8"]


@given(st.lists(st.tuples(st.sets(st.sampled_from("abc")), st.floats(0, 10)), max_size=20))
def test_never_means_never(moments: list[tuple[set[str], float]]) -> None:
    replacements, now = Replacements(None), 0.0
    for lost, passed in moments:
        now += passed
        assert replacements.due(lost, now) == []


def _status(controller: str, train: float, idle: float, recoveries: list[dict[str, object]]) -> dict[str, object]:
    return {
        "controller": controller,
        "step": 10,
        "goodput": {"train_s": train, "lost_s": {"idle": idle}},
        "recoveries": recoveries,
        "snapshots": {"count": 2, "bytes": 100, "stall_s": 0.5},
        "checkpoints": {"count": 1, "bytes": 50, "skipped": 1, "failed": 0, "last_step": None, "url": "file:///s"},
        "resizes": [{"step": 5, "from": 4, "to": 3}],
    }


def test_history_adds_up_over_controllers() -> None:
    history = History()
    assert history.merged() == {}
    open_ended = {"attempt": 1, "cause": "rank 0 died", "total_s": None}
    history.feed(_status("a", 5.0, 1.0, []), 100.0)
    history.feed(_status("a", 6.0, 1.0, [open_ended]), 101.0)
    history.feed(_status("a", 6.0, 1.0, [{**open_ended, "total_s": 1.5}]), 102.0)
    later = _status("b", 1.0, 0.0, [{"attempt": 2, "cause": "controller"}])
    history.feed({**later, "checkpoints": {"count": 2, "bytes": 70, "last_step": 8}, "resizes": []}, 112.0)
    merged = history.merged()
    assert merged["controller"] == "b"
    assert [entry["cause"] for entry in merged["recoveries"]] == ["rank 0 died", "controller"]
    assert merged["recoveries"][0]["total_s"] == 1.5
    assert merged["goodput"]["train_s"] == 7.0
    assert merged["goodput"]["lost_s"]["start"] == 10.0
    assert merged["goodput"]["wall_s"] == 18.0
    assert merged["goodput"]["ratio"] == round(7 / 18, 4)
    assert merged["snapshots"] == {"count": 4, "bytes": 200, "stall_s": 1.0}
    assert merged["checkpoints"] == {
        **{"count": 3, "bytes": 120, "skipped": 1, "failed": 0},
        **{"last_step": 8, "url": "file:///s"},
    }
    assert merged["resizes"] == [{"step": 5, "from": 4, "to": 3}]


def test_history_tells_of_the_loss_of_the_head() -> None:
    history = History()
    history.feed({"controller": "a", "step": 14, "attempt": 1}, 100.0)
    history.reached(15)
    history.head_lost(100.5, 100.6)
    history.head_lost(104.0, 104.1)
    sources = {"memory-local": 2}
    history.feed({"controller": "b", "step": 0, "attempt": 0}, 108.0)
    (recovery,) = history.merged()["recoveries"]
    assert recovery["total_s"] is None
    fields = {"attempt": 2, "step": 10, "restore_sources": sources}
    history.feed_event({"kind": "controller-started", "time": 107.0})
    history.feed_event({"kind": "restored", "fields": fields})
    history.feed({"controller": "b", "step": 10, "attempt": 2}, 109.0)
    history.feed({"controller": "b", "step": 11, "attempt": 2}, 109.5)
    history.feed({"controller": "b", "step": 30, "attempt": 2}, 115.0)
    (recovery,) = history.merged()["recoveries"]
    assert recovery == {
        "kind": "head-lost",
        "cause": "Ray's head and the controller were lost",
        "attempt": 2,
        "detect_s": 0.1,
        "restore_sources": sources,
        "restored_step": 10,
        "lost_steps": 5,
        "total_s": 9.0,
    }


def test_history_tells_of_a_lost_controller_only_when_ranks_were_started_again() -> None:
    history = History()
    started = [{"kind": "controller-started", "time": at} for at in (99.0, 103.0, 110.0)]
    history.feed_event(started[0])
    history.feed({"controller": "a", "step": 14, "attempt": 1}, 102.0)
    history.feed_event(started[1])
    history.feed_event({"kind": "adopted", "time": 104.0})
    history.feed({"controller": "b", "step": 20, "attempt": 1}, 105.0)
    assert history.merged()["recoveries"] == []
    history.feed_event(started[2])
    history.feed_event({"kind": "restored", "fields": {"attempt": 2, "step": 15, "restore_sources": {}}})
    history.feed({"controller": "c", "step": 16, "attempt": 2}, 112.0)
    (recovery,) = history.merged()["recoveries"]
    assert (recovery["kind"], recovery["detect_s"], recovery["total_s"]) == ("controller-lost", 5.0, 7.0)
    assert recovery["lost_steps"] == 5
