"""Upload and download through ``outlast.checkpoint.s3`` against raw parallel boto3, the same bytes, in one run.

Against the lab's S3 server (kubelab); else moto's, which is far slower than either side.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import raw_s3

from outlast.checkpoint.store import PARALLEL, PART_BYTES, StoreOptions, open_store


def seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with raw_s3.server() as bucket:
        store, client = open_store(f"s3://{bucket}/own", StoreOptions()), raw_s3.client()
        data = memoryview(os.urandom(args.mib << 20))
        target = memoryview(bytearray(len(data)))
        times: dict[str, list[float]] = {"raw up": [], "up": [], "raw down": [], "down": []}
        for _ in range(args.rounds):
            times["raw up"].append(seconds(lambda: raw_s3.upload(client, bucket, "raw", data)))
            times["up"].append(seconds(lambda: store.upload("image", data)))
            times["raw down"].append(seconds(lambda: raw_s3.download(client, bucket, "raw", target)))
            times["down"].append(seconds(lambda: store.read_into("image", 0, target)))
        store.close()
    middle = {name: args.mib / statistics.median(each) for name, each in times.items()}
    print(f"{args.mib} MiB in parts of {PART_BYTES >> 20} MiB, {PARALLEL} at a time, {args.rounds} rounds\n")
    print("| what | MiB/s | of raw boto3 | target |\n|---|---|---|---|")
    for name, goal in (("up", 85), ("down", 80)):
        share = middle[name] / middle[f"raw {name}"]
        verdict = "met" if share * 100 >= goal else "missed"
        print(f"| raw boto3, {name}load | {middle[f'raw {name}']:.0f} | 100% | |")
        print(f"| outlast, {name}load | {middle[name]:.0f} | {share:.0%} | >= {goal}% {verdict} |")


if __name__ == "__main__":
    main()
