"""What AWS's Common Runtime (awscrt, through s3transfer) does with the same bytes, beside ``outlast.checkpoint.s3``.

Uploads are of an image's file on tmpfs and of a view of its mapping, downloads into a file on tmpfs and into mapped
memory: what a keeper has and wants. Interleaved, as ratios; processor time of both sides of the program is counted too.
Needs the lab's S3 server (kubelab), and awscrt: ``pip install 'outlast[crt]'``.
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import botocore.session
from awscrt.auth import AwsCredentialsProvider
from botocore.config import Config
from s3transfer.crt import (
    BotocoreCRTCredentialsWrapper,
    BotocoreCRTRequestSerializer,
    CRTTransferManager,
    create_s3_crt_client,
)

from outlast.checkpoint.store import PART_BYTES, StoreOptions, open_store
from support.stores import environment, lab_s3, new_bucket


class MemoryFile(io.RawIOBase):
    """A view as s3transfer wants its file objects."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = min(len(buffer), len(self._data) - self._at)
        buffer[:size] = self._data[self._at : self._at + size]
        self._at += size
        return size


class Sink(io.RawIOBase):
    """Memory that is filled in turn."""

    def __init__(self, target: memoryview) -> None:
        super().__init__()
        self._target, self._at = target, 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._target[self._at : self._at + len(data)] = data
        self._at += len(data)
        return len(data)


def manager(endpoint: str, region: str) -> CRTTransferManager:
    session = botocore.session.get_session()
    wrapper = BotocoreCRTCredentialsWrapper(session.get_credentials())
    client = create_s3_crt_client(
        region, crt_credentials_provider=wrapper.to_crt_credentials_provider(), use_ssl=False, part_size=PART_BYTES
    )
    style = Config(s3={"addressing_style": "path"})
    serializer = BotocoreCRTRequestSerializer(
        session, {"region_name": region, "endpoint_url": endpoint, "config": style}
    )
    assert isinstance(wrapper.to_crt_credentials_provider(), AwsCredentialsProvider)
    return CRTTransferManager(client, serializer)


def measured(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds that passed, and of this process's processor time."""
    began, busy = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with (
        lab_s3() as variables,
        environment(variables),
        tempfile.TemporaryDirectory(prefix="outlast-test-crt-", dir="/dev/shm") as memory,
    ):
        bucket, path, copy = new_bucket(), f"{memory}/image", f"{memory}/copy"
        store = open_store(f"s3://{bucket}/own", StoreOptions())
        crt = manager(variables["AWS_ENDPOINT_URL"], variables["AWS_REGION"])
        data = memoryview(os.urandom(args.mib << 20))
        pathlib.Path(path).write_bytes(data)
        target = memoryview(bytearray(len(data)))
        ways: dict[str, Callable[[], object]] = {
            "outlast, upload": lambda: store.upload("image", data),
            "CRT, upload of the file": lambda: crt.upload(path, bucket, "own/crt").result(),
            "CRT, upload of a view": lambda: crt.upload(MemoryFile(data), bucket, "own/crt").result(),
            "outlast, download": lambda: store.read_into("image", 0, target),
            "CRT, download into a file": lambda: crt.download(bucket, "own/crt", copy).result(),
            "CRT, download into memory": lambda: crt.download(bucket, "own/crt", Sink(target)).result(),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, act in ways.items():
                found[name].append(measured(act))
        crt.shutdown()
    print(f"{args.mib} MiB, parts of {PART_BYTES >> 20} MiB, {args.rounds} rounds interleaved\n")
    print("| what | MiB/s | of outlast's | processor seconds a GiB |\n|---|---|---|---|")
    rates = {name: args.mib / statistics.median(wall for wall, _ in each) for name, each in found.items()}
    for name, each in found.items():
        own = rates["outlast, upload" if "upload" in name else "outlast, download"]
        busy = statistics.median(cpu for _, cpu in each) * 1024 / args.mib
        print(f"| {name} | {rates[name]:.0f} | {rates[name] / own:.0%} | {busy:.2f} |")


if __name__ == "__main__":
    main()
