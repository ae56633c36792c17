"""``s3://bucket/prefix`` as a store, with boto3: any service that speaks S3 and has conditional writes.

Endpoint, region and credentials come from the usual chain (environment, ~/.aws, the machine's role). Addresses are
path-style at an endpoint of one's own, virtual at Amazon's, or as the configuration says. boto3's own retries are off:
everything is asked again here, part by part, so that one slow part costs one part. Bodies of parts are views of the
caller's memory. With awscrt installed botocore takes its checksums and signatures from there; the transfer itself stays
here, since CRT's own would copy a view and cannot be called off between two parts.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.session
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.loaders import Loader, create_loader

from outlast.checkpoint.memoryfile import MemoryFile
from outlast.checkpoint.pacing import Pace
from outlast.checkpoint.retrying import again
from outlast.checkpoint.s3errors import Where, is_unable, told
from outlast.checkpoint.store import ObjectInfo, StoreOptions, Unfinished
from outlast.errors import (
    CheckpointError,
    ObjectMissing,
    OutlastError,
    PreconditionFailed,
    RequestError,
    StaleAttemptError,
    StoreDenied,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")
MOST_PARTS = 10_000
_READ_PIECE = 1 << 20
_DELETE_AT_ONCE = 1000
_BEGINNINGS = 3
"""How often an upload begins that others call off."""


class S3Store:
    """A bucket and a prefix in it. Threads may share it."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        parts = urlsplit(url)
        self._url = url.rstrip("/")
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._options = options
        self._pace = Pace(options.bandwidth)
        self._made: S3Client | None = None
        with suppress(StoreUnavailable), self._told(""):  # whoever gives out credentials is asked again when in use
            self._client  # noqa: B018  # a configuration that cannot be used is told now

    @property
    def url(self) -> str:
        return self._url

    @property
    def _client(self) -> S3Client:
        """Made when it is first needed, and then kept. To be used within ``_told``, since making it can fail too."""
        if self._made is None:
            with _making:
                self._made = self._made or _new_client(self._options)
        return self._made

    def get(self, key: str) -> tuple[bytes, str]:
        def ask() -> tuple[bytes, str]:
            with self._told(key):
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key))
                return answer["Body"].read(), answer["ETag"]

        return self._again(ask)

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        condition: dict[str, Any] = {"IfMatch": if_match} if if_match is not None else {}
        condition |= {"IfNoneMatch": "*"} if if_absent else {}
        tries = 0

        def ask() -> str:
            nonlocal tries
            tries += 1
            try:
                with self._told(key, conditional=bool(condition)):
                    where = {"Bucket": self._bucket, "Key": self._key(key)}
                    return self._client.put_object(**where, Body=data, **condition)["ETag"]  # type: ignore[arg-type]
            except (PreconditionFailed, ObjectMissing) as error:
                return self._ours_after_all(key, data, error, tries)

        return self._again(ask)

    def _ours_after_all(self, key: str, data: bytes, error: OutlastError, tries: int) -> str:
        """A conditional put that was tried again may have met itself: its first answer was lost."""
        if tries > 1:
            try:
                content, etag = self.get(key)
            except ObjectMissing:
                content, etag = b"", ""
            if content == data and etag:
                return etag
        raise PreconditionFailed(str(error)) from error

    def upload(self, key: str, data: memoryview, cancelled: Callable[[], bool] = lambda: False) -> None:
        for _ in range(_BEGINNINGS):
            try:
                self._upload_once(key, data, cancelled)
                return
            except ObjectMissing as error:  # NoSuchUpload: a gc elsewhere; that says nothing of any image
                reason = error
        text = f"{reason}; the upload was called off {_BEGINNINGS} times: who runs gc with a short --grace?"
        raise StoreUnavailable(text) from reason

    def read_into(
        self, key: str, offset: int, target: memoryview, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        part = self._options.part_bytes
        pieces = [(offset + at, target[at : at + part]) for at in range(0, len(target), part)]
        work = [lambda piece=piece: self._read_part(key, piece[0], piece[1], cancelled) for piece in pieces]
        self._in_parallel(work, cancelled)

    def head(self, key: str) -> ObjectInfo:
        def ask() -> ObjectInfo:
            try:
                with self._told(key):
                    found = self._client.head_object(Bucket=self._bucket, Key=self._key(key))
                    return ObjectInfo(key, found["ContentLength"], found["ETag"], found["LastModified"].timestamp())
            except ObjectMissing:
                self._look_closer(key)

        return self._again(ask)

    def _look_closer(self, key: str) -> NoReturn:
        """Raises what a 404 means that has no body to say so: the object, the bucket or the service is missing."""
        with suppress(CheckpointError), self._told(key):  # of an empty object there is no first byte
            found = self._client.get_object(Bucket=self._bucket, Key=self._key(key), Range="bytes=0-0")
            found["Body"].close()
        raise StoreUnavailable(f"{self._url}/{key}: HEAD was answered with 404, and GET finds it")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        token: dict[str, Any] = {}
        while True:
            page = self._again(lambda token=token: self._page(prefix, token))  # type: ignore[misc]
            for found in page.get("Contents", []):
                key = found["Key"][len(self._prefix) + 1 if self._prefix else 0 :]
                yield ObjectInfo(key, found["Size"], found["ETag"], found["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, keys: Iterable[str]) -> None:
        names = [{"Key": self._key(key)} for key in keys]
        for start in range(0, len(names), _DELETE_AT_ONCE):
            some = names[start : start + _DELETE_AT_ONCE]
            if not self._again(partial(self._delete, some)):
                self._in_parallel([partial(self._delete_one, name) for name in some], lambda: False)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        def ask() -> tuple[Unfinished, ...]:
            with self._told(prefix):
                pages = self._client.get_paginator("list_multipart_uploads")
                cut = len(self._prefix) + 1 if self._prefix else 0
                return tuple(
                    Unfinished(found["Key"][cut:], found["UploadId"], found["Initiated"].timestamp())
                    for page in pages.paginate(Bucket=self._bucket, Prefix=self._listed(prefix))
                    for found in page.get("Uploads", [])
                )

        yield from self._again(ask)

    def call_off(self, upload: Unfinished) -> None:
        self._abort(upload.key, upload.token)

    def close(self) -> None:
        if self._made is not None:
            self._made.close()

    def _again(self, call: Callable[[], T], cancelled: Callable[[], bool] = lambda: False, slow: bool = False) -> T:
        return again(call, self._options.patience_s, cancelled, self._options.on_wait, slow=slow)

    def _told(self, key: str, conditional: bool = False) -> AbstractContextManager[None]:
        endpoint = self._made.meta.endpoint_url if self._made is not None else "the endpoint"
        return told(Where(f"{self._url}/{key}" if key else self._url, self._bucket, endpoint, conditional))

    # --- small things -----------------------------------------------------------------------------------------------

    def _key(self, key: str) -> str:
        if not key or key.startswith("/") or any(part in ("", ".", "..") for part in key.split("/")):
            raise RequestError(f"{key!r} is no key: parts between slashes, without . and ..")
        return f"{self._prefix}/{key}" if self._prefix else key

    def _listed(self, prefix: str) -> str:
        return f"{self._prefix}/{prefix}" if self._prefix else prefix

    def _page(self, prefix: str, token: dict[str, Any]) -> Any:
        with self._told(prefix):
            return self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._listed(prefix), **token)

    def _delete(self, names: Any) -> bool:
        """False where the service does not know how to delete many at once, or not as it is asked here."""
        with self._told("(many)"):
            try:
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": names, "Quiet": True})
            except ClientError as error:
                if is_unable(error):
                    return False
                raise
        for failed in answer.get("Errors", []):
            if failed.get("Code") in ("AccessDenied",):
                raise StoreDenied(f"{self._url}: {failed.get('Key')} may not be deleted: grant s3:DeleteObject")
            raise StoreUnavailable(f"{self._url}: {failed.get('Key')} was not deleted: {failed.get('Message')}")
        return True

    def _delete_one(self, name: Any) -> None:
        def ask() -> None:
            with suppress(ObjectMissing), self._told(name["Key"]):
                self._client.delete_object(Bucket=self._bucket, **name)

        self._again(ask)

    # --- large objects ----------------------------------------------------------------------------------------------

    def _upload_once(self, key: str, data: memoryview, cancelled: Callable[[], bool]) -> None:
        """Raises ObjectMissing when somebody else called it off."""
        part = max(self._options.part_bytes, -(-len(data) // MOST_PARTS))
        if len(data) <= part:
            self._upload_small(key, data, cancelled)
            return
        started = self._again(lambda: self._begin(key), cancelled)
        done = False
        try:
            parts = self._send_parts(key, started, data, part, cancelled)
            self._complete(key, started, parts, len(data))
            done = True
        finally:
            if not done:
                self._abort(key, started)

    def _upload_small(self, key: str, data: memoryview, cancelled: Callable[[], bool]) -> None:
        def ask() -> None:
            self._wait_for_pace(key, len(data), cancelled)
            with self._told(key):
                self._client.put_object(Bucket=self._bucket, Key=self._key(key), Body=_view(data))

        self._again(ask, cancelled, slow=True)

    def _wait_for_pace(self, key: str, nbytes: int, cancelled: Callable[[], bool]) -> None:
        if cancelled() or not self._pace.wait(nbytes, cancelled):
            raise StaleAttemptError(f"the upload of {key} was called off")

    def _begin(self, key: str) -> str:
        with self._told(key):
            return self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key(key))["UploadId"]

    def _send_parts(
        self, key: str, started: str, data: memoryview, part: int, cancelled: Callable[[], bool]
    ) -> Sequence[Any]:
        """The parts as completion wants them: number and etag."""

        def send(number: int, body: memoryview) -> Any:
            def ask() -> str:
                self._wait_for_pace(key, len(body), cancelled)
                with self._told(key):
                    where = {"Bucket": self._bucket, "Key": self._key(key), "UploadId": started}
                    return self._client.upload_part(**where, PartNumber=number, Body=_view(body))["ETag"]  # type: ignore[arg-type]

            return {"PartNumber": number, "ETag": self._again(ask, cancelled, slow=True)}

        bodies = [data[at : at + part] for at in range(0, len(data), part)]
        work = [lambda n=n, body=body: send(n, body) for n, body in enumerate(bodies, 1)]
        return self._in_parallel(work, cancelled)

    def _complete(self, key: str, started: str, parts: Sequence[Any], size: int) -> None:
        """Put the parts together; when the answer was lost, look whether it is done."""
        tries = 0

        def ask() -> None:
            nonlocal tries
            tries += 1
            try:
                with self._told(key):
                    where = {"Bucket": self._bucket, "Key": self._key(key), "UploadId": started}
                    self._client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})  # type: ignore[arg-type]
            except ObjectMissing:  # NoSuchUpload: an earlier try was heard, or somebody called it off
                if tries == 1 or self.head(key).size != size:
                    raise

        self._again(ask)

    def _abort(self, key: str, started: str) -> None:
        try:
            with self._told(key):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key(key), UploadId=started)
        except (ObjectMissing, StoreUnavailable):
            return  # what is left is listed as unfinished, and gc removes it

    def _read_part(self, key: str, offset: int, target: memoryview, cancelled: Callable[[], bool]) -> None:
        if not target:
            return

        def ask() -> None:
            with self._told(key):
                span = f"bytes={offset}-{offset + len(target) - 1}"
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(key), Range=span)
                if answer["ContentLength"] != len(target):
                    raise CheckpointError(f"{self._url}/{key} ends before {offset + len(target)}")
                self._receive(answer["Body"], key, target, cancelled)

        self._again(ask, cancelled, slow=True)

    def _receive(self, body: Any, key: str, target: memoryview, cancelled: Callable[[], bool]) -> None:
        done = 0
        while done < len(target):
            if cancelled():
                raise StaleAttemptError(f"reading {key} was called off")
            got = body.readinto(target[done : done + _READ_PIECE])
            if not got:
                raise StoreUnavailable(f"{self._url}/{key}: the connection ended after {done} bytes of {len(target)}")
            done += got

    def _in_parallel(self, work: Sequence[Callable[[], Any]], cancelled: Callable[[], bool]) -> Sequence[Any]:
        """Do all of it, some at a time; after the first failure nothing new is begun."""
        if len(work) == 1:
            return [work[0]()]
        failed = threading.Event()

        def one(call: Callable[[], Any]) -> Any:
            if failed.is_set() or cancelled():
                raise StaleAttemptError("the transfer was called off")
            try:
                return call()
            except OutlastError:
                failed.set()
                raise

        with ThreadPoolExecutor(self._options.parallel, thread_name_prefix="outlast-s3") as pool:
            futures: Sequence[Future[Any]] = [pool.submit(one, call) for call in work]
            wait(futures, return_when=FIRST_EXCEPTION)
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, StaleAttemptError)):
            raise error
        return [future.result() for future in futures]


