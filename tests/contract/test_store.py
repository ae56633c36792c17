"""What every store must do, on a folder, on moto's server and on a real S3 server over HTTP."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import http.server
import io
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, cast

import pytest
from botocore import exceptions as b
from botocore.awsrequest import AWSResponse

from outlast.checkpoint import folder, s3
from outlast.checkpoint.s3errors import Where, told
from outlast.checkpoint.store import Store, StoreOptions, Unfinished, open_store
from outlast.errors import (
    CheckpointError,
    ObjectMissing,
    PreconditionFailed,
    RequestError,
    StaleAttemptError,
    StoreDenied,
    StoreUnavailable,
)
from support.mounts import small_file_system
from support.stores import Proxy, environment, lab_s3, moto_s3, new_bucket

pytestmark = pytest.mark.timeout(120)

PART = 5 << 20
"""The least that S3 takes as a part."""

KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="module", params=["folder", "moto", "s3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty store."""
    if request.param == "folder":
        yield f"file://{tmp_path_factory.mktemp('store')}"
        return
    with moto_s3() if request.param == "moto" else lab_s3() as variables, environment(variables):
        yield f"s3://{new_bucket()}"


_numbers = iter(range(10**6))


@pytest.fixture
def url(place: str) -> str:
    return f"{place}/test-{next(_numbers)}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = open_store(url, StoreOptions(part_bytes=PART, patience_s=10))
    yield opened
    opened.close()


def conditional(store: Store) -> None:
    """moto answers If-Match on puts only since some version: ask it."""
    store.put("probe", b"1")
    try:
        store.put("probe", b"2", if_match='"00000000000000000000000000000000"')
    except PreconditionFailed:
        return
    pytest.skip("this server takes no notice of If-Match")


