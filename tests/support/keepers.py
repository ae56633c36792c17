"""Real keepers on loopback with real files on /dev/shm, a directory for each node, all removed afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.image import Entry, ImageFile, block_checksums, plan_layout
from outlast.snapshot.inventory import Inventory, RankRestore, RestorePlan
from outlast.snapshot.restore import plan_restore
from outlast.snapshot.wire import KeeperClient

TOKEN = "0123456789abcdef"
ATTEMPT = Attempt(1, "a" * 16)
WAIT = 30.0


def identity(attempt: Attempt = ATTEMPT) -> dict[str, Any]:
    """The fields by which a message says whose it is."""
    return {"attempt": attempt.number, "incarnation": attempt.incarnation}


PLAIN = ("outlast.snapshot.keeper",)
DURABLE = ("outlast.checkpoint.serving",)


class KeeperProcess:
    """One keeper, as a process of its own. ``program``: its module and arguments; DURABLE has an object tier."""

    def __init__(self, base: Path, node: str, max_memory: int | None = None, program: Sequence[str] = PLAIN) -> None:
        self.node, self.dir = node, base / node
        info = base / f"{node}.json"
        info.unlink(missing_ok=True)
        config: dict[str, Any] = {"node": node, "memory_dir": str(self.dir), "host": "127.0.0.1", "token": TOKEN}
        config |= {"info_path": str(info), "max_memory": max_memory}
        with (base / f"{node}.log").open("ab") as log:
            command = [sys.executable, "-m", *program, "-"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log)
        assert self.process.stdin
        self.process.stdin.write(json.dumps(config).encode())
        self.process.stdin.close()
        until = time.monotonic() + WAIT
        while not info.exists():
            assert self.process.poll() is None, (base / f"{node}.log").read_text()
            assert time.monotonic() < until, f"{node} is not ready after {WAIT} s"
            time.sleep(0.01)
        self.address = json.loads(info.read_text())

    @property
    def endpoint(self) -> dict[str, Any]:
        return {"host": self.address["host"], "port": self.address["port"]}

    def client(self, timeout: float = WAIT) -> KeeperClient:
        return KeeperClient(self.address["host"], self.address["port"], TOKEN, timeout)

    def call(self, op: str, **args: Any) -> dict[str, Any]:
        with self.client() as client:
            return client.call(op, **args)

    def inventory(self) -> Inventory:
        return Inventory.from_json(self.call("inventory"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WAIT)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def cpu_seconds(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Cluster:
    """Nodes with a keeper each; seat i is taken by ``nodes[i]``."""

    def __init__(self, base: Path, seats: int, procs: int = 1, program: Sequence[str] = PLAIN) -> None:
        self.base, self.procs, self.program = base, procs, program
        self.nodes = [KeeperProcess(base, f"node-{seat}", program=program) for seat in range(seats)]
        self.started = list(self.nodes)

    def replace(self, seat: int) -> KeeperProcess:
        """Lose the seat's node with its memory; an empty one takes the seat."""
        lost = self.nodes[seat]
        lost.kill()
        shutil.rmtree(lost.dir)
        return self.start(seat, f"node-{len(self.started)}")

    def restart(self, seat: int) -> KeeperProcess:
        """Kill the keeper alone and start it anew."""
        self.nodes[seat].kill()
        return self.start(seat, self.nodes[seat].node)

    def start(self, seat: int, node: str) -> KeeperProcess:
        self.nodes[seat] = KeeperProcess(self.base, node, program=self.program)
        self.started.append(self.nodes[seat])
        return self.nodes[seat]

    def shard_path(self, seat: int, local_rank: int = 0, slot: int = 0) -> Path:
        return self.nodes[seat].dir / f"slot-{local_rank}-{slot}.img"

    def parity_path(self, seat: int, local_rank: int = 0, slot: int = 0) -> Path:
        return self.nodes[seat].dir / f"parity-{local_rank}-{slot}.img"

    def write_shards(self, generation: Generation, nbytes: Sequence[int], slot: int = 0) -> dict[int, list[int]]:
        """Write every rank's image, of ``nbytes[seat]`` data bytes; gives image lengths by local rank."""
        lengths: dict[int, list[int]] = {}
        for local_rank in range(self.procs):
            paths = [self.shard_path(seat, local_rank, slot) for seat in range(len(self.nodes))]
            lengths[local_rank] = [
                write_shard(path, seat, local_rank, generation, nbytes[seat], self.procs, self.procs * len(self.nodes))
                for seat, path in enumerate(paths)
            ]
        return lengths

    def encode_args(
        self, generation: Generation, lengths: dict[int, list[int]], parity: int, slot: int = 0, **more: Any
    ) -> dict[str, Any]:
        group = {"seats": list(range(len(self.nodes))), "parity": parity, "lengths": lengths}
        peers = [node.endpoint for node in self.nodes]
        return {**identity(), "generation": str(generation), "slot": slot, "group": group, "peers": peers, **more}

    def encode(self, args: dict[str, Any]) -> list[dict[str, Any] | Exception]:
        """Let all encode at once; the replies, or errors, by seat."""
        return in_parallel(len(self.nodes), lambda seat: self.nodes[seat].call("encode", index=seat, **args))

    def plan(self) -> RestorePlan | None:
        inventories = [node.inventory() for node in self.nodes]
        return plan_restore(inventories, {seat: node.node for seat, node in enumerate(self.nodes)}, self.procs)

    def rebuild(self, plan: RestorePlan, restore: RankRestore, attempt: Attempt = ATTEMPT) -> dict[str, Any]:
        """Execute one rank's part of a plan."""
        peers = {node.node: [node.address["host"], node.address["port"]] for node in self.nodes}
        request = {"generation": str(plan.generation), "restore": restore.to_json(), "peers": peers}
        return self.nodes[restore.seat].call("rebuild", **identity(attempt), **request)

    def rebuild_all(self, plan: RestorePlan) -> None:
        for reply in in_parallel(len(plan.ranks), lambda rank: self.rebuild(plan, plan.ranks[rank])):
            assert not isinstance(reply, Exception), reply


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what no event tells of; ``what`` is said when it does not come."""
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.005)


def in_parallel(count: int, work: Any) -> list[Any]:
    """``work(0..count-1)`` in threads; results or the exceptions raised."""
    results: list[Any] = [TimeoutError("still running")] * count

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except Exception as error:  # noqa: BLE001
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT * 2)
    return results


def write_shard(
    path: Path,
    seat: int,
    local_rank: int,
    generation: Generation,
    nbytes: int,
    procs: int = 1,
    world: int | None = None,
    seed: int = 0,
) -> int:
    """Write a sealed image of random data, as a rank would; gives its length. ``world`` None: its header says none."""
    meta = {"kind": "shard", "seat": str(seat), "local_rank": str(local_rank)}
    meta |= {"rank": str(seat * procs + local_rank)} | ({} if world is None else {"world": str(world)})
    image = ImageFile.create(path, plan_layout([Entry("weights", "U8", (nbytes,), nbytes)], meta))
    image.begin(generation)
    random = np.random.default_rng([seat, local_rank, generation.step, seed])
    image.entry_view("weights")[:] = random.bytes(nbytes)
    image.seal(block_checksums(image.view(0, image.layout.trailer_offset)))
    image.close()
    return image.layout.total_bytes


def flip(path: Path, offset: int, count: int = 64) -> None:
    """Corrupt bytes of a file; a negative offset counts from its end."""
    with path.open("r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        old = file.read(count)
        file.seek(-len(old), os.SEEK_CUR)
        file.write(bytes(byte ^ 0xFF for byte in old))


@contextmanager
def cluster(seats: int, procs: int = 1, program: Sequence[str] = PLAIN) -> Iterator[Cluster]:
    """A cluster of ``seats`` nodes; afterwards no process and no file of it is left."""
    base = Path(tempfile.mkdtemp(prefix="outlast-test-", dir="/dev/shm"))
    made = Cluster(base, seats, procs, program)
    try:
        yield made
    finally:
        for keeper in made.started:
            if keeper.process.poll() is None:
                keeper.signal(signal.SIGCONT)
                keeper.kill()
        shutil.rmtree(base)
