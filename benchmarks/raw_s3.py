"""What one would write by hand with boto3: files to S3 and back in parallel parts, a process for each file.

The baseline of the object tier's benchmarks, and the server that they run against: the lab's (kubelab), else moto's,
which is slower than either side.
"""

from __future__ import annotations

import mmap
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import boto3
from botocore.config import Config

from outlast.checkpoint.store import PARALLEL, PART_BYTES
from support import stores


@contextmanager
def server() -> Iterator[str]:
    """A new bucket at a server of our own, to which the environment leads meanwhile; prints which it is."""
    lab = stores.lab_assets() is not None
    with stores.s3() as variables, stores.environment(variables):
        print("S3 server: the lab's" if lab else "S3 server: moto's", end="; ")
        yield stores.new_bucket()


def client() -> Any:
    config = Config(
        s3={"addressing_style": "path"}, max_pool_connections=16, request_checksum_calculation="when_required"
    )
    return boto3.session.Session().client("s3", config=config)


def upload(s3: Any, bucket: str, key: str, data: memoryview) -> None:
    started = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    where = {"Bucket": bucket, "Key": key, "UploadId": started}

    def send(number: int) -> dict[str, object]:
        body = bytes(data[(number - 1) * PART_BYTES : number * PART_BYTES])
        return {"PartNumber": number, "ETag": s3.upload_part(**where, PartNumber=number, Body=body)["ETag"]}

    with ThreadPoolExecutor(PARALLEL) as pool:
        parts = list(pool.map(send, range(1, -(-len(data) // PART_BYTES) + 1)))
    s3.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})


def download(s3: Any, bucket: str, key: str, target: memoryview) -> None:
    def fetch(at: int) -> None:
        stop = min(at + PART_BYTES, len(target))
        target[at:stop] = s3.get_object(Bucket=bucket, Key=key, Range=f"bytes={at}-{stop - 1}")["Body"].read()

    with ThreadPoolExecutor(PARALLEL) as pool:
        list(pool.map(fetch, range(0, len(target), PART_BYTES)))


_mine: Any = None


def _begin() -> None:
    global _mine
    _mine = client()


def _upload_file(bucket: str, key: str, path: pathlib.Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data, memoryview(data) as view:
        upload(_mine, bucket, key, view)
    return os.getpid()


def _download_file(bucket: str, key: str, path: pathlib.Path, size: int) -> None:
    """Into a new file, as a restore does."""
    with path.open("w+b") as file:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as data, memoryview(data) as view:
            download(_mine, bucket, key, view)


class Transfers:
    """A process for each of ``files``, all at once. Give the same files every time: the processes are kept."""

    def __init__(self, files: int) -> None:
        self._pool = ProcessPoolExecutor(files, get_context("spawn"), _begin)
        self.pids: set[int] = set()

    def upload(self, bucket: str, files: Sequence[pathlib.Path]) -> None:
        """Each as ``raw-0``, ``raw-1``, ..."""
        keys = [f"raw-{n}" for n in range(len(files))]
        self.pids.update(self._pool.map(_upload_file, [bucket] * len(files), keys, files))

    def download(self, bucket: str, files: Sequence[pathlib.Path], sizes: Sequence[int]) -> None:
        keys = [f"raw-{n}" for n in range(len(files))]
        list(self._pool.map(_download_file, [bucket] * len(files), keys, files, sizes))

    def close(self) -> None:
        self._pool.shutdown()
