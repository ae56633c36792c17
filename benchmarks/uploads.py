"""Checkpoints of a sharded model: keepers' uploads against raw boto3, and the whole way against DCP's ``async_save``.

Four FSDP2 ranks with their images in memory and a real keeper each. "raw": what one would write by hand with boto3, a
process for each image, the same parts (``raw_s3.py``). "async_save": DCP's, of the same state, to the same bucket, with
AWS's ``S3StorageWriter`` (s3torchconnector; if it is not installed DCP is left out) or, with ``--to folder``, to the
same file system with torch's ``FileSystemWriter``. s3fs, and with it DCP's FsspecWriter for S3, does not install beside
the boto3 that constraints.txt pins.

"whole": from the call to the moment in which a reader would find the checkpoint: for outlast the copy into the image,
the keepers' uploads, and the commit; for DCP its staging, its writes and its metadata. Ways take turns, in another order
each round, with a sync before each.
Target: the keepers' uploads at least 85% of raw.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import raw_s3
from ranks import Ranks, started
from spent import Spent, spending

from outlast.checkpoint.archive import Archive
from outlast.checkpoint.line import Retention
from outlast.checkpoint.manifest import ClaimMark, JobMark, Manifest, rfc3339
from outlast.checkpoint.store import open_store
from outlast.snapshot.identity import Generation
from outlast.snapshot.stored import StoredImage
from support.keepers import ATTEMPT, DURABLE, Cluster, cluster, identity, in_parallel

WORLD = 4
TARGET = 0.85


class Checkpoints:
    """What controller and keepers do for a checkpoint of a generation."""

    def __init__(self, nodes: Cluster, url: str) -> None:
        self._nodes, self._url = nodes, url
        self._archive = Archive(open_store(url))
        self._mark, self._claim = JobMark("default", "bench", "bench"), ClaimMark(1, ATTEMPT.incarnation, "bench")
        self._archive.claim(self._mark, self._claim, None)

    def upload(self, generation: Generation) -> tuple[StoredImage, ...]:
        def one(seat: int) -> list[StoredImage]:
            args = {**identity(), "generation": str(generation), "seat": seat, "url": self._url, "procs": 1}
            with self._nodes.nodes[seat].client(300) as client:
                return [StoredImage.from_json(image) for image in client.call("upload", **args)["images"]]

        found = in_parallel(WORLD, one)
        for failed in (each for each in found if isinstance(each, Exception)):
            raise failed
        return tuple(image for images in found for image in images)

    def commit(self, generation: Generation, images: tuple[StoredImage, ...]) -> None:
        created = rfc3339(time.time())
        manifest = Manifest(self._mark, generation, generation.step, WORLD, 1, created, images, {})
        self._archive.commit(manifest, self._claim)

    def expire(self) -> None:
        """Let all but the newest go."""
        self._archive.expire(Retention(keep_last=1), self._claim)


class Ways:
    """Each method stores the state once, and gives seconds by what took them."""

    def __init__(self, nodes: Cluster, ranks: Ranks, checkpoints: Checkpoints, dcp_url: str) -> None:
        self._nodes, self._ranks, self._checkpoints, self._dcp_url = nodes, ranks, checkpoints, dcp_url
        self._folders = [str(node.dir) for node in nodes.nodes]
        self._step = 0
        self.state_bytes = 0
        self.snapshot()

    @property
    def images(self) -> list[pathlib.Path]:
        return [self._nodes.shard_path(seat) for seat in range(WORLD)]

    def snapshot(self) -> Generation:
        self._step += 1
        generation = Generation.of(ATTEMPT, self._step)
        self.state_bytes = sum(self._ranks.ask("snapshot", str(generation), each=self._folders))
        return generation

    def outlast(self) -> dict[str, Spent]:
        keepers = [node.process.pid for node in self._nodes.nodes]
        with spending([*keepers, *self._ranks.pids, os.getpid()]) as whole:
            generation = self.snapshot()
            with spending(keepers) as uploads:
                images = self._checkpoints.upload(generation)
            self._checkpoints.commit(generation, images)
        self._checkpoints.expire()
        return {"keepers' upload": uploads, "outlast, whole": whole}

    def dcp(self) -> dict[str, Spent]:
        with spending(self._ranks.pids) as whole:
            returned = max(returned for returned, _ in self._ranks.ask("dcp", self._dcp_url))
        return {"async_save until it returned": Spent(returned, math.nan), "async_save, whole": whole}


@contextmanager
def places(to: str, stack: ExitStack) -> Iterator[tuple[str, str, str]]:
    """(url of outlast's job, url for DCP, bucket or "")."""
    if to == "s3":
        bucket = stack.enter_context(raw_s3.server())
        yield f"s3://{bucket}/default/bench", f"s3://{bucket}/dcp/", bucket
    else:
        with tempfile.TemporaryDirectory(prefix="outlast-bench-") as folder:
            yield f"file://{folder}/default/bench", f"file://{folder}/dcp", ""


def has_dcp_writer() -> bool:
    try:
        import s3torchconnector.dcp  # noqa: F401
    except ImportError:
        print("DCP is left out: pip install 's3torchconnector[dcp]'", end="; ")
        return False
    return True


def measure(rounds: int, width: int, to: str) -> tuple[dict[str, list[Spent]], int]:
    found: dict[str, list[Spent]] = {}
    with ExitStack() as stack:
        url, dcp_url, bucket = stack.enter_context(places(to, stack))
        nodes = stack.enter_context(cluster(WORLD, program=DURABLE))
        ranks = stack.enter_context(started(WORLD, width))
        ways = Ways(nodes, ranks, Checkpoints(nodes, url), dcp_url)
        acts: list[Callable[[], dict[str, Spent]]] = [ways.outlast]
        if bucket:
            transfers = raw_s3.Transfers(WORLD)
            stack.callback(transfers.close)
            acts.append(lambda: raw(transfers, bucket, ways.images))
        if not bucket or has_dcp_writer():
            acts.append(ways.dcp)
        for number in range(rounds + 1):
            for act in acts[number % len(acts) :] + acts[: number % len(acts)]:
                os.sync()
                for what, took in act().items():
                    if number:
                        found.setdefault(what, []).append(took)
    return found, ways.state_bytes


def raw(transfers: raw_s3.Transfers, bucket: str, images: list[pathlib.Path]) -> dict[str, Spent]:
    with spending(transfers.pids) as uploads:
        transfers.upload(bucket, images)
    return {"raw boto3": uploads}


def faster(base: list[Spent], mine: list[Spent]) -> float:
    """The rate of ``mine`` over that of ``base``, median of rounds."""
    return statistics.median(a.wall_s / b.wall_s for a, b in zip(base, mine, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--width", type=int, default=584, help="of the model: 584 is 393 MB of state, 98 MB a rank")
    parser.add_argument("--to", choices=["s3", "folder"], default="s3")
    args = parser.parse_args()
    times, size = measure(args.rounds, args.width, args.to)
    print(f"{size / 1e6:.0f} MB of state on {WORLD} ranks, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
    print("| what | s, median | each round | MB/s | core-s/GB |\n|---|---|---|---|---|")
    for what, each in times.items():
        middle = statistics.median(spent.wall_s for spent in each)
        cores = statistics.median(spent.cpu_s for spent in each) / size * 1e9
        shown = ", ".join(f"{spent.wall_s:.2f}" for spent in each)
        print(f"| {what} | {middle:.2f} | {shown} | {size / 1e6 / middle:.0f} | {cores:.2f} |".replace("nan", ""))
    print()
    if "raw boto3" in times:
        share = faster(times["raw boto3"], times["keepers' upload"])
        verdict = "met" if share >= TARGET else "missed"
        print(f"keepers' upload: {share:.0%} of raw boto3's rate, median of rounds (target >= {TARGET:.0%}: {verdict})")
    if "async_save, whole" in times:
        print(
            f"whole: {faster(times['async_save, whole'], times['outlast, whole']):.2f} times async_save's rate, median of rounds"
        )


if __name__ == "__main__":
    main()
