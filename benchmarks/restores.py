"""How fast a job gets its state back: from the store against raw boto3, and onto another number of ranks.

Four FSDP2 ranks take a snapshot; real keepers hold it with parity 2 and upload it. Then, in turns, each node by node and
rank by rank as the agents do it (the plan of ``plan_restore``, keepers that rebuild, ranks that load):

    from the store    all memory is lost. 4 ranks: keepers fetch whole images, ranks load them; 3 or 2 ranks: each reads
                      the ranges that it needs. Beside them raw boto3 (``raw_s3.py``): a process for each image into a
                      new file on tmpfs.
    from memory       1 or 2 of 4 nodes are lost. 4 ranks: replacements decode the lost images; 3 or 2 ranks: these are
                      decoded as guests, then each reads what it needs from the keepers.

What ranks have afterwards is compared with what was saved, in the first round, which is not counted. Ratios are medians
of each round's.
Targets: keepers' fetches at least 80% of raw boto3's rate; another number of ranks at most 1.5 times the same one's time.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import raw_s3
from ranks import Ranks, started
from spent import Spent, spending
from uploads import Checkpoints

from outlast import messages as m
from outlast.agent.rank_messages import restore_message
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import GUEST_SLOT, RankRestore, RestorePlan
from outlast.snapshot.restore import plan_restore
from outlast.snapshot.stored import StoredCheckpoint
from support.keepers import ATTEMPT, TOKEN, Cluster, KeeperProcess, cluster, identity, in_parallel

HERE = pathlib.Path(__file__).resolve().parent
WORLD = 4
PRELOADED = ("preloaded_keeper",)
PARITY = 2
RATE_TARGET, TIME_TARGET = 0.80, 1.5
GENERATION = Generation.of(ATTEMPT, 1)


@dataclass(frozen=True)
class Trial:
    """``ranks`` of them restore after ``lost`` of the four nodes are gone with their memory."""

    ranks: int
    lost: int

    @property
    def source(self) -> str:
        return "the store" if self.lost == WORLD else f"memory, {self.lost} of {WORLD} nodes lost"


@dataclass
class Took:
    """Of each round: keepers' rebuilds, then ranks' loading; core-seconds of keepers and ranks."""

    rebuild: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def whole(self) -> list[float]:
        return [a + b for a, b in zip(self.rebuild, self.load, strict=True)]

    def add(self, rebuild: Spent, load: Spent) -> None:
        self.rebuild.append(rebuild.wall_s)
        self.load.append(load.wall_s)
        self.cpu.append(rebuild.cpu_s + load.cpu_s)


class Restores:
    """The nodes with the snapshot, its checkpoint, and ranks of each world to load it."""

    def __init__(self, nodes: Cluster, ranks: Mapping[int, Ranks], checkpoint: StoredCheckpoint) -> None:
        self._nodes, self._ranks, self._checkpoint = nodes, ranks, checkpoint
        self._saved = list(nodes.nodes)

    def run(self, trial: Trial) -> tuple[Spent, Spent]:
        survivors = self._saved[: WORLD - trial.lost]
        with self._seated(survivors, trial.ranks) as seated:
            seats = {seat: node.node for seat, node in enumerate(seated)}
            stored = [self._checkpoint] if trial.lost == WORLD else []
            plan = plan_restore([node.inventory() for node in seated], seats, 1, stored)
            assert plan is not None
            assert plan.direct == (trial.ranks != WORLD)
            messages = [restore_message(n.node, n.dir, start_of(n, s, seated, plan), {}) for s, n in enumerate(seated)]
            keepers, ranks = [node.process.pid for node in seated], self._ranks[trial.ranks]
            with spending(keepers) as rebuilding:
                rebuild(plan, seated)
            with spending([*keepers, *ranks.pids]) as loading:
                ranks.ask("restore", each=messages)
            return rebuilding, loading

    @contextmanager
    def _seated(self, survivors: Sequence[KeeperProcess], count: int) -> Iterator[list[KeeperProcess]]:
        """The nodes that have a seat: survivors, then empty ones. What is put there is removed afterwards."""
        fresh = []
        for _ in range(count - len(survivors)):
            self._nodes.started.append(
                KeeperProcess(self._nodes.base, f"node-{len(self._nodes.started)}", program=PRELOADED)
            )
            fresh.append(self._nodes.started[-1])
        try:
            yield [*survivors, *fresh]
        finally:
            for node in fresh:
                node.kill()
                shutil.rmtree(node.dir)
            for path in (path for node in survivors for path in node.dir.glob("slot-*.img")):
                if int(path.stem.rsplit("-", 1)[1]) >= GUEST_SLOT:
                    path.unlink()


def start_of(node: KeeperProcess, seat: int, seated: Sequence[KeeperProcess], plan: RestorePlan) -> m.Start:
    peers = {n: (each.address["host"], each.address["port"]) for n, each in enumerate(seated)}
    keepers = {each.node: peers[n] for n, each in enumerate(seated)}
    return m.Start(node.node, ATTEMPT, seat, len(seated), 1, "127.0.0.1", 0, plan, peers, keepers, 1)


def rebuild(plan: RestorePlan, seated: Sequence[KeeperProcess]) -> None:
    """Have keepers make what is lacking, all at once; the rule is the agents' (``keeper_calls``)."""
    peers = {node.node: [node.address["host"], node.address["port"]] for node in seated}
    by_name = {node.node: node for node in seated}
    made = ("memory-decode",) if plan.direct else ("memory-decode", "memory-peer", "object")
    lacking = [restore for restore in plan.ranks if restore.source in made]

    def one(restore: RankRestore) -> None:
        request = {"generation": str(plan.generation), "restore": restore.to_json(), "peers": peers}
        by_name[restore.node].call("rebuild", **identity(), **request)

    for failed in (each for each in in_parallel(len(lacking), lambda n: one(lacking[n])) if each is not None):
        raise failed


