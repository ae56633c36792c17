"""Local nodes that are told to leave: they may end by themselves, and are taken away when their time is over."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.config import NodeConfig
from outlast.hosting import processes
from outlast.local.folders import RunFolders
from outlast.local.nodes import LocalNode, LocalNodes, NodeTemplate

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
POLITE = (
    "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit()); print('up', flush=True); signal.pause()"
)
LIMIT_S = 20.0


class Site:
    """Nodes that consist of one process each."""

    def __init__(self, tmp_path: Path) -> None:
        folders = RunFolders(tmp_path, tmp_path / "short", tmp_path / "memory")
        template = NodeTemplate(job={}, namespace="n", cwd=tmp_path, env={}, faults=(), threads=None)
        self.nodes = LocalNodes(folders, template)
        self.started: list[subprocess.Popen[str]] = []

    def add(self, node: str, code: str, grace_s: float) -> subprocess.Popen[str]:
        config = self.nodes._template.config(self.nodes._folders, node).model_copy(update={"grace_s": grace_s})
        self._folders(config)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        self.started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        self.nodes._nodes[node] = LocalNode(config, process.pid)
        return process

    @staticmethod
    def _folders(config: NodeConfig) -> None:
        for folder in (config.memory_dir, config.socket_dir):
            Path(folder).mkdir(parents=True)

    async def gone(self) -> dict[str, bool]:
        """The first answer of ``see_off`` that is not empty."""
        async with asyncio.timeout(LIMIT_S):
            while not (seen := await self.nodes.see_off()):
                await asyncio.sleep(0.02)
        return seen


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.wait(LIMIT_S)


def test_a_node_that_ends_by_itself_has_left(site: Site) -> None:
    site.add("node-0", POLITE, 30.0)
    folder = Path(site.nodes["node-0"].config.memory_dir)
    assert asyncio.run(site.nodes.see_off()) == {}
    assert len(site.nodes.tell_to_leave("node-0")) == 1
    assert site.nodes.leaving() == {"node-0"}
    assert asyncio.run(site.gone()) == {"node-0": True}
    assert site.nodes.lost() == {"node-0"}
    assert site.nodes.leaving() == set()
    assert not folder.exists()
    assert asyncio.run(site.nodes.see_off()) == {}, "told once"
    assert site.nodes.tell_to_leave("node-0") == []


def test_a_node_whose_time_is_over_is_taken_away(site: Site) -> None:
    process = site.add("node-0", STUBBORN, 0.2)
    other = site.add("node-1", STUBBORN, 0.2)
    site.nodes.tell_to_leave("node-0")
    assert asyncio.run(site.gone()) == {"node-0": False}
    assert not processes.is_running(process.pid)
    assert processes.is_running(other.pid)
