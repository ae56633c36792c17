"""The lab's Kubernetes for end-to-end tests: its commands, its machines' power, its objects."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from support.stores import ROOT, lab, lab_assets

S3_ADDRESS = ("198.18.255.1", 9000)
"""Where the lab's S3 server listens for all Pods."""
BUILD_S = 900
"""Building both images where nothing is cached."""


def _run(command: list[str], timeout: float, given: str | None, environment: Mapping[str, str]) -> str:
    """Standard output; an AssertionError with both outputs when the status is not 0."""
    done = subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=timeout, env=dict(environment), check=False
    )
    words = " ".join(command)
    assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@dataclass(frozen=True)
class Lab:
    """One lab that is up. ``variables``: this process's environment with its binaries and KUBECONFIG."""

    name: str
    command: str
    variables: Mapping[str, str]

    def kubelab(self, *arguments: str, timeout: float = 180) -> str:
        return _run([self.command, *arguments], timeout, None, self.variables)

    def kubectl(self, *arguments: str, given: str | None = None, timeout: float = 120) -> str:
        return _run(["kubectl", *arguments], timeout, given, self.variables)

    def helm(self, *arguments: str, timeout: float = 240) -> str:
        return _run(["helm", *arguments], timeout, None, self.variables)

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Any command in the lab's environment, whatever its status is."""
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **self.variables},  # the bucket's credentials came later
            check=False,
        )

    def get(self, *arguments: str) -> dict[str, Any]:
        """``kubectl get`` as an object."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return found

    def apply(self, *objects: Mapping[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", given=yaml.safe_dump_all([dict(part) for part in objects]))

    def machine(self, number: int) -> str:
        """The Node's name."""
        return f"{self.name}-node-{number}"

    def number(self, machine: str) -> str:
        return machine.removeprefix(f"{self.name}-node-")

    def power_off(self, machine: str) -> None:
        self.kubelab("kill-node", "--name", self.name, self.number(machine))

    def power_on(self, machine: str) -> None:
        self.kubelab("start-node", "--name", self.name, self.number(machine))

    def kill_container(self, pod: Mapping[str, Any], container: str) -> None:
        """SIGKILL to all processes of a Pod's container, as the kernel's out-of-memory killer would."""
        (status,) = [s for s in pod["status"]["containerStatuses"] if s["name"] == container]
        identity = status["containerID"].removeprefix("containerd://")
        command = ["ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", "--all", identity]
        self.kubelab("enter", "--name", self.name, self.number(pod["spec"]["nodeName"]), "--", *command)


@contextmanager
def running_lab(name: str, nodes: int, keep: bool = False) -> Iterator[Lab]:
    """A new lab, or a skip with the reason; afterwards it is gone. ``keep``: one that is up is used, and stays."""
    command, assets = lab(), lab_assets()
    if command is None or assets is None or os.geteuid() != 0:
        pytest.skip("no Kubernetes here: the lab (kubelab) and root are needed")
    environment = {**os.environ, "PATH": f"{assets}:{os.environ['PATH']}"}
    down = [command, "down", "--name", name]
    if not keep:
        _run(down, 120, None, environment)
    try:
        told = _run([command, "up", "--name", name, "--nodes", str(nodes)], 300, None, environment)
        yield Lab(name, command, {**environment, "KUBECONFIG": told.splitlines()[-1]})
    finally:
        if not keep:
            _run(down, 120, None, environment)


@contextmanager
def lab_wide_s3(lab: Lab) -> Iterator[dict[str, str]]:
    """The variables that lead to the S3 server which the host and all Pods reach; it is stopped if it was started here."""
    before = _listens(*S3_ADDRESS)
    lines = lab.kubelab("s3").splitlines()
    pairs = (line.removeprefix("export ").partition("=") for line in lines if line.startswith("export "))
    try:
        yield {key: value.strip("'\"") for key, _, value in pairs}
    finally:
        if not before:
            lab.kubelab("s3", "--stop")


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def build_images(lab: Lab) -> None:
    """``make images``: outlast-operator:dev and outlast-training:dev, in every node of this lab and of no other."""
    command = ["make", "--no-print-directory", "-C", str(ROOT), "images", f"LABNAME={lab.name}"]
    _run(command, BUILD_S, None, lab.variables)


def save_logs(lab: Lab, folder: pathlib.Path) -> None:
    """What helps to find out why a test failed, before the lab goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in {
        "objects": ["kubectl", "get", "pods,trainingjobs,events", "-A", "-o", "wide"],
        "jobs.yaml": ["kubectl", "get", "trainingjobs", "-A", "-o", "yaml"],
        "operator": ["kubectl", "logs", "-n", "outlast-system", "-l", "app.kubernetes.io/name=outlast", "--tail=-1"],
    }.items():
        (folder / name).write_text(lab.run(*command).stdout)