def prepare(nodes: Cluster, ranks: Ranks, url: str) -> StoredCheckpoint:
    """Take the snapshot, protect it, and make a checkpoint of it."""
    ranks.ask("snapshot", str(GENERATION), each=[str(node.dir) for node in nodes.nodes])
    lengths = {0: [nodes.shard_path(seat).stat().st_size for seat in range(WORLD)]}
    for reply in nodes.encode(nodes.encode_args(GENERATION, lengths, PARITY)):
        assert isinstance(reply, dict), reply
    checkpoints = Checkpoints(nodes, url)
    images = checkpoints.upload(GENERATION)
    checkpoints.commit(GENERATION, images)
    return StoredCheckpoint(GENERATION, url, WORLD, 1, images)


def raw_download(transfers: raw_s3.Transfers, bucket: str, sizes: Sequence[int]) -> Spent:
    with tempfile.TemporaryDirectory(prefix="outlast-bench-", dir="/dev/shm") as folder:
        files = [pathlib.Path(folder) / f"image-{n}" for n in range(len(sizes))]
        with spending(transfers.pids) as spent:
            transfers.download(bucket, files, sizes)
        return spent


def measure(rounds: int, width: int) -> tuple[dict[Trial, Took], Took, int]:
    trials = [Trial(4, 4), Trial(3, 4), Trial(2, 4), Trial(4, 1), Trial(3, 1), Trial(4, 2), Trial(2, 2)]
    took, raw = {trial: Took() for trial in trials}, Took()
    with ExitStack() as stack:
        bucket = stack.enter_context(raw_s3.server())
        nodes = stack.enter_context(cluster(WORLD, program=PRELOADED))
        token = nodes.base / "token"
        token.write_text(TOKEN)
        os.environ["OUTLAST_TOKEN_FILE"] = str(token)
        ranks = {world: stack.enter_context(started(world, width)) for world in (4, 3, 2)}
        checkpoint = prepare(nodes, ranks[WORLD], f"s3://{bucket}/default/bench")
        saved = ranks[WORLD].ask("digest")[0]
        ranks[WORLD].ask("train", 1)
        transfers = raw_s3.Transfers(WORLD)
        stack.callback(transfers.close)
        transfers.upload(bucket, [nodes.shard_path(seat) for seat in range(WORLD)])
        restores, sizes = Restores(nodes, ranks, checkpoint), [image.size for image in checkpoint.images]
        acts: list[Trial | None] = [None, *trials]
        for number in range(rounds + 1):
            for trial in acts[number % len(acts) :] + acts[: number % len(acts)]:
                found = restores.run(trial) if trial else (raw_download(transfers, bucket, sizes), Spent())
                if number:
                    (took[trial] if trial else raw).add(*found)
                elif trial:
                    assert ranks[trial.ranks].ask("digest")[0] == saved, f"{trial} gave other bits"
                    ranks[trial.ranks].ask("train", 1)
    return took, raw, sum(sizes)


def ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--width", type=int, default=832, help="of the model: 832 is 797 MB of state")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    took, raw, size = measure(args.rounds, args.width)
    print(f"{size / 1e6:.0f} MB of images, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
    print("| from | ranks | keepers (s) | ranks (s) | whole (s) | core-s | of 4 ranks' time | target |")
    print("|---|---|---|---|---|---|---|---|")
    middle = statistics.median
    print(f"| the store, raw boto3 | | {middle(raw.rebuild):.2f} | | | {middle(raw.cpu):.2f} | | |")
    missed = False
    for trial, found in took.items():
        parts = " | ".join(f"{middle(each):.2f}" for each in (found.rebuild, found.load, found.whole, found.cpu))
        line = f"| {trial.source} | 4 -> {trial.ranks} | {parts} |"
        if trial.ranks == WORLD:
            print(f"{line} 1.00 | |")
            continue
        share = ratio(found.whole, took[Trial(WORLD, trial.lost)].whole)
        missed |= share > TIME_TARGET
        print(f"{line} {share:.2f} | <= {TIME_TARGET} {'met' if share <= TIME_TARGET else 'missed'} |")
    rate = ratio(raw.rebuild, took[Trial(WORLD, WORLD)].rebuild)
    missed |= rate < RATE_TARGET
    print(f"\nkeepers' fetches of whole images, verified: {rate:.0%} of raw boto3's rate "
          f"(target >= {RATE_TARGET:.0%}: {'met' if rate >= RATE_TARGET else 'missed'})")  # fmt: skip
    sys.exit(missed)


if __name__ == "__main__":
    main()
