"""A raylet for each node, as in Pods: agents are on their own node's, wait for it, and come back with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from outlast.config import ControllerConfig
from support.ray_head import Head, kill_session, ray_head
from support.sites import Node, eventually, open_site, open_zygote

pytest.importorskip("ray", reason="needs outlast[train]")
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("ray") / "ray.token") as running:
        yield running


@contextmanager
def raylet(head: Head, resource: str) -> Iterator[int]:
    """A further raylet that offers ``resource``; yields its session."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={head.address}"]
    options = ["--node-ip-address=127.0.0.1", "--num-cpus=0", "--num-gpus=0", "--disable-usage-stats", "--block"]
    options += ["--object-store-memory=80000000", f"--resources={json.dumps({resource: 1})}"]
    process = subprocess.Popen([*command, *options], env=dict(head.env), start_new_session=True, stdout=subprocess.PIPE)
    try:
        yield process.pid
    finally:
        kill_session(process.pid)
        process.wait()


@contextmanager
def controller(head: Head, folder: Path, node: Node) -> Iterator[ControllerConfig]:
    token = folder / "token"
    token.write_text("t" * 64)
    config = ControllerConfig(
        job={**node.config.job, "metadata": {"name": "j", "namespace": "default"}},
        name="j",
        dir=str(folder),
        namespace=node.config.namespace,
        token_file=str(token),
        patient=True,
    )
    file = folder / "config.json"
    file.write_text(config.model_dump_json())
    command = [sys.executable, "-m", "outlast.controller.launch", "--address", head.address, "--config", str(file)]
    made = subprocess.run(command, env=dict(head.env), capture_output=True, text=True, timeout=90, check=False)
    assert made.returncode == 0, made.stderr
    try:
        yield config
    finally:
        ask(config, "POST", "/stop", {})
        eventually(lambda: ask(config, "GET", "/status").get("outcome"), 40)
        ask(config, "POST", "/stop", {})


def ask(config: ControllerConfig, method: str, path: str, body: Any = None) -> Any:
    where = json.loads(config.http_file.read_text())
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{where['host']}:{where['port']}{path}", data=data, method=method)
    request.add_header("Authorization", f"Bearer {Path(config.token_file).read_text()}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def agent_of(config: ControllerConfig, node: Node) -> int | None:
    """The pid of the agent that joined and is alive."""
    known = ask(config, "GET", "/status")["nodes"].get(node.config.node, {})
    return known.get("agent_pid") if known.get("state") not in (None, "lost", "left") else None


def test_agents_are_where_their_nodes_raylet_is(head: Head, tmp_path: Path) -> None:
    with open_zygote() as zygote, open_site(zygote) as site:
        nodes = [site.node(boot=False, ray_resource=f"outlast-{index}") for index in range(3)]
        with controller(head, tmp_path, nodes[0]) as config:
            pid = ask(config, "GET", "/status")["pid"]
            assert pid in head.pids(), "the controller is beside the head"
            for node in nodes:
                ask(config, "POST", "/nodes", json.loads(node.config.model_dump_json()))
            with raylet(head, "outlast-1") as second:
                # Node 0, which came first, has no raylet yet: that holds up neither the controller nor node 1.
                first = eventually(lambda: agent_of(config, nodes[1]), 60)
                assert os.getsid(first) == second
                began = time.monotonic()
                assert agent_of(config, nodes[0]) is None
                assert ask(config, "DELETE", "/nodes/node-2") == {"node": "node-2"}, "of which there was never an agent"
                assert time.monotonic() - began < 3.0
                with raylet(head, "outlast-0") as gone:
                    agent = eventually(lambda: agent_of(config, nodes[0]), 60)
                    assert os.getsid(agent) == gone
                eventually(lambda: agent_of(config, nodes[0]) is None, 30)
                with raylet(head, "outlast-0") as back:
                    again = eventually(lambda: (pid := agent_of(config, nodes[0])) and pid != agent and pid, 60)
                    assert os.getsid(again) == back
                    assert agent_of(config, nodes[1]) == first
