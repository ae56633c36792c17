"""The controller's machine with 10,000 simulated nodes: events handled a second, losses and recoveries among them.

    python benchmarks/machine.py [--nodes 10000] [--losses 3] [--seconds 20]

Nodes beat four times a second, snapshots are copied, encoded and committed, nodes are lost one after the other, each
with the collateral errors of all others, a full stop, a restore plan and a restart. Only the time inside
``Machine.handle`` is counted; the simulated cluster around it is not. "worst" is the longest that one event kept the
controller busy.
Target: 20,000 events a second.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

from outlast import messages as m
from outlast.controller.settings import MachineConfig
from support.simulated import Cluster

TARGET = 20_000


class Measured(Cluster):
    """Remembers the longest event."""

    worst_s, worst = 0.0, ""

    def tell(self, event: m.Event) -> None:
        before = self.handling_s
        super().tell(event)
        if self.handling_s - before > self.worst_s:
            self.worst_s, self.worst = self.handling_s - before, type(event).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10_000, help="nodes that train; one in a hundred more is a spare")
    parser.add_argument("--losses", type=int, default=3, help="nodes that are lost, one after the other")
    parser.add_argument("--seconds", type=float, default=20.0, help="virtual seconds of undisturbed training between")
    options = parser.parse_args()
    began = time.perf_counter()
    config = MachineConfig(options.nodes, spares=max(1, options.nodes // 100), start_timeout_s=3600.0)
    world = Measured(config, config.replicas + config.spares, total=10**9, step_s=2.0, domains=100, check=False)
    world.run_to("running")
    gc.freeze()  # the simulated cluster's own objects are no load of the machine's
    for loss in range(options.losses):
        world.run(options.seconds)
        world.run_to("snapshot-committed")
        world.lose_node(world.seated(17 + 1009 * loss % options.nodes), replace_after=None)
        world.run_to("recovered")
    world.run(options.seconds)
    status = world.machine.status(world.now)
    rate = world.handled / world.handling_s
    result = {
        "events": world.handled,
        "handling_s": round(world.handling_s, 2),
        "events_a_second": round(rate),
        "target": TARGET,
        "worst_ms": round(1e3 * world.worst_s, 1),
        "worst": world.worst,
        "recoveries": len(status["recoveries"]),
        "snapshots": status["snapshots"]["count"],
        "wall_s": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
