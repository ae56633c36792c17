"""How much longer training steps are while a checkpoint is uploaded, all the time.

Four FSDP2 ranks train; real keepers upload their images to a real S3 server over HTTP, without a bandwidth limit (which
is the default), one upload after the other. Blocks of steps take turns: nothing beside them, uploads, and, to tell what
is the upload's from what is the machine's, a loop that does nothing but keep a core busy.

    --cores one    ranks share core 0; keepers, the S3 server and the busy loop have core 1: one core's worth is spare
    --cores both   ranks, keepers, server and loop share all cores: nothing is spare, and the server's own processor time,
                   which a job does not pay elsewhere, comes on top of the keepers'

Ratios are medians over rounds, each round's own steps against its own. Target: 3% with one core spare.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pathlib
import statistics
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import psutil
import raw_s3
from ranks import Ranks, started
from spent import spending
from uploads import WORLD, Checkpoints

from outlast.snapshot.identity import Generation
from support.keepers import ATTEMPT, DURABLE, Cluster, cluster

TARGET = 0.03
GENERATION = Generation.of(ATTEMPT, 1)
SERVERS = ("versitygw",)


def put_on(cores: Collection[int], pids: Collection[int]) -> None:
    """Processes and all their threads."""
    for pid in pids:
        for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), cores)


def servers() -> list[int]:
    """The S3 server, where it is a process of its own."""
    return [child.pid for child in psutil.Process().children() if child.name() in SERVERS]


class Uploading:
    """Uploads one after the other for as long as a block lasts."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self.done = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        over = threading.Event()
        first = threading.Event()

        def go_on() -> None:
            while not over.is_set():
                first.set()
                self._checkpoints.upload(GENERATION)
                self.done += 1

        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            first.wait()
            yield
        finally:
            over.set()
            thread.join()


def burn(cores: Collection[int]) -> None:
    os.sched_setaffinity(0, cores)
    while True:
        pass


@contextmanager
def burning(cores: Collection[int]) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=burn, args=(cores,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def measure(cores: str, rounds: int, steps: int, width: int) -> None:
    every = os.sched_getaffinity(0)
    train, beside = ({min(every)}, {max(every)}) if cores == "one" else (every, every)
    os.sched_setaffinity(0, beside)
    with ExitStack() as stack:
        bucket = stack.enter_context(raw_s3.server())
        gateways = servers()
        put_on(beside, gateways)
        nodes = stack.enter_context(cluster(WORLD, program=DURABLE))
        ranks = stack.enter_context(started(WORLD, width, train))
        size = sum(ranks.ask("snapshot", str(GENERATION), each=[str(node.dir) for node in nodes.nodes]))
        uploading = Uploading(Checkpoints(nodes, f"s3://{bucket}/default/bench"))
        with uploading():
            ranks.ask("train", 1)
        uploading.done, spent = 0, Accounts(nodes, gateways)
        beside_them: dict[str, Callable[[], AbstractContextManager[None]]] = {
            "nothing": nullcontext,
            "uploads": lambda: spent.of(uploading()),
            "a busy loop": lambda: burning(beside),
        }
        lengths = turns(ranks, beside_them, rounds, steps)
    print(f"{size / 1e6:.0f} MB of state on {WORLD} ranks, {rounds} rounds of {steps} steps each way, {uploading.done} "
          f"whole uploads, load {os.getloadavg()[0]:.1f}\nkeepers took {spent.keepers_s / uploading.done / size * 1e9:.2f} "
          f"core-seconds a GB, the S3 server {spent.server_s / uploading.done / size * 1e9:.2f}\n")  # fmt: skip
    show(lengths, cores)


class Accounts:
    """Core-seconds of keepers and server while blocks last."""

    def __init__(self, nodes: Cluster, gateways: Collection[int]) -> None:
        self._keepers, self._gateways = [node.process.pid for node in nodes.nodes], gateways
        self.keepers_s = self.server_s = 0.0

    @contextmanager
    def of(self, block: AbstractContextManager[None]) -> Iterator[None]:
        with spending(self._keepers) as keepers, spending(self._gateways) as server, block:
            yield
        self.keepers_s += keepers.cpu_s
        self.server_s += server.cpu_s


def turns(
    ranks: Ranks, ways: dict[str, Callable[[], AbstractContextManager[None]]], rounds: int, steps: int
) -> dict[str, list[float]]:
    """The mean step of each round, by what was beside it."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with ways[name]():
                lengths = ranks.ask("train", steps)
            found[name].append(statistics.mean(length for rank in lengths for length in rank))
    return found


def show(lengths: dict[str, list[float]], cores: str) -> None:
    print("| beside training | step, median (s) | longer by, median | quartiles |\n|---|---|---|---|")
    for name, each in lengths.items():
        longer = [a / b - 1 for a, b in zip(each, lengths["nothing"], strict=True)]
        low, _, high = statistics.quantiles(longer, n=4)
        middle = statistics.median(longer)
        print(f"| {name} | {statistics.median(each):.3f} | {middle:+.1%} | {low:+.1%}, {high:+.1%} |")
        if name == "uploads" and cores == "one":
            verdict = f"\ntarget with one core spare: <= {TARGET:+.0%} ({'met' if middle <= TARGET else 'missed'})"
    if cores == "one":
        print(verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", choices=["one", "both"], default="one")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="in each block of a round")
    parser.add_argument("--width", type=int, default=584, help="of the model: 584 is 393 MB of state")
    args = parser.parse_args()
    measure(args.cores, args.rounds, args.steps, args.width)


if __name__ == "__main__":
    main()
