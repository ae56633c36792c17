"""Keepers and an object store: images go there whole or not at all, and come back bit for bit or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors import safe_open

from outlast.checkpoint.store import open_store
from outlast.errors import (
    CheckpointError,
    ClaimLost,
    ImageError,
    ObjectMissing,
    OutlastError,
    PreconditionFailed,
    RequestError,
    StaleAttemptError,
    StoreDenied,
    StoreUnavailable,
)
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.image import BLOCK, ImageFile
from outlast.snapshot.inventory import RankRestore
from outlast.snapshot.stored import StoredImage
from outlast.snapshot.wire import checked, error_message
from support.gates import Gate, in_thread
from support.keepers import ATTEMPT, DURABLE, Cluster, cluster, flip, identity, in_parallel, wait_until, write_shard

MIB = 1 << 20
OLD, NEW = Generation.of(ATTEMPT, 10), Generation.of(ATTEMPT, 20)
NEXT = Attempt(2, "b" * 16)
PIECES = 10 * MIB
"""Of an image that a folder takes in three pieces."""


@contextmanager
def gated(seats: int, folder: Path) -> Iterator[tuple[Cluster, Gate]]:
    """A cluster whose keepers' transfers pass a gate."""
    gate = Gate(folder / "gate")
    try:
        with cluster(seats, program=("support.gates", str(gate.path))) as nodes:
            yield nodes, gate
    finally:
        gate.close()


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepers as processes of their own find ``support``."""
    tests = str(Path(__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH")))))


def upload(nodes: Cluster, seat: int, url: str, generation: Generation = OLD, **more: Any) -> list[StoredImage]:
    args = {**identity(), "generation": str(generation), "seat": seat, "url": url, "procs": nodes.procs, **more}
    return [StoredImage.from_json(image) for image in nodes.nodes[seat].call("upload", **args)["images"]]


def from_store(url: str, image: StoredImage, node: str, slot: int = 0) -> RankRestore:
    place = (image.rank, image.seat, image.local_rank, node, slot, "object", image.size, None)
    return RankRestore(*place, url=url, key=image.key, checksum=image.checksum)


def fetch(nodes: Cluster, url: str, image: StoredImage, generation: Generation = OLD, slot: int = 0) -> dict[str, Any]:
    node = nodes.nodes[image.seat]
    restore = from_store(url, image, node.node, slot).to_json()
    return node.call("rebuild", **identity(), generation=str(generation), restore=restore, peers={})


def keys(url: str) -> list[str]:
    return [found.key for found in open_store(url).list()]


def wiped(nodes: Cluster) -> None:
    for seat in range(len(nodes.nodes)):
        nodes.replace(seat)


def test_a_generation_goes_to_the_store_and_comes_back(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/default/job"
    with cluster(4, procs=2, program=DURABLE) as nodes:
        nodes.write_shards(OLD, [3 * MIB, MIB + 17, 20 * MIB, 100], slot=2)
        nodes.write_shards(NEW, [3 * MIB, MIB + 17, 20 * MIB, 100], slot=0)
        places = {(seat, r): nodes.shard_path(seat, r, 2) for seat in range(4) for r in range(2)}
        before = {place: path.read_bytes() for place, path in places.items()}
        stored = in_parallel(4, lambda seat: upload(nodes, seat, url))
        images = [image for found in stored for image in found]
        assert [(image.rank, image.seat, image.local_rank) for image in images] == [
            (n, n // 2, n % 2) for n in range(8)
        ]
        assert keys(url) == [image.key for image in images] == [f"{OLD}/rank-{n:05d}.safetensors" for n in range(8)]
        for image in images:
            content = before[image.seat, image.local_rank]
            assert (tmp_path / "store/default/job" / image.key).read_bytes() == content
            assert (image.size, image.checksum) == (
                len(content),
                ImageFile.open(places[image.seat, image.local_rank]).digest,
            )
        with safe_open(tmp_path / "store/default/job" / images[0].key, "np") as plain:
            assert plain.get_tensor("weights").shape == (3 * MIB,)

        wiped(nodes)
        for reply in in_parallel(8, lambda n: fetch(nodes, url, images[n], slot=1)):
            assert isinstance(reply, dict), reply
        assert {place: nodes.shard_path(*place, 1).read_bytes() for place in places} == before
        held = [image for node in nodes.nodes for image in node.inventory().images]
        assert {(image.generation, image.world, image.bad_blocks) for image in held} == {(OLD, 8, ())}
        assert not [path for node in nodes.nodes for path in node.dir.glob("*.rebuild")]


def _flipped(path: Path) -> None:
    flip(path, 3 * BLOCK + 5, 1)


def _truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)


def _extended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(4096))


def _unsealed(path: Path) -> None:
    flip(path, -64, 8)


def _of_another_rank(path: Path) -> None:
    write_shard(path, 1, 0, OLD, 2 * MIB)


def _of_another_generation(path: Path) -> None:
    write_shard(path, 0, 0, NEW, 2 * MIB)


def _of_other_bytes(path: Path) -> None:
    write_shard(path, 0, 0, OLD, 2 * MIB, seed=99)


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (_flipped, ImageError, "1 blocks do not verify"),
        (_truncated, CheckpointError, "not the .* that it was uploaded with"),
        (_extended, CheckpointError, "not the .* that it was uploaded with"),
        (_unsealed, ImageError, "generation None"),
        (_of_another_rank, ImageError, "'seat': '1'"),
        (_of_another_generation, ImageError, f"generation {NEW}"),
        (_of_other_bytes, ImageError, "not the one that its manifest names"),
        (Path.unlink, ObjectMissing, "no such object"),
    ],
)
def test_what_is_not_right_in_the_store_leaves_nothing(
    tmp_path: Path, damage: Any, kind: type[OutlastError], says: str
) -> None:
    url = f"file://{tmp_path}"
    with cluster(1, program=DURABLE) as nodes:
        nodes.write_shards(OLD, [2 * MIB])
        [image] = upload(nodes, 0, url)
        damage(tmp_path / image.key)
        wiped(nodes)
        with pytest.raises(kind, match=says):
            fetch(nodes, url, image)
        assert not list(nodes.nodes[0].dir.glob("*.img*"))


def test_a_fetch_that_fails_leaves_the_slot_as_it_was(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    with cluster(1, program=DURABLE) as nodes:
        nodes.write_shards(NEW, [2 * MIB])
        [image] = upload(nodes, 0, url, NEW)
        nodes.write_shards(OLD, [2 * MIB])
        flip(tmp_path / image.key, MIB)
        with pytest.raises(ImageError, match="do not verify"):
            fetch(nodes, url, image, NEW)
        assert [held.generation for held in nodes.nodes[0].inventory().images] == [OLD]
        flip(tmp_path / image.key, MIB)
        fetch(nodes, url, image, NEW)
        assert [held.generation for held in nodes.nodes[0].inventory().images] == [NEW]


def test_a_store_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with cluster(1, program=DURABLE) as nodes:
        nodes.write_shards(OLD, [MIB])
        with pytest.raises(StoreDenied, match="is a file, below which there can be no folder"):
            upload(nodes, 0, f"file://{tmp_path}/taken/job")
        with pytest.raises(RequestError, match="is no store"):
            upload(nodes, 0, "gopher://host/x")
        upload(nodes, 0, f"file://{tmp_path}/job")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small tmpfs")
def test_a_full_store_is_told_and_waited_for(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)], check=True)
    try:
        with cluster(1, program=DURABLE) as nodes:
            nodes.write_shards(OLD, [PIECES])
            node, done = nodes.nodes[0], in_thread(lambda: upload(nodes, 0, f"file://{tmp_path}"))
            wait_until(lambda: "full" in str(node.call("waiting")["trouble"]), "the keeper does not say why it waits")
            subprocess.run(["mount", "-o", "remount,size=30m", str(tmp_path)], check=True)
            (image,) = cast(list[StoredImage], done())
            assert node.call("waiting")["trouble"] is None
            assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / image.key]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    "kind", [StoreUnavailable, StoreDenied, ObjectMissing, PreconditionFailed, CheckpointError, ClaimLost]
)
def test_errors_of_the_object_tier_reach_who_asked(kind: type[OutlastError]) -> None:
    with pytest.raises(kind, match="keeper 1: why"):
        checked(error_message(kind("why")), "keeper 1")


def test_without_an_object_tier_there_is_neither_upload_nor_fetch(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    with cluster(1) as nodes:
        nodes.write_shards(OLD, [MIB])
        with pytest.raises(RequestError, match="the job has no object tier"):
            upload(nodes, 0, url)
        with pytest.raises(RequestError, match="the job has no object tier"):
            fetch(nodes, url, StoredImage(0, 0, 0, "k", MIB, ""))


def test_only_what_is_sound_and_complete_is_uploaded(tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    with cluster(1, procs=2, program=DURABLE) as nodes:
        nodes.write_shards(OLD, [2 * MIB])
        flip(nodes.shard_path(0, 1), 3 * BLOCK, 1)
        with pytest.raises(ImageError, match="1 blocks do not verify, first 3: not uploaded"):
            upload(nodes, 0, url)
        assert f"{OLD}/rank-00001.safetensors" not in keys(url)
        nodes.shard_path(0, 1).unlink()
        with pytest.raises(ImageError, match="does not hold the shard image of seat 0, local rank 1"):
            upload(nodes, 0, f"{url}/other")
        assert keys(f"{url}/other") == []
        with pytest.raises(ImageError, match="does not hold"):
            upload(nodes, 0, f"{url}/other", NEW)


@pytest.mark.parametrize(
    ("point", "number", "left"),
    [("begin", 1, (0, 0)), ("piece", 1, (0, 1)), ("piece", 2, (0, 1)), ("piece", 3, (0, 1)), ("end", 1, (1, 0))],
)
def test_a_keeper_killed_during_an_upload_leaves_a_whole_object_or_none(
    tmp_path: Path, point: str, number: int, left: tuple[int, int]
) -> None:
    url = f"file://{tmp_path}/store"
    with gated(1, tmp_path) as (nodes, gate):
        nodes.write_shards(OLD, [PIECES])
        before = nodes.shard_path(0).read_bytes()
        with gate.holding(point, number):
            reply = in_thread(lambda: upload(nodes, 0, url))
            gate.wait()
            nodes.restart(0)
            assert isinstance(reply(), OutlastError)
        store = open_store(url)
        assert (len(list(store.list())), len(list(store.unfinished()))) == left
        for found in store.list():
            assert (tmp_path / "store" / found.key).read_bytes() == before, "an object that is there is whole"
        [image] = upload(nodes, 0, url)
        nodes.replace(0)
        fetch(nodes, url, image)
        assert nodes.shard_path(0).read_bytes() == before
        for garbage in store.unfinished():
            store.call_off(garbage)
        assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == ["rank-00000.safetensors"]


def test_a_newer_attempt_ends_an_upload_and_does_not_wait_for_it(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with gated(1, tmp_path) as (nodes, gate):
        nodes.write_shards(OLD, [PIECES])
        with gate.holding("piece", 2):
            reply = in_thread(lambda: upload(nodes, 0, url))
            gate.wait()
            assert nodes.nodes[0].call("fence", **identity(NEXT))["attempt"] == str(NEXT), "while the store is stuck"
        assert isinstance(reply(), StaleAttemptError)
        assert keys(url) == list(open_store(url).unfinished()) == []
        with pytest.raises(StaleAttemptError):
            upload(nodes, 0, url)
        upload(nodes, 0, url, **identity(NEXT))


def test_a_newer_attempt_ends_a_fetch_and_waits_for_it(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with gated(1, tmp_path) as (nodes, gate):
        nodes.write_shards(OLD, [40 * MIB])  # more than a part that is read at once
        [image] = upload(nodes, 0, url)
        nodes.replace(0)
        with gate.holding("piece", 2):
            reply = in_thread(lambda: fetch(nodes, url, image))
            gate.wait()
            fence = in_thread(lambda: nodes.nodes[0].call("fence", **identity(NEXT)))
            wait_until(lambda: nodes.nodes[0].call("status")["attempt"] == str(NEXT), "the fence is not raised")
        assert isinstance(reply(), StaleAttemptError)
        assert fence() == {"ok": True, "attempt": str(NEXT)}
        assert not list(nodes.nodes[0].dir.glob("*.img*"))


def test_a_keeper_killed_during_a_fetch_leaves_no_image(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with gated(1, tmp_path) as (nodes, gate):
        nodes.write_shards(OLD, [40 * MIB])
        [image] = upload(nodes, 0, url)
        nodes.replace(0)
        with gate.holding("piece", 2):
            reply = in_thread(lambda: fetch(nodes, url, image))
            gate.wait()
            nodes.restart(0)
            assert isinstance(reply(), OutlastError)
        assert not list(nodes.nodes[0].dir.glob("*.img*"))
        fetch(nodes, url, image)


def test_of_two_uploads_the_later_one_is_done(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with gated(1, tmp_path) as (nodes, gate):
        nodes.write_shards(OLD, [PIECES], slot=0)
        nodes.write_shards(NEW, [PIECES], slot=1)
        with gate.holding("piece", 2):
            first = in_thread(lambda: upload(nodes, 0, url, OLD))
            gate.wait()
            with pytest.raises(OutlastError, match="the upload before to end"):
                upload(nodes, 0, url, NEW, timeout=1.0)
        assert isinstance(first(), StaleAttemptError)
        upload(nodes, 0, url, NEW)
        assert keys(url) == [f"{NEW}/rank-00000.safetensors"]


def test_snapshots_go_on_during_an_upload(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    with gated(2, tmp_path) as (nodes, gate):
        nodes.write_shards(OLD, [PIECES] * 2, slot=2)
        before = nodes.shard_path(0, slot=2).read_bytes()
        with gate.holding("piece", 2):
            reply = in_thread(lambda: upload(nodes, 0, url))
            gate.wait()
            for step, slot in ((20, 0), (30, 1), (40, 0)):
                generation = Generation.of(ATTEMPT, step)
                lengths = nodes.write_shards(generation, [PIECES] * 2, slot)
                for encoded in nodes.encode(nodes.encode_args(generation, lengths, 1, slot)):
                    assert isinstance(encoded, dict), encoded
                for node in nodes.nodes:
                    node.call("commit", **identity(), generation=str(generation), slots=3, procs=1)
        [image] = reply()  # type: ignore[misc]
        assert (tmp_path / "store" / image.key).read_bytes() == before


@pytest.mark.parametrize(("point", "number", "objects"), [("piece", 2, 0), ("end", 1, 1)])
def test_an_image_that_is_overwritten_meanwhile_is_not_reported(
    tmp_path: Path, point: str, number: int, objects: int
) -> None:
    url = f"file://{tmp_path}/store"
    with gated(1, tmp_path) as (nodes, gate):
        nodes.write_shards(OLD, [PIECES])
        with gate.holding(point, number):
            reply = in_thread(lambda: upload(nodes, 0, url))
            gate.wait()
            image = ImageFile.open(nodes.shard_path(0), writable=True)
            image.begin(NEW)  # as a rank does before it copies
            image.close()
        error = reply()
        assert isinstance(error, ImageError)
        assert "was overwritten while it was uploaded" in str(error)
        assert len(keys(url)) == objects, "an object of which nobody was told may be left"


def test_a_paused_store_does_not_keep_a_keeper_from_ending(tmp_path: Path) -> None:
    with gated(1, tmp_path) as (nodes, gate):
        nodes.write_shards(OLD, [PIECES])
        with gate.holding("piece", 2):
            in_thread(lambda: upload(nodes, 0, f"file://{tmp_path}/store"))
            gate.wait()
            nodes.nodes[0].signal(signal.SIGTERM)
            assert nodes.nodes[0].process.wait(10) == 0
