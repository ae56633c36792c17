"""Head and node Pods as plain processes on loopback: folders for volumes, a free port each, no Kubernetes."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast import kube
from outlast.hosting import processes
from outlast.hosting.client import controller_pid

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"


@dataclass
class PodProcess:
    """One container. ``start`` again after its end is what the kubelet does."""

    role: str
    name: str
    place: Path
    memory: Path
    arguments: list[str]
    env: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        return (self.place / "output").read_text()

    def start(self) -> None:
        with (self.place / "output").open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"outlast.pod.{self.role}", *self.arguments],
                env=self.env,
                cwd=_working_folder(self.place / "code"),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL the whole container at once, as when its first process ends."""
        assert self.process is not None
        found = [self.process.pid, *processes.descendants(self.process.pid)]
        processes.send(found, signal.SIGKILL)
        self.process.wait()
        self._await_end(found)

    def lose(self) -> None:
        """Delete the Pod without a grace: the container and its volumes."""
        self.kill()
        shutil.rmtree(self.memory, ignore_errors=True)

    def terminate(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        """The exit status. Whatever comes of it, nothing of the container is left."""
        assert self.process is not None
        found = processes.descendants(self.process.pid)
        status = self.process.wait(seconds)
        self._await_end(found)
        return status

    def _await_end(self, pids: list[int]) -> None:
        until(lambda: not any(processes.is_running(pid) for pid in pids), 10, f"the end of {self.name}'s processes")


def _working_folder(folder: Path) -> Path:
    """The user's code, with files that are called like modules of Python's and of libraries: they are nobody else's."""
    if not folder.exists():
        folder.mkdir()
        for script in (ROOT / "tests" / "support" / "scripts").iterdir():
            (folder / script.name).symlink_to(script)
        for name in (
            "secrets",
            "queue",
            "select",
            "logging",
            "signal",
            "copy",
            "token",
            "types",
            "yaml",
            "ray",
            "http",
        ):
            (folder / f"{name}.py").write_text(f'raise ImportError("the user\'s {name}.py was imported")\n')
    return folder


@dataclass
class World:
    """One job's Pods. ``pods``: all that were ever made."""

    folder: Path
    memory: Path
    token: str
    gcs_port: int
    controller_port: int
    pods: list[PodProcess] = field(default_factory=list)

    def head(self) -> PodProcess:
        return self._pod("head", f"test-head-{len(self.pods)}")

    def node(self, grace_s: float = 30) -> PodProcess:
        return self._pod("node", f"test-node-{len(self.pods)}", "--port", "0", grace_s=grace_s)

    def ask(self, method: str, path: str, body: Any = None, limit_s: float = 10) -> Any:
        url = f"http://{LOOPBACK}:{self.controller_port}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=limit_s) as answer:
            return json.load(answer)

    def status(self) -> dict[str, Any]:
        """What the controller says; nothing while there is none."""
        try:
            return dict(self.ask("GET", "/status"))
        except OSError:
            return {}

    def controller_pid(self) -> int:
        """Of the newest controller."""
        told = max(self.folder.glob("r*/**/http.json"), key=lambda path: path.stat().st_mtime)
        pid = controller_pid(told)
        assert pid is not None, f"no controller in {told}"
        return pid

    def states(self) -> dict[str, str]:
        return {name: node["state"] for name, node in self.status().get("nodes", {}).items()}

    def restored(self) -> set[str]:
        """Where the present controller's attempts got their state from."""
        return {source for event in self._restored() for source in event["fields"]["restore_sources"]}

    def restored_steps(self) -> list[int]:
        return [event["fields"]["step"] for event in self._restored()]

    def _restored(self) -> list[dict[str, Any]]:
        return [event for event in self.ask("GET", "/events?limit=10000")["events"] if event["kind"] == "restored"]

    def outputs(self) -> str:
        return "\n".join(f"--- {pod.name}\n{pod.output[-3000:]}" for pod in self.pods)

    def _pod(self, role: str, name: str, *more: str, grace_s: float = 30) -> PodProcess:
        place, memory = self.folder / name, self.memory / name
        place.mkdir()
        memory.mkdir()
        arguments = [
            *("--job-folder", str(self.folder / "job")),
            *("--run-folder", str(self.folder / f"r{len(self.pods)}")),
        ]
        arguments += [*("--memory-folder", str(memory)), *("--gcs-port", str(self.gcs_port))]
        arguments += ["--controller-port", str(self.controller_port), *more]
        own = {kube.POD_VARIABLE: name, kube.POD_IP_VARIABLE: LOOPBACK, kube.HEAD_VARIABLE: LOOPBACK}
        own |= {kube.MACHINE_VARIABLE: f"machine-{len(self.pods)}", kube.GRACE_VARIABLE: str(grace_s)}
        path = os.pathsep.join(str(ROOT / part) for part in ("runtime", "operator"))
        pod = PodProcess(role, name, place, memory, arguments, {**os.environ, **own, "PYTHONPATH": path})
        self.pods.append(pod)
        pod.start()
        return pod


@contextmanager
def world(job: Mapping[str, Any]) -> Iterator[World]:
    """A job's Secret, and whatever Pods a test makes; all of it is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="olp-", dir="/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="olp-", dir="/dev/shm"))
    token = secrets.token_hex(32)
    (folder / "job").mkdir()
    (folder / "job" / kube.TOKEN_KEY).write_text(token)
    (folder / "job" / kube.JOB_KEY).write_text(json.dumps(job))
    made = World(folder, memory, token, free_port(), free_port())
    try:
        yield made
    except BaseException:
        print(made.outputs())
        raise
    finally:
        for pod in made.pods:
            if pod.process is not None and pod.process.poll() is None:
                pod.kill()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(memory, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What ``condition`` gives once it is true; AssertionError naming ``what`` was waited for."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.05)
    return value
