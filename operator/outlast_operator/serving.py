"""The operator as a process: its log, its signals, its HTTP, and how it ends."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from random import Random

from outlast.clock import SystemClock
from outlast.errors import RequestError
from outlast_operator.cluster import Cluster, connect
from outlast_operator.health import serve_health, serve_metrics
from outlast_operator.leadership import Terms
from outlast_operator.metrics import Metrics
from outlast_operator.reconciler import Decide
from outlast_operator.replica import Options, Replica

log = logging.getLogger("outlast_operator")

CONNECTIONS_BESIDE_WORKERS = 32
GARBAGE_THRESHOLDS = (20_000, 20, 20)
"""The caches are nearly all of the heap and all alive: looking for cycles in them after every 700 new objects takes
more time than decoding them (8,000 Pods: 2.0 s of processor time against 0.9)."""
LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Ports:
    """Where the operator's own HTTP is."""

    metrics: int
    health: int


def terms_of(name: str, namespace: str, identity: str, lease_s: int) -> Terms:
    """The deadlines that suit a lease of ``lease_s`` seconds."""
    return Terms(name, namespace, identity, lease_s, renew_s=lease_s // 2, retry_s=max(1, lease_s // 7))


def set_up_logging(level: str) -> None:
    """One line an event on standard error."""
    if level not in LEVELS:
        raise RequestError(f"--log-level {level}: one of {', '.join(LEVELS)} is needed")
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(threadName)s %(name)s %(message)s"
    )
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def leave_at_once(why: str) -> None:
    """Leadership is lost: nothing may be written any more, so nothing is ended in order."""
    log.error("leadership-lost cause=%s", why)
    logging.shutdown()
    os._exit(1)


def serve(options: Options, decide: Decide, kubeconfig: str | None, ports: Ports) -> None:
    """Run until SIGTERM or SIGINT. Raises OutlastError and OSError when it cannot begin."""
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    metrics = Metrics()
    connections = options.workers + CONNECTIONS_BESIDE_WORKERS
    agent = f"outlast-operator/{options.settings.version}"
    cluster = Cluster(connect(kubeconfig, connections), metrics.called, agent)
    operator = Replica(options, cluster, metrics, decide, SystemClock(), Random(), leave_at_once)
    serve_health(ports.health, operator.ailing, operator.unsynced)
    serve_metrics(ports.metrics, metrics.registry)
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    log.info("started version=%s identity=%s", options.settings.version, options.terms.identity)
    operator.start()
    told.wait()
    log.info("stopping")
    operator.stop()
    logging.shutdown()
    os._exit(0)  # informers' threads sit in reads that nothing needs to wait for