def _view(data: memoryview) -> Any:
    """Typed as anything: the stubs know files by name only."""
    return MemoryFile(data)


_making = threading.Lock()
"""One client at a time: what they share in botocore is not made for several threads."""


@cache
def _models() -> Loader:
    """What botocore has on services, parsed once for a process: 70 ms and some MiB for each client otherwise."""
    return create_loader()


def core_session() -> botocore.session.Session:
    """A session of its own that shares what is parsed of services."""
    core = botocore.session.get_session()
    core.register_component("data_loader", _models())
    return core


def _new_client(options: StoreOptions) -> S3Client:
    """A client of its own session: sessions are not made to be shared between threads. AWS_REGION counts where nothing
    that boto3 reads names a region: it is what Amazon's own machines and other SDKs set."""
    config = Config(
        connect_timeout=min(10.0, options.timeout_s),
        read_timeout=options.timeout_s,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=2 * options.parallel + 4,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session: Session = boto3.session.Session(botocore_session=core_session())
    endpoint = session._session.get_config_variable("endpoint_url") if hasattr(session, "_session") else None
    region = session.region_name or os.environ.get("AWS_REGION")
    client = session.client("s3", region, config=config.merge(_addressing(session, endpoint)))
    client.meta.events.register("before-sign.s3.DeleteObjects", _add_md5)
    return client


def _add_md5(request: Any, **_: object) -> None:
    """The checksum of a DeleteObjects that services other than Amazon's ask for; botocore has ceased to send it."""
    body = request.data if isinstance(request.data, bytes) else str(request.data).encode()
    request.headers["Content-MD5"] = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _addressing(session: Session, endpoint: str | None) -> Config:
    """Path-style where a bucket's name cannot become a host name: at endpoints that are not Amazon's."""
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or endpoint
    chosen = (session._session.get_scoped_config().get("s3") or {}) if session.available_profiles else {}
    if isinstance(chosen, dict) and chosen.get("addressing_style"):
        return Config()
    return Config(s3={"addressing_style": "path"}) if given and "amazonaws.com" not in given else Config()
