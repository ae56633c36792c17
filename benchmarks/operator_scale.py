"""The operator with many jobs on fake nodes, against a real API server (the lab's, with kwok) and real HTTP.

    python benchmarks/operator_scale.py up|submit|steady|restart|down [--jobs 1000] [--folder DIR]
    python benchmarks/operator_scale.py all --jobs 100

Each job has a head and 7 nodes. Their Pods are fake, but have addresses, and on these, through a local route, one server
answers as the jobs' controllers: progress really flows. Phases keep what they measured in DIR/figures.json, so that each
takes a few minutes; ``down`` prints all of it.

- submit: all jobs are made as fast as the API server takes them. "burst": from a job's POST to its last Pod, of all; the
  last of them waits for all others. "unhurried": of 20 more jobs, one a second, when the others run.
- steady: nothing happens but training: API calls a minute against the floor, one status write a job and 30 s; processor
  time and memory of the operator.
- restart: SIGKILL, and a new operator under the same identity: until its caches are full, until it acts, until it has
  heard every controller.
Targets: steady state at most 1.1 times the floor; caches of 8,000 Pods full within 10 s.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import psutil

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

from outlast_operator.cluster import Cluster, connect
from outlast_operator.crd import definition
from outlast_operator.kinds import JOB, Kind
from outlast_operator.refusals import ApiError
from support.stores import lab

ROOT = pathlib.Path(__file__).resolve().parents[1]
NODES = 7
PODS_A_JOB = NODES + 1
JOBS_A_NAMESPACE = 100
FAKE_PODS = "240.0.0.0/8"
"""The addresses that kwok gives to Pods."""
PODS_A_MACHINE = 120
METRICS, HEALTH, CONTROLLERS = 18480, 18481, 18470
STEADY_S = 90.0
SETTLE_S = 45.0
UNHURRIED = 20
NAMESPACE = Kind("Namespace", "v1", "namespaces", namespaced=False)
DEFINITION = Kind("CustomResourceDefinition", "apiextensions.k8s.io/v1", "customresourcedefinitions", namespaced=False)


class Scale:
    """One benchmark's lab, processes and figures; phases find each other through the folder."""

    def __init__(self, folder: pathlib.Path, jobs: int) -> None:
        self.folder, self.jobs = folder, jobs
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "figures.json"
        self.figures: dict[str, Any] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self.kubeconfig = str(self.figures.get("kubeconfig", ""))

    def keep(self, **figures: Any) -> None:
        """Remember and print."""
        self.figures.update(figures)
        self._file.write_text(json.dumps(self.figures, indent=2))
        print(json.dumps(figures), flush=True)

    def cluster(self) -> Cluster:
        return Cluster(connect(self.kubeconfig, 16))

    # --- phases

    def up(self) -> None:
        """The lab, fake nodes, the definition, the operator and the controllers."""
        command = _lab()
        shown = subprocess.run(
            [command, "up", "--name", "scale", "--nodes", "0", "--grace", "60"],
            check=True, capture_output=True, text=True, timeout=180,
        )  # fmt: skip
        self.kubeconfig = shown.stdout.split()[-1]
        machines = -(-self.jobs * PODS_A_JOB // PODS_A_MACHINE) + 2
        fake = [command, "kwok", "--name", "scale", "--fake-nodes", str(machines)]
        subprocess.run(fake, check=True, capture_output=True, timeout=300)
        cluster = self.cluster()
        cluster.create(DEFINITION, "", definition())
        for number in range(-(-(self.jobs + UNHURRIED) // JOBS_A_NAMESPACE)):
            cluster.create(NAMESPACE, "", {"metadata": {"name": f"scale-{number}"}})
        subprocess.run(["ip", "route", "replace", "local", FAKE_PODS, "dev", "lo"], check=True)
        script = ROOT / "tests" / "support" / "scripts" / "many_controllers.py"
        controllers = self._start("controllers", [sys.executable, str(script), str(CONTROLLERS), str(NODES)])
        self.keep(kubeconfig=self.kubeconfig, jobs=self.jobs, machines=machines, controllers=controllers)
        self._start_operator()

    def submit(self) -> None:
        """Make all jobs at once, wait until all of them run, then a few one after the other."""
        before, cpu = self._calls(), self._cpu_s()
        began = time.time()
        posted = self._post(range(self.jobs), threads=4)
        taken = time.time() - began
        _until("all jobs run", lambda: self._running() >= self.jobs, 500)
        running = time.time() - began
        calls = self._calls() - before
        self.keep(
            submit={
                "posting_s": round(taken, 1),
                "all_running_s": round(running, 1),
                "operator_cpu_s": round(self._cpu_s() - cpu, 1),
                "operator_rss_mib": self._rss_mib(),
                "api_calls_a_job": round(sum(calls.values()) / self.jobs, 2),
                "by_kind": {name: round(count / self.jobs, 3) for name, count in calls.most_common(12)},
                "burst_s": _spread(self._waits(posted)),
            }
        )
        posted = {}
        for number in range(self.jobs, self.jobs + UNHURRIED):
            posted |= self._post([number], threads=1)
            time.sleep(1.0)
        _until("the further jobs run", lambda: self._running() >= self.jobs + UNHURRIED, 120)
        self.keep(unhurried_s=_spread(self._waits(posted)))

    def steady(self) -> None:
        """Nothing but progress."""
        time.sleep(SETTLE_S)
        before, cpu, began = self._calls(), self._cpu_s(), time.monotonic()
        time.sleep(STEADY_S)
        minutes = (time.monotonic() - began) / 60
        calls = self._calls() - before
        jobs = self._running()
        self.keep(
            steady={
                "calls_a_minute": round(sum(calls.values()) / minutes),
                "floor_a_minute": round(jobs * 2),
                "ratio": round(sum(calls.values()) / minutes / (jobs * 2), 3),
                "by_kind": dict(calls),
                "cores": round((self._cpu_s() - cpu) / (minutes * 60), 3),
                "rss_mib": self._rss_mib(),
            }
        )

    def restart(self) -> None:
        """A new operator where one was killed."""
        os.kill(self.figures["operator"], signal.SIGKILL)
        psutil.wait_procs([psutil.Process(self.figures["operator"])], timeout=10)
        began = time.monotonic()
        self._start_operator()
        full = time.monotonic() - began
        _until("it acts", lambda: " acting jobs=" in self._log(), 60)
        acting = time.monotonic() - began
        jobs = self._running()
        _until("all controllers are heard", lambda: self._metric("controller_polls_total", result="ok") >= jobs, 120)
        self.keep(
            restart={
                "pods": self._metric("pods"),
                "caches_full_s": round(full, 2),
                "acting_s": round(acting, 2),
                "all_heard_s": round(time.monotonic() - began, 2),
                "cpu_s": round(self._cpu_s(), 1),
                "rss_mib": self._rss_mib(),
                "pods_made": self._log().count("created job="),
            }
        )

    def down(self) -> None:
        """End everything and print the figures."""
        for name in ("operator", "controllers"):
            if name in self.figures and psutil.pid_exists(self.figures[name]):
                os.kill(self.figures[name], signal.SIGKILL)
        subprocess.run([_lab(), "down", "--name", "scale"], check=True, capture_output=True, timeout=120)
        subprocess.run(["ip", "route", "del", "local", FAKE_PODS, "dev", "lo"], check=False)
        print(json.dumps(self.figures, indent=2))

    # --- what they are made of

    def _start(self, name: str, command: list[str]) -> int:
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True).pid

    def _start_operator(self) -> None:
        command = [str(pathlib.Path(sys.executable).parent / "outlast-operator"), "--training-image", "training:1"]
        command += ["--kubeconfig", self.kubeconfig, "--identity", "scale", "--controller-port", str(CONTROLLERS)]
        command += ["--metrics-port", str(METRICS), "--health-port", str(HEALTH)]
        command += ["--operator-namespace", "default", "--operator-labels", "app=outlast-operator"]
        self.keep(operator=self._start("operator", command))
        _until("its caches are full", _is_ready, 120)

    def _post(self, numbers: Any, threads: int) -> dict[str, float]:
        """Make the jobs; when each was taken, by namespace/name."""
        cluster = self.cluster()

        def one(number: int) -> tuple[str, float]:
            namespace, name = f"scale-{number // JOBS_A_NAMESPACE}", f"job-{number}"
            cluster.create(JOB, namespace, _job(name))
            return f"{namespace}/{name}", time.time()

        with ThreadPoolExecutor(threads) as pool:
            return dict(pool.map(one, numbers))

    def _log(self) -> str:
        return (self.folder / "operator.log").read_text(errors="replace")

    def _waits(self, posted: dict[str, float]) -> list[float]:
        """Seconds from each job's POST to its last Pod, by the operator's own log."""
        made: dict[str, list[float]] = {}
        for when, job in re.findall(r"^(\S+ \S+) INFO .* created job=(\S+) kind=Pod", self._log(), re.MULTILINE):
            made.setdefault(job, []).append(datetime.strptime(when, "%Y-%m-%d %H:%M:%S,%f").timestamp())
        short = [job for job in posted if len(made.get(job, ())) != PODS_A_JOB]
        assert not short, f"{len(short)} jobs do not have {PODS_A_JOB} Pods, such as {short[:3]}"
        return [max(made[job]) - when for job, when in posted.items()]

    def _samples(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def _metric(self, name: str, **labels: str) -> float:
        shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return self._samples().get(f"outlast_operator_{name}" + (f"{{{shown}}}" if shown else ""), 0.0)

    def _running(self) -> float:
        return self._metric("jobs", phase="Running")

    def _calls(self) -> Counter[str]:
        """Requests to the API server so far, but for the Lease, by verb and resource."""
        found: Counter[str] = Counter()
        for name, value in self._samples().items():
            match = re.fullmatch(r'outlast_operator_api_calls_total\{resource="(.*)",status="(.*)",verb="(.*)"\}', name)
            if match and match[1] != "leases":
                found[f"{match[3]} {match[1]} {match[2]}"] += int(value)
        return found

    def _process(self) -> psutil.Process:
        return psutil.Process(self.figures["operator"])

    def _cpu_s(self) -> float:
        times = self._process().cpu_times()
        return float(times.user + times.system)

    def _rss_mib(self) -> int:
        return int(self._process().memory_info().rss) >> 20


def _job(name: str) -> dict[str, Any]:
    tolerations = [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}]
    template = {"spec": {"tolerations": tolerations, "nodeSelector": {"type": "kwok"}}}
    spec = {"entrypoint": ["python", "train.py"], "workers": {"replicas": NODES, "template": template}}
    return {"apiVersion": JOB.api_version, "kind": JOB.name, "metadata": {"name": name}, "spec": spec}


def _lab() -> str:
    command = lab()
    if command is None or os.geteuid() != 0:
        raise SystemExit("this benchmark needs the lab (kubelab) and root")
    return command


def _is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{HEALTH}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _until(what: str, reached: Any, within_s: float) -> None:
    until = time.monotonic() + within_s
    while True:
        try:
            if reached():
                return
        except OSError:
            pass  # it does not answer yet
        if time.monotonic() > until:
            raise SystemExit(f"not within {within_s:g} s: {what}")
        time.sleep(0.2)


def _spread(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"median": round(cuts[49], 3), "p99": round(cuts[98], 3), "worst": round(max(values), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["up", "submit", "steady", "restart", "down", "all"])
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp/outlast-operator-scale"))
    given = parser.parse_args()
    scale = Scale(given.folder, given.jobs)
    phases = ["up", "submit", "steady", "restart", "down"] if given.phase == "all" else [given.phase]
    try:
        for phase in phases:
            getattr(scale, phase)()
    except ApiError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
