"""How much memory a keeper takes for an upload: a real one, an image of 1 GiB on tmpfs, a real S3 server.

Sampled all the while: the keeper's anonymous memory (RssAnon: what is its own, so without the image, which is a file
that it maps), and the memory that the machine's TCP sockets hold (both ends, on this machine). "extra" is the highest
value less that before the first upload: boto3, which is imported for that one, is part of it.
Target: 64 MiB a node.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
import threading
import time

import raw_s3

from outlast.snapshot.identity import Generation
from support.keepers import ATTEMPT, DURABLE, Cluster, cluster, identity, write_shard

TARGET = 64 << 20
EVERY_S = 0.005
ROLLUP_EVERY = 20
"""smaps_rollup walks all pages, the image's too: it is read every so many samples, to check."""


class Sampler:
    """The highest of each figure, in bytes, for as long as the block lasts."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stopped = pid, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.samples = 0
        self.most: dict[str, int] = {}

    def __enter__(self) -> Sampler:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(EVERY_S):
            self._look()

    def _look(self) -> None:
        found = {**proc(self._pid, "status", "RssAnon"), "TCP": tcp_bytes()}
        if self.samples % ROLLUP_EVERY == 0:
            found |= proc(self._pid, "smaps_rollup", "Pss_Anon")
        self.samples += 1
        for name, value in found.items():
            self.most[name] = max(value, self.most.get(name, 0))


def proc(pid: int, file: str, name: str) -> dict[str, int]:
    found = re.search(rf"^{name}:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    assert found, f"/proc/{pid}/{file} has no {name}"
    return {name: int(found[1]) << 10}


def tcp_bytes() -> int:
    """The memory of all TCP sockets of this network namespace's machine."""
    found = re.search(r"^TCP:.* mem (\d+)", pathlib.Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    assert found, "/proc/net/sockstat says nothing of TCP"
    return int(found[1]) * os.sysconf("SC_PAGE_SIZE")


def upload(nodes: Cluster, url: str, generation: Generation) -> float:
    began = time.perf_counter()
    args = {**identity(), "generation": str(generation), "seat": 0, "url": url, "procs": 1}
    with nodes.nodes[0].client(300) as client:
        client.call("upload", **args)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="of the image")
    parser.add_argument("--uploads", type=int, default=3, help="one after the other by the same keeper")
    args = parser.parse_args()
    with raw_s3.server() as bucket, cluster(1, program=DURABLE) as nodes:
        generation = Generation.of(ATTEMPT, 1)
        length = write_shard(nodes.shard_path(0), 0, 0, generation, args.mib << 20)
        nodes.nodes[0].inventory()  # as at every restart: whatever that takes is not the upload's
        pid = nodes.nodes[0].process.pid
        with Sampler(pid) as before:
            time.sleep(0.5)
        print(f"an image of {length >> 20} MiB, load {os.getloadavg()[0]:.1f}\n")
        print(
            "| upload | MiB/s | RssAnon at most (MiB) | extra (MiB) | extra of Pss_Anon (MiB) | all TCP sockets (MiB) | samples |"
        )
        print("|---|---|---|---|---|---|---|")
        print(
            f"| before | | {before.most['RssAnon'] / 2**20:.1f} | | | {before.most['TCP'] / 2**20:.1f} | {before.samples} |"
        )
        worst = 0
        for number in range(args.uploads):
            with Sampler(pid) as during:
                took = upload(nodes, f"s3://{bucket}/default/bench", generation)
            extra, pss = (during.most[name] - before.most[name] for name in ("RssAnon", "Pss_Anon"))
            worst = max(worst, extra, pss)
            print(f"| {number + 1} | {(length >> 20) / took:.0f} | {during.most['RssAnon'] / 2**20:.1f} | {extra / 2**20:.1f} "
                  f"| {pss / 2**20:.1f} | {during.most['TCP'] / 2**20:.1f} | {during.samples} |", flush=True)  # fmt: skip
    print(
        f"\nat most {worst / 2**20:.1f} MiB more (target <= {TARGET >> 20}: {'met' if worst <= TARGET else 'missed'})"
    )
    sys.exit(worst > TARGET)


if __name__ == "__main__":
    main()
