"""The controller in a real Ray: launched, asked, killed, and back with the same story and the same nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from outlast.config import ControllerConfig, NodeConfig
from support.controller_world import node_config
from support.ray_head import Head, ray_head, session_pids

pytest.importorskip("ray", reason="needs outlast[train]")

NODES = ("node-0", "node-1")
JOB: dict[str, Any] = {
    "apiVersion": "outlast.dev/v1alpha1",
    "kind": "TrainingJob",
    "metadata": {"name": "demo"},
    "spec": {"entrypoint": ["python", "train.py"], "workers": {"replicas": 2}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def head(folder: Path) -> Iterator[Head]:
    with ray_head(folder / "ray.token") as running:
        yield running
    assert session_pids(running.session) == []


@pytest.fixture(scope="module")
def config(folder: Path) -> ControllerConfig:
    token_file = folder / "token"
    token_file.write_text("b" * 64)
    return ControllerConfig(job=JOB, name="demo", dir=str(folder), namespace="demo", token_file=str(token_file))


def python(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=dict(head.env), timeout=90, capture_output=True, text=True, check=False)


def launch(head: Head, config: ControllerConfig) -> subprocess.CompletedProcess[str]:
    file = Path(config.dir) / "config.json"
    file.write_text(config.model_dump_json())
    return python(head, "-m", "outlast.controller.launch", "--address", head.address, "--config", str(file))


def ask(config: ControllerConfig, method: str, path: str, body: Any = None) -> Any:
    where = json.loads(config.http_file.read_text())
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{where['host']}:{where['port']}{path}", data=data, method=method)
    request.add_header("Authorization", f"Bearer {Path(config.token_file).read_text()}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            value = condition()
        except OSError:
            value = None
        if value:
            return value
        assert time.monotonic() < deadline
        time.sleep(0.05)


def node_of(folder: Path, node: str) -> NodeConfig:
    return node_config(folder, node).model_copy(update={"job": JOB, "namespace": "demo"})


def journal(folder: Path, node: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{node}.jsonl").read_text().splitlines()]


def kinds(folder: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()]


def test_launch_makes_a_controller_that_serves(head: Head, folder: Path, config: ControllerConfig) -> None:
    first = launch(head, config)
    assert (first.returncode, first.stderr) == (0, "")
    status = ask(config, "GET", "/status")
    assert psutil.pid_exists(status["pid"])
    again = launch(head, config)
    assert again.returncode == 0
    assert ask(config, "GET", "/status")["controller"] == status["controller"]


def test_it_finds_agents_by_name_and_they_join(head: Head, folder: Path, config: ControllerConfig) -> None:
    made = python(head, "-m", "support.stub_agent", head.address, "demo", str(folder), *NODES)
    assert made.returncode == 0, made.stderr
    for node in NODES:
        body = json.loads(node_of(folder, node).model_dump_json())
        assert ask(config, "POST", "/nodes", body) == {"node": node, "new": True}
    until(lambda: set(ask(config, "GET", "/status")["nodes"]) == set(NODES))
    controller = ask(config, "GET", "/status")["controller"]
    for node in NODES:
        assert until(lambda node=node: journal(folder, node)[2:])[0] == {"controller": controller, "known": True}
        until(lambda node=node: any(item["type"] == "Stop" for item in journal(folder, node) if "type" in item))


def test_killed_it_comes_back_with_its_nodes_and_its_story(head: Head, folder: Path, config: ControllerConfig) -> None:
    before = ask(config, "GET", "/status")
    os.kill(before["pid"], signal.SIGKILL)
    after = until(lambda: (s := ask(config, "GET", "/status"))["controller"] != before["controller"] and s)
    until(lambda: set(ask(config, "GET", "/status")["nodes"]) == set(NODES))
    assert after["seq"] > before["seq"]
    events = ask(config, "GET", "/events?after=0")["events"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert kinds(folder).count("controller-started") == 2
    assert all(sum(item.get("type") == "born" for item in journal(folder, node)) == 1 for node in NODES)


def test_a_node_without_a_forkserver_has_no_agent(head: Head, folder: Path, config: ControllerConfig) -> None:
    body = json.loads(node_of(folder, "node-9").model_dump_json())
    assert ask(config, "POST", "/nodes", body) == {"node": "node-9", "new": True}
    until(lambda: "agent-gone" in kinds(folder), 60)
    assert ask(config, "DELETE", "/nodes/node-9") == {"node": "node-9"}


def test_stopped_twice_it_leaves_with_its_agents(head: Head, folder: Path, config: ControllerConfig) -> None:
    status = ask(config, "GET", "/status")
    pids = [status["pid"], *(status["nodes"][node]["agent_pid"] for node in NODES)]
    assert ask(config, "POST", "/stop", {"reason": "enough"}) == {"stopping": "job"}
    until(lambda: ask(config, "GET", "/status").get("outcome") == "stopped", 60)
    assert ask(config, "POST", "/stop", {}) == {"stopping": "controller"}
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    time.sleep(2.0)
    with pytest.raises(OSError, match="refused"):
        ask(config, "GET", "/status")


@pytest.mark.parametrize(("address", "status"), [("127.0.0.1:1", 1), ("nowhere", 2)])
def test_without_ray_launch_says_so_at_once(head: Head, config: ControllerConfig, address: str, status: int) -> None:
    file = Path(config.dir) / "config.json"
    file.write_text(config.model_dump_json())
    started = time.monotonic()
    done = python(head, "-m", "outlast.controller.launch", "--address", address, "--config", str(file))
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1)
    assert time.monotonic() - started < 20