def test_small_objects_come_back_with_their_etag(store: Store) -> None:
    etag = store.put("a/head.json", b"one")
    assert store.get("a/head.json") == (b"one", etag)
    other = store.put("a/head.json", b"two")
    assert other != etag
    assert store.get("a/head.json") == (b"two", other)
    assert store.head("a/head.json").size == 3


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 3 * PART + 17])
def test_large_objects_come_back(store: Store, size: int) -> None:
    data = os.urandom(size)
    store.upload("x/image", memoryview(data))
    target = bytearray(size)
    store.read_into("x/image", 0, memoryview(target))
    assert bytes(target) == data
    assert store.head("x/image").size == size
    store.upload("x/image", memoryview(data[: size // 2]))
    assert store.head("x/image").size == size // 2


def test_ranges(store: Store) -> None:
    data = os.urandom(2 * PART + 100)
    store.upload("x", memoryview(data))
    for offset, length in ((0, 10), (PART - 5, 10), (2 * PART, 100), (7, PART + 3), (5, 0)):
        target = bytearray(length)
        store.read_into("x", offset, memoryview(target))
        assert bytes(target) == data[offset : offset + length]
    with pytest.raises(CheckpointError):
        store.read_into("x", len(data) - 5, memoryview(bytearray(10)))


def test_lists_by_prefix_and_deletes(store: Store) -> None:
    for key in ("b/2", "a/1", "b/1", "bc"):
        store.put(key, key.encode())
    assert [found.key for found in store.list()] == ["a/1", "b/1", "b/2", "bc"]
    assert [(found.key, found.size) for found in store.list("b/")] == [("b/1", 3), ("b/2", 3)]
    assert abs(next(store.list("bc")).modified - time.time()) < 60
    store.delete(["b/1", "b/2", "nothing"])
    assert [found.key for found in store.list()] == ["a/1", "bc"]
    store.delete([])


def test_what_is_missing_is_told(store: Store) -> None:
    for ask in (
        lambda: store.get("no"),
        lambda: store.head("no"),
        lambda: store.read_into("no", 0, memoryview(bytearray(1))),
    ):
        with pytest.raises(ObjectMissing, match="no"):
            ask()
    assert list(store.list("no")) == []


@pytest.mark.parametrize("key", ["../x", "/x", "a/../../x", ""])
def test_keys_stay_below_the_url(store: Store, key: str) -> None:
    with pytest.raises(RequestError):
        store.put(key, b"")


def test_conditional_puts(store: Store) -> None:
    conditional(store)
    etag = store.put("head", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("head", b"2", if_absent=True)
    newer = store.put("head", b"2", if_match=etag)
    with pytest.raises(PreconditionFailed):
        store.put("head", b"3", if_match=etag)
    assert store.get("head") == (b"2", newer)
    with pytest.raises(PreconditionFailed):
        store.put("nothing", b"3", if_match=etag)


def test_one_of_many_threads_wins(store: Store, url: str) -> None:
    conditional(store)
    etag, wins = store.put("head", b"start"), []
    barrier = threading.Barrier(6)

    def race(number: int) -> None:
        own = open_store(url)
        barrier.wait()
        try:
            own.put("head", f"{number}".encode(), if_match=etag)
            wins.append(number)
        except PreconditionFailed:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.get("head")[0] == f"{wins[0]}".encode()


def _race(url: str, etag: str, number: int, results: multiprocessing.Queue[int]) -> None:
    try:
        open_store(url).put("head", f"{number}".encode(), if_match=etag)
        results.put(1)
    except PreconditionFailed:
        results.put(0)


def test_one_of_many_processes_wins(store: Store, url: str) -> None:
    conditional(store)
    etag = store.put("head", b"start")
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    members = [context.Process(target=_race, args=(url, etag, number, results)) for number in range(3)]
    for member in members:
        member.start()
    assert sum(results.get(timeout=60) for _ in members) == 1
    for member in members:
        member.join(30)


def test_an_upload_that_is_called_off_leaves_nothing(store: Store) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    with pytest.raises(StaleAttemptError):
        store.upload("x", memoryview(bytes(8 * PART)), cancelled)
    assert list(store.list()) == []
    assert list(store.unfinished()) == []


def test_an_upload_that_somebody_else_calls_off_begins_anew(
    store: Store, url: str, request: pytest.FixtureRequest
) -> None:
    """As a gc with a short grace does: no image is missing or damaged for that."""
    if request.node.callspec.params["place"] == "moto":
        pytest.skip("moto answers with 500 where others say NoSuchUpload")
    data, asked, other = os.urandom(8 * PART), 0, open_store(url)

    def call_off_once() -> bool:
        nonlocal asked
        asked += 1
        if asked == 4:
            for upload in other.unfinished():
                other.call_off(upload)
        return False

    store.upload("x", memoryview(data), call_off_once)
    assert asked > 8, "it went through once"
    target = bytearray(len(data))
    store.read_into("x", 0, memoryview(target))
    assert target == data
    assert list(store.unfinished()) == []


def test_an_upload_that_is_always_called_off_is_no_missing_object(url: str) -> None:
    store, other = open_store(url, StoreOptions(part_bytes=PART, patience_s=0.1)), open_store(url)

    def call_off() -> bool:
        for upload in other.unfinished():
            other.call_off(upload)
        return False

    with pytest.raises(StoreUnavailable):
        store.upload("x", memoryview(bytes(2 * PART)), call_off)
    assert list(store.list()) == []


def test_uploads_that_nobody_ended_are_found(store: Store, url: str) -> None:
    code = (
        "import os, sys; from outlast.checkpoint.store import *\n"
        f"s = open_store({url!r}, StoreOptions(part_bytes={PART}, parallel=1, bandwidth={PART}))\n"
        "asked = [0]\n"
        "def die():\n    asked[0] += 1\n    return os._exit(9) if asked[0] > 3 else False\n"
        f"s.upload('left/behind', memoryview(bytes(6 * {PART})), die)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 9
    assert list(store.list()) == []
    (left,) = store.unfinished("left/")
    assert left.key == "left/behind"
    assert list(store.unfinished("other/")) == []
    store.call_off(left)
    assert list(store.unfinished()) == []


def test_a_bandwidth_is_kept(url: str) -> None:
    slow = open_store(url, StoreOptions(part_bytes=PART, bandwidth=2 * PART))
    began = time.monotonic()
    slow.upload("x", memoryview(bytes(4 * PART)))
    assert time.monotonic() - began > 1.2


def test_memory_of_an_upload_is_bounded(url: str) -> None:
    """The peak of a process that uploads 256 MiB from a mapping is that of one that has the mapping."""
    code = (
        "import resource, mmap; from outlast.checkpoint.store import *\n"
        f"s = open_store({url!r}); s.put('warm', b'1'); s.upload('w', memoryview(bytes(1)))\n"
        "m = mmap.mmap(-1, 256 << 20); m[:] = bytes(1) * len(m); v = memoryview(m)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "s.upload('x', v)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) < 64 << 10, f"{done.stdout} KiB more"


# --- stores that misbehave -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["moto", "s3"])
def proxied(request: pytest.FixtureRequest) -> Iterator[tuple[Proxy, str]]:
    with moto_s3() if request.param == "moto" else lab_s3() as variables, environment(variables):
        bucket = new_bucket()
        proxy = Proxy(variables["AWS_ENDPOINT_URL"])
        with environment({"AWS_ENDPOINT_URL": proxy.url}):
            yield proxy, f"s3://{bucket}"
        proxy.close()


def later(seconds: float, act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


@pytest.mark.parametrize("mode", ["503", "cut", "stall"])
def test_a_store_that_comes_back_is_waited_for(proxied: tuple[Proxy, str], mode: str) -> None:
    proxy, url = proxied
    store = open_store(f"{url}/{mode}", StoreOptions(part_bytes=PART, patience_s=30, timeout_s=1.0))
    data = os.urandom(3 * PART)
    proxy.after, proxy.mode = PART // 2, mode
    timer = later(2.0, lambda: setattr(proxy, "mode", "pass"))
    store.upload("x", memoryview(data))
    timer.join()
    proxy.mode = mode
    timer = later(2.0, lambda: setattr(proxy, "mode", "pass"))
    target = bytearray(len(data))
    store.read_into("x", 0, memoryview(target))
    timer.join()
    assert bytes(target) == data
    assert mode == "stall" or proxy.refused > 0


def test_a_store_that_stays_away_is_given_up(proxied: tuple[Proxy, str]) -> None:
    proxy, url = proxied
    store = open_store(url, StoreOptions(patience_s=1.0, timeout_s=1.0))
    proxy.mode = "503"
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="SlowDown"):
        store.put("x", b"1")
    assert 0.9 < time.monotonic() - began < 5
    proxy.mode = "pass"


def test_a_conditional_put_whose_answer_was_lost_is_ours(
    proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = proxied
    store = open_store(f"{url}/lost", StoreOptions(patience_s=10))
    conditional(store)
    etag = store.put("head", b"1")
    client, real, calls = store._client, store._client.put_object, []  # type: ignore[attr-defined]

    def lose_first_answer(**arguments: object) -> object:
        calls.append(arguments)
        answer = real(**arguments)
        if len(calls) == 1:
            raise ConnectionResetError("the answer was lost")
        return answer

    monkeypatch.setattr(client, "put_object", lose_first_answer)
    newer = store.put("head", b"2", if_match=etag)
    assert len(calls) == 2
    assert store.get("head") == (b"2", newer)


NO_UPLOAD = {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}


def test_a_part_of_an_upload_that_is_gone_makes_it_begin_anew(
    proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = proxied
    store = open_store(f"{url}/anew", StoreOptions(part_bytes=PART, patience_s=10, parallel=1))
    client, sent = store._client, []  # type: ignore[attr-defined]
    part = client.upload_part

    def first(**arguments: object) -> object:
        sent.append(arguments["UploadId"])
        if len(sent) == 1:
            raise b.ClientError(NO_UPLOAD, "UploadPart")
        return part(**arguments)

    monkeypatch.setattr(client, "upload_part", first)
    store.upload("x", memoryview(bytes(2 * PART)))
    assert [upload == sent[0] for upload in sent] == [True, False, False]
    assert store.head("x").size == 2 * PART


@pytest.mark.parametrize("heard", [True, False])
def test_a_completion_is_looked_up_before_an_upload_begins_anew(
    proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    """Its answer is lost, or somebody called the upload off before: an object of that size is there both times."""
    _, url = proxied
    store = open_store(f"{url}/completed-{heard}", StoreOptions(part_bytes=PART, patience_s=10))
    client = store._client  # type: ignore[attr-defined]
    complete, sent, completed = client.complete_multipart_upload, [], []
    store.upload("x", memoryview(bytes(2 * PART)))
    part = client.upload_part
    monkeypatch.setattr(client, "upload_part", lambda **arguments: (sent.append(1), part(**arguments))[1])

    def first(**arguments: object) -> object:
        completed.append(arguments)
        if len(completed) > 1:
            return complete(**arguments)
        if heard:
            complete(**arguments)
            raise ConnectionResetError("the answer was lost")
        store.call_off(next(store.unfinished()))
        raise b.ClientError(NO_UPLOAD, "CompleteMultipartUpload")

    monkeypatch.setattr(client, "complete_multipart_upload", first)
    data = os.urandom(2 * PART)
    store.upload("x", memoryview(data))
    assert len(sent) == (2 if heard else 4)
    target = bytearray(len(data))
    store.read_into("x", 0, memoryview(target))
    assert target == data


@pytest.mark.parametrize("parts", [1, 3])
def test_what_is_sent_again_keeps_the_bandwidth_too(
    proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """And waiting for it takes nothing of the patience with the store."""
    _, url = proxied
    store = open_store(f"{url}/paced", StoreOptions(part_bytes=PART, patience_s=0.5, bandwidth=PART, parallel=1))
    client, paced = store._client, []  # type: ignore[attr-defined]
    wait = store._pace.wait  # type: ignore[attr-defined]
    monkeypatch.setattr(store._pace, "wait", lambda n, cancelled: (paced.append(n), wait(n, cancelled))[1])  # type: ignore[attr-defined]
    call = "put_object" if parts == 1 else "upload_part"
    real, calls = getattr(client, call), []

    def lose_first(**arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise ConnectionResetError("lost")
        return real(**arguments)

    monkeypatch.setattr(client, call, lose_first)
    began = time.monotonic()
    store.upload("x", memoryview(bytes(parts * PART)))
    assert paced == [PART] * (parts + 1)
    assert time.monotonic() - began > parts + 1 - 0.5


def test_a_service_without_conditional_writes_is_refused() -> None:
    with pretended(501, "NotImplemented") as variables, environment(variables):
        store = open_store("s3://bucket/x")
        began = time.monotonic()
        with pytest.raises(StoreDenied, match=r"has no conditional writes .*: use an S3 service that has"):
            store.put("head", b"1", if_absent=True)
        with pytest.raises(StoreDenied, match="has no ListObjectsV2"):
            list(store.list())
        assert time.monotonic() - began < 3


@contextmanager
def pretended(status: int, code: str) -> Iterator[dict[str, str]]:
    """The variables that lead to a server that answers everything with this."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode() if code else b"hello"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


def test_what_is_no_s3_service_is_told() -> None:
    with pretended(200, "") as variables, environment(variables):
        store = open_store("s3://bucket/x", StoreOptions(patience_s=0.1))
        with pytest.raises(StoreDenied, match="AWS_ENDPOINT_URL"):
            store.get("head")
        with pytest.raises(StoreUnavailable):
            list(store.list())


@pytest.mark.parametrize("call", ["get", "head", "read_into", "put"])
def test_an_ingress_without_a_service_makes_no_object_missing(call: str) -> None:
    with pretended(404, "") as variables, environment(variables):
        store = open_store("s3://bucket/x", StoreOptions(patience_s=0.5))
        with pytest.raises(StoreUnavailable, match=r"is http.* an S3 service"):
            asked(store, call)


def asked(store: Store, call: str) -> object:
    arguments: dict[str, tuple[Any, ...]] = {"read_into": (0, memoryview(bytearray(1))), "put": (b"1",)}
    return getattr(store, call)("head", *arguments.get(call, ()))


@pytest.mark.parametrize("content", [b"", b"123"])
def test_a_head_that_an_ingress_answered_is_asked_again(
    proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    _, url = proxied
    store = open_store(f"{url}/moment", StoreOptions(patience_s=10))
    store.put("x", content)
    client, calls = store._client, []  # type: ignore[attr-defined]
    real = client.head_object

    def first(**arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            no_object = {"Error": {"Code": "404"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
            raise b.ClientError(no_object, "HeadObject")  # type: ignore[arg-type]
        return real(**arguments)

    monkeypatch.setattr(client, "head_object", first)
    assert store.head("x").size == len(content)
    assert len(calls) == 2


def test_what_comes_slowly_and_is_cut_is_asked_for_again(
    proxied: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience with a part begins with its first failure, however long it was under way until then."""
    _, url = proxied
    store = open_store(f"{url}/slowly", StoreOptions(part_bytes=PART, patience_s=0.5))
    data = os.urandom(PART)
    store.upload("x", memoryview(data))
    real, calls = store._receive, []  # type: ignore[attr-defined]

    def cut_first(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            time.sleep(1.0)
            raise ConnectionResetError("cut")
        real(*arguments)

    monkeypatch.setattr(store, "_receive", cut_first)
    target = bytearray(PART)
    store.read_into("x", 0, memoryview(target))
    assert target == data
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000"),
        ("AWS_ENDPOINT_URL", "http://[::1"),
        ("AWS_PROFILE", "nope"),
        ("AWS_DEFAULT_REGION", "no such region"),
        ("AWS_CONFIG_FILE", "damaged"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_told_when_a_store_is_opened(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    (tmp_path / "damaged").write_text("[profile\nx")
    monkeypatch.chdir(tmp_path)
    with environment({**KEYS, variable: value}), pytest.raises(StoreDenied, match="check the S3 configuration"):
        open_store("s3://bucket/x")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (b.EndpointConnectionError(endpoint_url="http://x"), StoreUnavailable),
        (b.ReadTimeoutError(endpoint_url="http://x"), StoreUnavailable),
        (b.CredentialRetrievalError(provider="container-role", error_msg="timed out"), StoreUnavailable),
        (b.MetadataRetrievalError(error_msg="503"), StoreUnavailable),
        (b.NoCredentialsError(), StoreDenied),
        (b.InvalidS3AddressingStyleError(s3_addressing_style="x"), StoreDenied),
        (b.UnauthorizedSSOTokenError(), StoreDenied),
        (ValueError("no URL"), StoreDenied),
        (TimeoutError("no answer"), StoreUnavailable),
    ],
)
def test_whatever_the_library_raises_is_an_error_of_a_store(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="s3://bucket/x"), told(Where("s3://bucket/x", "bucket", "http://x")):
        raise error


def test_whoever_gives_out_credentials_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pod's identity agent that starts after the Pod."""
    made: list[int] = []

    def make(options: StoreOptions) -> object:
        made.append(1)
        if len(made) < 3:
            raise b.CredentialRetrievalError(provider="container-role", error_msg="connection refused")
        return real(options)

    real = s3._new_client
    monkeypatch.setattr(s3, "_new_client", make)
    with moto_s3() as variables, environment(variables):
        store = open_store(f"s3://{new_bucket()}/x")
        store.put("a", b"1")
        assert store.get("a")[0] == b"1"
    assert len(made) == 3


@pytest.mark.parametrize("call", ["get", "head", "read_into", "put"])
def test_refusals_are_told_at_once(proxied: tuple[Proxy, str], call: str) -> None:
    proxy, _ = proxied
    proxy.mode = "pass"
    began = time.monotonic()
    with pytest.raises(StoreDenied, match=r"no-such-bucket-here.*spec\.checkpoint\.url"):
        asked(open_store("s3://no-such-bucket-here/x"), call)
    assert time.monotonic() - began < 3


def test_a_region_counts_by_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    known = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    for given, region in (({"AWS_REGION": "x-1"}, "x-1"), ({"AWS_REGION": "x-1", "AWS_DEFAULT_REGION": "y-2"}, "y-2")):
        with environment({**known, **given}), closing(open_store("s3://bucket/prefix")) as store:
            assert store._client.meta.region_name == region  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [None, "MissingContentMD5", "NotImplemented"])
def test_many_are_deleted_also_where_a_service_asks_for_more_or_cannot(code: str | None) -> None:
    """Services of some makers want a Content-MD5, which botocore has ceased to send, or delete one by one."""
    asked: list[str] = []

    def answer(request: Any, **_: object) -> AWSResponse | None:
        digest = hashlib.md5(request.body).digest()
        asked.append(request.headers["Content-MD5"])
        assert base64.b64decode(asked[-1]) == digest
        if code is None:
            return None
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        status = 501 if code == "NotImplemented" else 400
        return AWSResponse(request.url, status, {"Content-Type": "application/xml"}, cast(Any, Raw(body)))

    with lab_s3() as variables, environment(variables), closing(open_store(f"s3://{new_bucket()}/x")) as store:
        store._client.meta.events.register("before-send.s3.DeleteObjects", answer)  # type: ignore[attr-defined]
        for key in ("a", "b", "keep"):
            store.put(key, b"1")
        store.delete(["a", "b", "never there"])
        assert [found.key for found in store.list()] == ["keep"]
        assert len(asked) == 1


class Raw(io.BytesIO):
    """A body, as botocore reads it."""

    def stream(self, *_: object, **__: object) -> Iterator[bytes]:
        yield self.read()


def test_wrong_credentials_are_told_at_once() -> None:
    with lab_s3() as variables, environment({**variables, "AWS_SECRET_ACCESS_KEY": "wrong"}):
        began = time.monotonic()
        with pytest.raises(StoreDenied, match="check the credentials"):
            open_store("s3://whatever/x").get("head")
        assert time.monotonic() - began < 3


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 1 MiB."""
    with small_file_system(tmp_path, 1) as place:
        yield place


def test_a_full_folder_is_told(small_disk: pathlib.Path) -> None:
    heard: list[str | None] = []
    store = open_store(f"file://{small_disk}/store", StoreOptions(patience_s=1.0, on_wait=heard.append))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="full"):
        store.upload("x", memoryview(bytes(2 << 20)))
    assert 0.9 < time.monotonic() - began < 5
    assert "full" in str(heard[0])
    assert heard[-1] is None
    assert list(store.list()) == []
    assert list(store.unfinished()) == []


def test_a_full_folder_is_waited_for(small_disk: pathlib.Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes((1 << 20) - 65536))
    timer = later(0.5, filler.unlink)
    store = open_store(f"file://{small_disk}/store", StoreOptions(patience_s=30))
    store.upload("x", memoryview(bytes(1 << 19)))
    timer.join()
    assert store.head("x").size == 1 << 19
    assert list(store.unfinished()) == []


PASSING = OSError(errno.EIO, "it failed")
REFUSED = PermissionError(errno.EACCES, "not you")


def failing(real: Callable[..., Any], errors: list[OSError], where: str = "") -> Callable[..., Any]:
    """``real``, of which the first calls (about a path with ``where`` in it) end with these errors."""

    def call(*arguments: Any, **more: Any) -> Any:
        if errors and where in str(arguments[0]):
            raise errors.pop(0)
        return real(*arguments, **more)

    return call


def test_a_new_folder_is_on_the_disk_with_all_that_leads_to_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(file: int) -> None:
        synced.append(str(pathlib.Path(f"/proc/self/fd/{file}").readlink()))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    store = open_store(f"file://{tmp_path}/a/b")
    store.put("head", b"1", if_absent=True)
    store.upload("images/x", memoryview(b"1"))
    made = [tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "images"]
    assert {str(path) for path in made} <= set(synced)


@pytest.mark.parametrize("point", ["write", "fsync", "replace", "preadv", "open"])
def test_a_folder_that_fails_is_asked_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    store = open_store(f"file://{tmp_path}", StoreOptions(patience_s=10))
    data, errors = os.urandom(100), [PASSING, PASSING]
    owner: Any = pathlib.Path if point in ("replace", "open") else os
    monkeypatch.setattr(owner, point, failing(getattr(owner, point), errors))
    store.upload("a/x", memoryview(data))
    target = bytearray(100)
    store.read_into("a/x", 0, memoryview(target))
    assert target == data
    assert errors == []
    assert list(store.unfinished()) == []


def test_a_folder_that_refuses_is_not_asked_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"file://{tmp_path}")
    monkeypatch.setattr(pathlib.Path, "open", failing(pathlib.Path.open, [REFUSED]))
    with pytest.raises(StoreDenied):
        store.upload("x", memoryview(b"1"))


@pytest.mark.parametrize("condition", ["if_absent", "if_match"])
def test_a_put_that_failed_after_it_had_moved_into_place_is_ours(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    store = open_store(f"file://{tmp_path}", StoreOptions(patience_s=10))
    store.put("other", b"0")  # there are folders
    conditions = {"if_absent": True} if condition == "if_absent" else {"if_match": store.put("x", b"0")}
    errors = [PASSING]
    monkeypatch.setattr(folder, "_sync_folder", failing(folder._sync_folder, errors))
    etag = store.put("x", b"1", **conditions)  # type: ignore[arg-type]
    assert errors == []
    assert store.get("x") == (b"1", etag)
    with pytest.raises(PreconditionFailed):
        store.put("x", b"1", **conditions)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(PASSING, StoreUnavailable), (REFUSED, StoreDenied), (FileNotFoundError(errno.ENOENT, "gone"), None)],
)
def test_what_a_folder_cannot_list_is_not_missing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: OSError, raised: type[Exception] | None
) -> None:
    store = open_store(f"file://{tmp_path}", StoreOptions(patience_s=0))
    store.put("a/x", b"1")
    store.put("b/x", b"1")
    monkeypatch.setattr(os, "scandir", failing(os.scandir, [error], str(tmp_path / "a")))
    if raised is None:
        assert [found.key for found in store.list()] == ["b/x"]
    else:
        with pytest.raises(raised):
            list(store.list())
    assert [found.key for found in store.list()] == ["a/x", "b/x"]


@pytest.mark.parametrize("size", [100, folder.SMALL + 1])
def test_an_update_between_a_read_and_its_etag_is_not_lost(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    store, other = (open_store(f"file://{tmp_path}") for _ in range(2))
    store.put("x", b"0" * size)
    real, read = pathlib.Path.read_bytes, []

    def replaced_once(path: pathlib.Path) -> bytes:
        content = real(path)
        if not read:
            read.append(path)
            other.put("x", b"2" * size, if_match=other.get("x")[1])
        return content

    monkeypatch.setattr(pathlib.Path, "read_bytes", replaced_once)
    content, etag = store.get("x")
    assert (read, content[:1]) == ([tmp_path / "x"], b"0")
    with pytest.raises(PreconditionFailed):
        store.put("x", b"1" * size, if_match=etag)
    etag = store.put("x", b"3" * size, if_match=store.get("x")[1])
    assert store.get("x") == (b"3" * size, etag)


@pytest.mark.parametrize("sizes", [(100, 200), (100, folder.SMALL + 1), (folder.SMALL + 1, 100)])
def test_a_head_tells_of_one_object_only(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]
) -> None:
    """Whatever takes its place while it is looked at."""
    store, other = (open_store(f"file://{tmp_path}") for _ in range(2))
    store.put("x", bytes(sizes[0]))
    known = store.head("x")
    real, replaced = os.fstat, []

    def replaced_once(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        if not replaced and found.st_size == sizes[0]:
            replaced.append(descriptor)
            other.put("x", bytes(sizes[1]))
        return found

    monkeypatch.setattr(os, "fstat", replaced_once)
    assert store.head("x") == known
    assert replaced
    after = store.head("x")
    assert (after.size, after.etag == known.etag) == (sizes[1], False)


def test_a_lock_that_is_held_is_waited_for_and_given_up(tmp_path: pathlib.Path) -> None:
    store = open_store(f"file://{tmp_path}", StoreOptions(patience_s=0.5))
    store.put("x", b"0")
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=rf"holds the lock {tmp_path}/\.lock"):
            store.put("x", b"1")
        assert 0.4 < time.monotonic() - began < 5
        timer = later(0.2, lambda: fcntl.flock(held, fcntl.LOCK_UN))
        store.put("x", b"2")
        timer.join()
    assert store.get("x")[0] == b"2"


@pytest.mark.parametrize(("error", "raised"), [(FileNotFoundError(errno.ENOENT, "gone"), None), (REFUSED, StoreDenied)])
def test_drafts_that_are_moved_away_meanwhile_are_skipped(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, error: OSError, raised: type[Exception] | None
) -> None:
    store = open_store(f"file://{tmp_path}")
    drafts = tmp_path / ".drafts"
    drafts.mkdir()
    for name in ("0+gone", "1+left"):
        (drafts / name).write_bytes(b"")
    monkeypatch.setattr(pathlib.Path, "stat", failing(pathlib.Path.stat, [error], "+gone"))
    if raised is None:
        assert [found.key for found in store.unfinished()] == ["left"]
    else:
        with pytest.raises(raised):
            list(store.unfinished())
    left = Unfinished("left", "1+left", 0.0)
    monkeypatch.setattr(pathlib.Path, "unlink", failing(pathlib.Path.unlink, [REFUSED]))
    with pytest.raises(StoreDenied):
        store.call_off(left)
    store.call_off(left)
    store.call_off(left)
    assert [found.key for found in store.unfinished()] == ["gone"]


def test_a_folder_that_may_not_be_written_is_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreDenied, match=r"file is a file, below which there can be no folder"):
        open_store(f"file://{tmp_path}/file/below").put("x", b"")


@pytest.mark.parametrize("url", ["", "/tmp/x", "http://x", "ftp://x/y"])
def test_what_is_no_store(url: str) -> None:
    with pytest.raises(RequestError, match="s3://bucket/prefix or file:///folder"):
        open_store(url)
