"""The controller's HTTP: who may ask, what is answered, and that what is wrong is said."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from outlast import __version__
from outlast import messages as m
from outlast.controller.http import Api, make_app, serving
from support.controller_world import World, node_config, until, world

TOKEN = "a" * 64


@asynccontextmanager
async def served(tmp_path: Path, answers: Any = None) -> AsyncIterator[tuple[World, aiohttp.ClientSession, list[str]]]:
    """A driver that is served, a client with the token, and what was done when it was to leave."""
    left: list[str] = []
    async with world(tmp_path, nodes=1, answers=answers) as w:
        app = make_app(Api(w.driver, lambda: left.append("left")), TOKEN)
        http_file = tmp_path / "control" / "http.json"
        async with serving(app, "127.0.0.1", 0, http_file, "c0ffee") as port:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers) as client:
                yield w, client, left


def run(tmp_path: Path, scenario: Callable[..., Awaitable[None]], answers: Any = None) -> None:
    async def whole() -> None:
        async with asyncio.timeout(20), served(tmp_path, answers) as (w, client, left):
            await scenario(w, client, left)

    asyncio.run(whole())


def test_status_and_where_it_is(tmp_path: Path) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        async with client.get("/status") as answer:
            status = await answer.json()
        assert (answer.status, status["phase"], status["pid"]) == (200, "Running", os.getpid())
        where = json.loads((tmp_path / "control" / "http.json").read_text())
        assert where == {"host": "127.0.0.1", "port": client._base_url.port, "pid": os.getpid(), "controller": "c0ffee"}

    run(tmp_path, scenario)


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer " + "b" * 64, TOKEN])
def test_no_answer_without_the_token(tmp_path: Path, header: str) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        for method, path in [("GET", "/status"), ("GET", "/events"), ("POST", "/stop"), ("POST", "/nodes")]:
            async with client.request(method, path, headers={"Authorization": header}) as answer:
                assert answer.status == 401
        assert not w.machine.of(m.StopRequested)

    run(tmp_path, scenario)


def test_health_needs_no_token(tmp_path: Path) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        async with client.get("/healthz", headers={"Authorization": ""}) as answer:
            assert (answer.status, await answer.json()) == (200, {"ok": True})

    run(tmp_path, scenario)


def test_status_is_waited_for(tmp_path: Path) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        async def ask(after: int, wait: float) -> Any:
            async with client.get(f"/status?after={after}&wait={wait}") as answer:
                return await answer.json()

        seq = (await ask(0, 10))["seq"]
        assert (await ask(seq + 7, 10))["seq"] == seq, "of another controller's log"
        assert (await ask(seq, 0.02))["seq"] == seq
        waiting = asyncio.create_task(ask(seq, 10))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        w.driver.log("news", "here")
        assert (await waiting)["seq"] == seq + 1
        assert (await ask(seq, 10))["version"] == __version__

    run(tmp_path, scenario)


def test_domains_are_told(tmp_path: Path) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        async with client.put("/domains", json={"machine-1": "zone-a"}) as answer:
            assert (answer.status, await answer.json()) == (200, {"placed": []})
        async with client.put("/domains", json={"machine-1": ""}) as answer:
            assert answer.status == 400

    run(tmp_path, scenario)


ASKED = [
    ("/resize", {"replicas": 3, "minReplicas": None, "spares": 1}, m.ResizeRequested(3, None, 1)),
    ("/resize", {"replicas": 3, "minReplicas": 2, "spares": 0}, m.ResizeRequested(3, 2, 0)),
    ("/suspend", {"patience_s": 60, "reason": "quota"}, m.SuspendRequested(60.0, "quota")),
    ("/suspend", {"patience_s": 0.5}, m.SuspendRequested(0.5)),
    ("/hold", {"patience_s": 20}, m.HoldRequested(20.0)),
    ("/fault", {"fault": "rank-crash:1"}, m.FaultRequested("rank-crash", 1)),
    ("/fault", {"fault": "corrupt:2/header"}, m.FaultRequested("corrupt", 2, "header")),
    ("/fault", {"fault": "controller-crash"}, m.FaultRequested("controller-crash")),
]


@pytest.mark.parametrize(("path", "body", "event"), ASKED)
def test_requests_reach_the_machine_or_meet_its_objection(
    tmp_path: Path, path: str, body: dict[str, Any], event: m.Event
) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        async with client.post(path, json=body) as answer:
            assert (answer.status, await answer.json()) == (200, {"asked": path[1:]})
        await until(lambda: w.machine.of(type(event)))
        assert w.machine.of(type(event)) == [event]
        w.machine.objecting = "3 nodes are too small"
        async with client.post(path, json=body) as answer:
            assert (answer.status, await answer.json()) == (400, {"error": "3 nodes are too small"})
        assert w.machine.of(type(event)) == [event]

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/resize", {"replicas": 3, "spares": 1}, "minReplicas: Field required"),
        ("/resize", {"replicas": 0, "minReplicas": None, "spares": 1}, "replicas: "),
        ("/resize", {"replicas": 2, "minReplicas": 3, "spares": 1}, "minReplicas 3 must be at most replicas"),
        ("/resize", {"replicas": "2", "minReplicas": None, "spares": 1}, "replicas: "),
        ("/resize", {"replicas": 2, "minReplicas": None, "spares": -1}, "spares: "),
        ("/suspend", {"patience_s": -1}, "patience_s: "),
        ("/suspend", {"patience": 1}, "patience: "),
        ("/hold", {"patience_s": "NaN"}, "patience_s: "),
        ("/hold", {}, "patience_s: Field required"),
        ("/fault", {"fault": "explode:1"}, "unknown kind explode"),
        ("/fault", {"fault": 3}, "fault: "),
    ],
)
def test_requests_that_are_none_are_refused(tmp_path: Path, path: str, body: dict[str, Any], text: str) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        async with client.post(path, json=body) as answer:
            assert answer.status == 400
            assert text in (await answer.json())["error"]

    run(tmp_path, scenario)


def test_a_job_that_is_over_takes_no_request(tmp_path: Path) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        w.driver.request_stop("enough")
        await until(lambda: w.driver.finished)
        async with client.post("/hold", json={"patience_s": 1}) as answer:
            assert (answer.status, await answer.json()) == (400, {"error": "the job is over"})

    run(tmp_path, scenario, answers={m.StopRequested: [m.Finish("stopped", "enough")]})


def test_events_are_waited_for(tmp_path: Path) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        seq = w.driver.status()["seq"]

        async def ask() -> Any:
            async with client.get(f"/events?after={seq}&wait=10") as answer:
                return await answer.json()

        waiting = asyncio.create_task(ask())
        await asyncio.sleep(0.05)
        body = {"kind": "fault", "text": "rank 1 killed", "fields": {"rank": 1}}
        async with client.post("/events", json=body) as answer:
            assert await answer.json() == {"seq": seq + 1}
        got = await waiting
        assert got["seq"] == seq + 1
        assert got["events"][0] | body == got["events"][0]

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("method", "path", "body", "text"),
    [
        ("GET", "/events?after=x", None, "after=x"),
        ("GET", "/events?wait=-1", None, "wait=-1"),
        ("GET", "/events?wait=nan", None, "wait=nan"),
        ("POST", "/events", '{"kind": 3}', "kind"),
        ("POST", "/events", "{", "no JSON"),
        ("POST", "/stop", "[]", "object"),
        ("POST", "/nodes", '{"node": "../x"}', "node"),
        ("POST", "/nodes", '{"node": "node-3", "bogus": 1}', "bogus"),
    ],
)
def test_wrong_requests_are_explained(tmp_path: Path, method: str, path: str, body: str | None, text: str) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        async with client.request(method, path, data=body) as answer:
            assert answer.status == 400
            assert text in (await answer.json())["error"]

    run(tmp_path, scenario)


def test_nodes_come_and_go(tmp_path: Path) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        body = node_config(tmp_path, "node-7").model_dump_json()
        for new in (True, False):
            async with client.post("/nodes", data=body) as answer:
                assert await answer.json() == {"node": "node-7", "new": new}
        await until(lambda: "node-7" in w.agents.made)
        for status in (200, 404):
            async with client.delete("/nodes/node-7") as answer:
                assert answer.status == status
        assert w.agents.removed == ["node-7"]

    run(tmp_path, scenario)


def test_stop_ends_the_job_and_then_the_controller(tmp_path: Path) -> None:
    async def scenario(w: World, client: aiohttp.ClientSession, left: list[str]) -> None:
        async with client.post("/stop", json={"reason": "enough"}) as answer:
            assert await answer.json() == {"stopping": "job"}
        await until(lambda: w.driver.finished)
        assert w.machine.of(m.StopRequested) == [m.StopRequested("enough")]
        assert left == []
        async with client.post("/stop") as answer:
            assert await answer.json() == {"stopping": "controller"}
        assert left == ["left"]

    run(tmp_path, scenario, answers={m.StopRequested: [m.Finish("stopped", "enough")]})
