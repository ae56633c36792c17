"""Operators as processes, and the jobs that they look after, on an API server of our own."""

from __future__ import annotations

import base64
import itertools
import pathlib
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from outlast_operator.cluster import Cluster, connect
from outlast_operator.kinds import JOB, LEASE, POD, SECRET, Kind
from outlast_operator.refusals import ApiError
from support.apiserver import ApiServer, eventually, free_port
from support.controllers import Controllers, address

SCRIPT = pathlib.Path(__file__).parent / "scripts" / "tiny_operator.py"
ROLE, HEAD, NODE = "outlast.dev/role", "head", "node"
_numbers = itertools.count(1)


class OperatorProcess:
    """One replica; its log is read for what must not be in it."""

    def __init__(self, command: list[str], metrics: int, health: int, log: pathlib.Path) -> None:
        self._metrics, self._health, self._log = metrics, health, log
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self, within_s: float = 20.0) -> int:
        """The exit status, once it has one."""
        return self.process.wait(within_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def check(self, path: str) -> tuple[int, str]:
        """Status and text of /healthz or /readyz; 0 while nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health}{path}", timeout=5) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def metrics(self) -> dict[str, float]:
        """Every sample by its name with labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        found = (re.fullmatch(r"(\S+?(?:\{.*\})?) (\S+)", line) for line in lines if not line.startswith("#"))
        return {match[1]: float(match[2]) for match in found if match}

    def calls(self) -> dict[tuple[str, str, str], float]:
        """Requests to the API server so far: (verb, resource, status)."""
        found = {}
        for name, value in self.metrics().items():
            match = re.fullmatch(r'outlast_operator_api_calls_total\{resource="(.*)",status="(.*)",verb="(.*)"\}', name)
            if match:
                found[match[3], match[1], match[2]] = value
        return found

    def ready(self) -> None:
        eventually("the operator is ready", lambda: self.check("/readyz")[0] == 200, within_s=30)

    def acting(self) -> None:
        eventually("the operator acts", lambda: " acting jobs=" in self.log(), within_s=30)


class World:
    """One namespace, and the operators started for it."""

    def __init__(self, api: ApiServer, folder: pathlib.Path) -> None:
        self.api, self._folder = api, folder
        self.namespace = f"t{next(_numbers)}"
        self.cluster = Cluster(connect(api.kubeconfig, 8))
        self.operators: list[OperatorProcess] = []
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}}
        self.cluster.create(Kind("Namespace", "v1", "namespaces", namespaced=False), "", namespace)

    def start(self, identity: str = "one", kubeconfig: str | None = None, **keys: Any) -> OperatorProcess:
        """A replica with the tiny plan; see ``scripts.tiny_operator`` for the keys."""
        ports = {"metrics": free_port(), "health": free_port()}
        given = [f"{key}={value}" for key, value in {"namespace": self.namespace, **ports, **keys}.items()]
        command = [sys.executable, str(SCRIPT), kubeconfig or self.api.kubeconfig, identity, *given]
        return self._start(command, identity, **ports)

    def start_real(self, identity: str = "one", kubeconfig: str | None = None, *flags: str) -> OperatorProcess:
        """A replica as it is shipped."""
        metrics, health = free_port(), free_port()
        command = [str(pathlib.Path(sys.executable).parent / "outlast-operator"), "--training-image", "training:1"]
        command += ["--kubeconfig", kubeconfig or self.api.kubeconfig, "--identity", identity]
        command += ["--metrics-port", str(metrics), "--health-port", str(health), *flags]
        return self._start(command, identity, metrics, health)

    def _start(self, command: list[str], identity: str, metrics: int, health: int) -> OperatorProcess:
        log = self._folder / f"{self.namespace}-{identity}-{len(self.operators)}.log"
        operator = OperatorProcess(command, metrics, health, log)
        self.operators.append(operator)
        return operator

    def stop(self) -> None:
        for operator in self.operators:
            operator.kill()

    def submit(self, name: str = "job", replicas: int = 3, **spec: Any) -> Mapping[str, Any]:
        """Make a TrainingJob."""
        workers = {"replicas": replicas, **spec.pop("workers", {})}
        content = {"entrypoint": ["python", "train.py"], "workers": workers, **spec}
        job = {"apiVersion": JOB.api_version, "kind": JOB.name, "metadata": {"name": name}, "spec": content}
        return self.cluster.create(JOB, self.namespace, job)

    def job(self, name: str = "job") -> Mapping[str, Any]:
        return self.cluster.get(JOB, self.namespace, name)

    def status(self, name: str = "job") -> Mapping[str, Any]:
        return self.job(name).get("status") or {}

    def pods(self, job: str = "job") -> dict[str, Mapping[str, Any]]:
        """The job's Pods by name."""
        pages = self.cluster.pages(POD, self.namespace, f"outlast.dev/job={job}")
        return {pod["metadata"]["name"]: pod for page in pages for pod in page["items"]}

    def names(self, job: str = "job") -> list[str]:
        return sorted(self.pods(job))

    def wait_for_pods(self, *names: str, job: str = "job", within_s: float = 20.0) -> None:
        """Until exactly these Pods are there."""
        wanted = sorted(f"{job}-{name}" for name in names)
        eventually(f"the Pods of {job} are {wanted}", lambda: self.names(job) == wanted or None, within_s)

    def run_head(self, controllers: Controllers, number: int, name: str = "job-head-0", **status: Any) -> str:
        """Give a head Pod an address where a controller answers, as a kubelet and an image would; the address."""
        ip = address(number)
        secret = self.cluster.get(SECRET, self.namespace, f"{name.rpartition('-head')[0]}-outlast")
        controllers.add(ip, base64.b64decode(secret["data"]["token"]).decode(), **status)
        self.set_pod(name, phase="Running", podIP=ip, podIPs=[{"ip": ip}])
        return ip

    def set_pod(self, name: str, **status: Any) -> None:
        """Write a Pod's status, as its kubelet would."""
        self.cluster.patch(POD, self.namespace, name, {"status": status}, "status")

    def delete_pod(self, name: str) -> None:
        pod = self.cluster.get(POD, self.namespace, name)
        self.cluster.delete(POD, self.namespace, name, pod["metadata"]["uid"], 0)

    def holder(self) -> str:
        """Who holds the Lease, "" for nobody."""
        try:
            lease = self.cluster.get(LEASE, self.namespace, "outlast-operator")
        except ApiError as error:
            if error.status != 404:
                raise
            return ""
        return str(lease["spec"].get("holderIdentity") or "")


@contextmanager
def world(api: ApiServer, folder: pathlib.Path) -> Iterator[World]:
    """A namespace of its own; whatever was started for it is ended, and no pass may have broken."""
    made = World(api, folder)
    try:
        yield made
    finally:
        made.stop()
    for operator in made.operators:
        assert "pass-broken" not in operator.log(), operator.log()[-4000:]
