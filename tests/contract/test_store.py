"""What every store must do, on a folder, on moto's server and on a real S3 server over HTTP."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from outlast.checkpoint.store import Store, StoreOptions, open_store
from outlast.errors import (
    CheckpointError,
    ObjectMissing,
    PreconditionFailed,
    RequestError,
    StaleAttemptError,
    StoreDenied,
    StoreUnavailable,
)
from support.stores import Proxy, environment, lab_s3, moto_s3, new_bucket

pytestmark = pytest.mark.timeout(120)

PART = 5 << 20
"""The least that S3 takes as a part."""


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


def test_refusals_are_told_at_once(proxied: tuple[Proxy, str]) -> None:
    proxy, _ = proxied
    proxy.mode = "pass"
    began = time.monotonic()
    with pytest.raises(StoreDenied, match=r"no-such-bucket-here.*spec\.checkpoint\.url"):
        open_store("s3://no-such-bucket-here/x").get("head")
    assert time.monotonic() - began < 3


def test_wrong_credentials_are_told_at_once() -> None:
    with lab_s3() as variables, environment({**variables, "AWS_SECRET_ACCESS_KEY": "wrong"}):
        began = time.monotonic()
        with pytest.raises(StoreDenied, match="check the credentials"):
            open_store("s3://whatever/x").get("head")
        assert time.monotonic() - began < 3


def test_a_full_folder_is_told(tmp_path: pathlib.Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        store = open_store(f"file://{tmp_path}/store")
        with pytest.raises(StoreUnavailable, match="full"):
            store.upload("x", memoryview(bytes(2 << 20)))
        assert list(store.list()) == []
        assert list(store.unfinished()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_may_not_be_written_is_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreDenied, match="folder that this user may write"):
        open_store(f"file://{tmp_path}/file/below").put("x", b"")


@pytest.mark.parametrize("url", ["", "/tmp/x", "http://x", "ftp://x/y"])
def test_what_is_no_store(url: str) -> None:
    with pytest.raises(RequestError, match="s3://bucket/prefix or file:///folder"):
        open_store(url)
