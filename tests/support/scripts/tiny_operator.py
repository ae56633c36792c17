"""An operator with the plan of ``support.tinyplan``, as a process: ``tiny_operator.py KUBECONFIG IDENTITY [KEY=VALUE …]``.

Keys: ``namespace`` (whose jobs, and where the Lease is), ``lease_s``, ``controller_port``, ``metrics``, ``health``,
``progress_s``, ``plan=real`` for the operator's own, and ``die_after``: SIGKILL itself just after the n-th write that
the API server took (1 is the first).
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from outlast_operator import cluster
from outlast_operator.model import Settings
from outlast_operator.plan import plan as real_plan
from outlast_operator.poller import PollSettings
from outlast_operator.replica import Options
from outlast_operator.serving import Ports, serve, set_up_logging, terms_of
from support.tinyplan import plan

WRITES = ("create", "apply", "patch", "delete")


def die_after(count: int) -> None:
    """Count the writes about jobs; the process ends when the last of them has been taken."""
    taken = 0
    before = cluster.Cluster._call

    def call(self: cluster.Cluster, verb: str, kind: cluster.Kind, *arguments: object, **named: object) -> object:
        nonlocal taken
        answer = before(self, verb, kind, *arguments, **named)  # type: ignore[arg-type]
        if verb in WRITES and kind.name != "Lease":
            taken += 1
            if taken == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return answer

    cluster.Cluster._call = call  # type: ignore[method-assign,assignment]


def main() -> None:
    kubeconfig, identity = sys.argv[1:3]
    given = dict(argument.split("=") for argument in sys.argv[3:])
    set_up_logging("info")
    if "die_after" in given:
        die_after(int(given["die_after"]))
    progress_s = float(given.get("progress_s", 30))
    settings = Settings("test", "training", progress_every_s=progress_s)
    namespace = given["namespace"]
    terms = terms_of("outlast-operator", namespace, identity, int(given.get("lease_s", 15)))
    poll = PollSettings(int(given.get("controller_port", 8470)), 100, wait_s=5.0)
    options = Options(settings, terms, (namespace,), workers=4, poll=poll)
    decide = plan if given.get("plan") != "real" else lambda observed, now: real_plan(observed, settings, now)
    serve(options, decide, kubeconfig, Ports(int(given.get("metrics", 0)), int(given.get("health", 0))))


main()
