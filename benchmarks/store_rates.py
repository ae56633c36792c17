"""Upload and download through ``outlast.checkpoint.s3`` against raw parallel boto3, the same bytes, in one run.

Needs the lab's S3 server (kubelab) and root; else moto's server, which is far slower than either side.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import boto3
from botocore.config import Config

from outlast.checkpoint.store import PARALLEL, PART_BYTES, StoreOptions, open_store
from support.stores import environment, lab, lab_s3, moto_s3, new_bucket


def raw_client() -> object:
    config = Config(
        s3={"addressing_style": "path"}, max_pool_connections=16, request_checksum_calculation="when_required"
    )
    return boto3.session.Session().client("s3", config=config)


def raw_upload(client: object, bucket: str, data: memoryview) -> None:
    """What one would write by hand: parts in a pool of threads."""
    started = client.create_multipart_upload(Bucket=bucket, Key="raw")["UploadId"]  # type: ignore[attr-defined]

    def send(number: int) -> dict[str, object]:
        body = bytes(data[(number - 1) * PART_BYTES : number * PART_BYTES])
        where = {"Bucket": bucket, "Key": "raw", "UploadId": started}
        return {"PartNumber": number, "ETag": client.upload_part(**where, PartNumber=number, Body=body)["ETag"]}  # type: ignore[attr-defined]

    with ThreadPoolExecutor(PARALLEL) as pool:
        parts = list(pool.map(send, range(1, 1 + -(-len(data) // PART_BYTES))))
    client.complete_multipart_upload(Bucket=bucket, Key="raw", UploadId=started, MultipartUpload={"Parts": parts})  # type: ignore[attr-defined]


def raw_download(client: object, bucket: str, target: memoryview) -> None:
    def fetch(at: int) -> None:
        stop = min(at + PART_BYTES, len(target))
        body = client.get_object(Bucket=bucket, Key="raw", Range=f"bytes={at}-{stop - 1}")["Body"]  # type: ignore[attr-defined]
        target[at:stop] = body.read()

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(fetch, range(0, len(target), PART_BYTES)))


def seconds(act: Callable[[], None]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    kind = lab_s3 if lab() and os.geteuid() == 0 else moto_s3
    with kind() as variables, environment(variables):
        bucket = new_bucket()
        store, client = open_store(f"s3://{bucket}/own", StoreOptions()), raw_client()
        data = memoryview(os.urandom(args.mib << 20))
        target = memoryview(bytearray(len(data)))
        times: dict[str, list[float]] = {"raw up": [], "up": [], "raw down": [], "down": []}
        for _ in range(args.rounds):
            times["raw up"].append(seconds(lambda: raw_upload(client, bucket, data)))
            times["up"].append(seconds(lambda: store.upload("image", data)))
            times["raw down"].append(seconds(lambda: raw_download(client, bucket, target)))
            times["down"].append(seconds(lambda: store.read_into("image", 0, target)))
        store.close()
    middle = {name: args.mib / statistics.median(each) for name, each in times.items()}
    print(
        f"{args.mib} MiB in parts of {PART_BYTES >> 20} MiB, {PARALLEL} at a time, {args.rounds} rounds, {kind.__name__}\n"
    )
    print("| what | MiB/s | of raw boto3 | target |\n|---|---|---|---|")
    for name, goal in (("up", 85), ("down", 80)):
        share = middle[name] / middle[f"raw {name}"]
        verdict = "met" if share * 100 >= goal else "missed"
        print(f"| raw boto3, {name}load | {middle[f'raw {name}']:.0f} | 100% | |")
        print(f"| outlast, {name}load | {middle[name]:.0f} | {share:.0%} | >= {goal}% {verdict} |")


if __name__ == "__main__":
    main()
