"""A node's processes are told from later ones of the same number, whatever the wall clock does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.agent.pidfiles import node_pids, remove_pid, write_pid


@pytest.fixture
def pid() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def age(path: Path, seconds: float) -> None:
    """As the file looks after the wall clock was stepped ahead."""
    written = path.stat().st_mtime - seconds
    os.utime(path, (written, written))


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_step_of_the_wall_clock_hides_no_process(tmp_path: Path, pid: int, step: float) -> None:
    write_pid(tmp_path, "agent", pid)
    age(tmp_path / "agent.pid", step)
    assert node_pids(tmp_path) == {"agent": pid}
    remove_pid(tmp_path, "agent", pid + 1)
    assert node_pids(tmp_path) == {"agent": pid}
    remove_pid(tmp_path, "agent", pid)
    assert not list(tmp_path.iterdir())


def test_another_process_of_the_same_number_is_none_of_the_node(tmp_path: Path, pid: int) -> None:
    path = tmp_path / "agent.pid"
    write_pid(tmp_path, "agent", pid)
    ((_, started),) = json.loads(path.read_text()).values()
    path.write_text(json.dumps({"agent": [pid, started - 1]}))
    assert node_pids(tmp_path) == {}


def test_one_that_has_ended_is_none_of_the_node(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        write_pid(tmp_path, "agent", process.pid)
        process.kill()
        until = time.monotonic() + 10
        while node_pids(tmp_path):
            assert time.monotonic() < until, "a zombie counts as alive"
        write_pid(tmp_path, "keeper", process.pid)
    write_pid(tmp_path, "rank-0", process.pid)
    assert node_pids(tmp_path) == {}


def test_a_file_of_an_older_version_is_judged_by_its_age(tmp_path: Path, pid: int) -> None:
    path = tmp_path / "agent.pid"
    path.write_text(json.dumps({"agent": pid}))
    assert node_pids(tmp_path) == {"agent": pid}
    age(path, 3600)
    assert node_pids(tmp_path) == {}
    remove_pid(tmp_path, "agent", pid)
    assert not path.exists()
