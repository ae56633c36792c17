"""Several agents and their keepers together: one rendezvous, parity over nodes, a lost node's image rebuilt."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from outlast import messages as m
from outlast.agent.isolation import may_isolate
from outlast.config import Isolation
from outlast.snapshot.identity import Generation
from outlast.snapshot.restore import plan_restore
from support.keepers import write_shard
from support.sites import PRELUDE, Node, Site, attempt, eventually

UNMODIFIED = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
x = torch.full((3,), float(dist.get_rank() + 1))
dist.all_reduce(x)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
    raise RuntimeError("first time")
print("sum", x.tolist(), dist.get_world_size(), dist.is_torchelastic_launched(), torch.get_num_threads())
dist.destroy_process_group()
"""


def test_an_unmodified_torchrun_script_runs_and_is_restarted(site: Site) -> None:
    nodes = [site.node(UNMODIFIED, procs=2), site.node(UNMODIFIED, procs=2)]
    port = nodes[0].join().free_port
    for seat, node in enumerate(nodes):
        node.do(node.start(seat=seat, world_nodes=2, master_port=port))
    assert nodes[0].next("RankExited").error.message == "first time"
    for node in nodes:
        node.do(m.Stop(node.config.node, attempt(2)))
    port, _ = [node.next("Stopped").free_port for node in nodes]
    for seat, node in enumerate(nodes):
        node.do(node.start(2, seat=seat, world_nodes=2, master_port=port))
    for node in nodes:
        for _ in range(2):
            node.next("RankDone")
    assert nodes[1].log(3, 2) == "sum [10.0, 10.0, 10.0] 4 True 1\n"


def encode(nodes: list[Node], generation: Generation, lengths: list[int]) -> None:
    peers = tuple(node.agent._host.serving.address for node in nodes)  # type: ignore[union-attr]
    seats = tuple(range(len(nodes)))
    for index, node in enumerate(nodes):
        node.do(m.Encode(node.config.node, generation, 0, seats, 1, index, (tuple(lengths),), peers))
    for node in nodes:
        assert node.next("Encoded").generation == generation


def test_parity_is_made_and_a_lost_node_is_rebuilt(site: Site) -> None:
    script = (
        PRELUDE
        + """
told = hear()
print(json.dumps(told))
path = told["images"]["1"]["path"]
say("ready", restored_step=os.path.getsize(path), restore_s=0, source=told["plan"]["sources"]["1"])
time.sleep(100)
"""
    )
    isolate = Isolation(base=str(site.memory), own="") if may_isolate() else None

    def make() -> Node:
        own = isolate and isolate.model_copy(update={"own": str(site.memory / f"node-{len(site.nodes)}")})
        return site.node(script, isolate=own)

    nodes = [make(), make()]
    generation, lengths = Generation.of(attempt(1), 5), []
    for seat, node in enumerate(nodes):
        eventually(lambda node=node: node.agent._host.serving)
        node.do(m.Stop(node.config.node, attempt(1)))
        node.next("Stopped")
        lengths.append(write_shard(Path(node.config.memory_dir) / "slot-0-0.img", seat, 0, generation, 300_000))
    encode(nodes, generation, lengths)
    for node in nodes:
        node.do(m.Commit((node.config.node,), generation))
        assert node.next("CommitAcked").generation == generation

    lost, spare = nodes[1], make()
    image = (Path(lost.config.memory_dir) / "slot-0-0.img").read_bytes()
    site.zygote.kill(lost.config.forkserver_socket, signal.SIGKILL)
    inventories = []
    for node in (nodes[0], spare):
        node.do(m.Stop(node.config.node, attempt(2)))
        inventories.append(node.next("Stopped").inventory)
    plan = plan_restore(inventories, {0: nodes[0].config.node, 1: spare.config.node}, 1)
    assert plan is not None
    keepers = {node.config.node: node.agent._host.serving.address for node in (nodes[0], spare)}  # type: ignore[union-attr]
    spare.do(spare.start(2, seat=1, world_nodes=2, restore=plan, keepers=keepers))
    ready = spare.next("RestoreReady")
    assert ready.bytes > 0
    spare.do(m.Load((spare.config.node,), attempt(2)))
    loaded = spare.next("RankReady")
    assert (loaded.source, loaded.restored_step) == ("memory-decode", len(image))
    assert (Path(spare.config.memory_dir) / "slot-0-0.img").read_bytes() == image
    elsewhere = json.loads(spare.log(1, 2))["images"]["0"]
    host, port = keepers["node-0"]
    assert elsewhere == {"host": host, "port": port, "local_rank": 0, "seat": 0}
