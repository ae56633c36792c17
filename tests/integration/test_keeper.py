"""Keepers as they are: processes, sockets, files on tmpfs; what is lost comes back bit for bit."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from outlast.errors import CapacityError, ImageError, OutlastError, RequestError, StaleAttemptError, TransferError
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.image import BLOCK, ImageFile
from outlast.snapshot.inventory import GUEST_SLOT
from outlast.snapshot.restore import lacking_parity, plan_restore
from outlast.snapshot.wire import Deadline, ImageName, KeeperClient
from support.keepers import (
    ATTEMPT,
    TOKEN,
    Cluster,
    KeeperProcess,
    cluster,
    flip,
    identity,
    in_parallel,
    wait_until,
    write_shard,
)

MIB = 1 << 20
OLD, NEW = Generation.of(ATTEMPT, 10), Generation.of(ATTEMPT, 20)
NEXT = Attempt(2, "b" * 16)


def protect(nodes: Cluster, generation: Generation, nbytes: list[int], parity: int, slot: int = 0) -> dict[Path, bytes]:
    """Write and encode one generation; the bytes of all its images."""
    lengths = nodes.write_shards(generation, nbytes, slot)
    for reply in nodes.encode(nodes.encode_args(generation, lengths, parity, slot)):
        assert isinstance(reply, dict), reply
    return images(nodes)


def images(nodes: Cluster) -> dict[Path, bytes]:
    """By file, of all nodes; nodes are told apart by seat."""
    return {
        Path(str(seat)) / path.name: path.read_bytes()
        for seat, node in enumerate(nodes.nodes)
        for path in node.dir.glob("*.img*")
    }


def recover(nodes: Cluster, parity: int) -> dict[str, int]:
    """Plan, rebuild and protect again; where the ranks came from."""
    plan = nodes.plan()
    assert plan is not None
    nodes.rebuild_all(plan)
    lengths: dict[int, list[int]] = {local_rank: [] for local_rank in range(nodes.procs)}
    for restore in plan.ranks:
        lengths[restore.local_rank].append(restore.length)
    inventories = [node.inventory() for node in nodes.nodes]
    targets = lacking_parity(inventories, plan.generation, range(len(nodes.nodes)), parity, nodes.procs)
    for reply in nodes.encode(nodes.encode_args(plan.generation, lengths, parity, plan.ranks[0].slot, targets=targets)):
        assert isinstance(reply, dict), reply
    return plan.origins()


def test_any_two_of_four_nodes_come_back_one_loss_after_the_other() -> None:
    with cluster(4) as nodes:
        before = protect(nodes, NEW, [3 * MIB, 2 * MIB + 12345, 5 * MIB, 17], parity=2)
        for lost in itertools.combinations(range(4), 2):
            for seat in lost:
                nodes.replace(seat)
            assert recover(nodes, parity=2) == {"memory-decode": 2, "memory-local": 2}
            assert images(nodes) == before


@pytest.mark.parametrize("parity", [1, 2])
def test_three_nodes_of_two_ranks(parity: int) -> None:
    with cluster(3, procs=2) as nodes:
        before = protect(nodes, NEW, [MIB, MIB + 5, 3 * MIB], parity)
        for lost in itertools.combinations(range(3), parity):
            for seat in lost:
                nodes.replace(seat)
            assert recover(nodes, parity) == {"memory-decode": 2 * parity, "memory-local": 6 - 2 * parity}
            assert images(nodes) == before


def test_damage_is_found_and_decoded_around() -> None:
    with cluster(4) as nodes:
        before = protect(nodes, NEW, [4 * MIB] * 4, parity=2)
        flip(nodes.shard_path(0), 3 * BLOCK + 7)
        flip(nodes.shard_path(1), 3 * BLOCK + 7)
        flip(nodes.parity_path(2), 2 * BLOCK)
        found = {
            (image.kind, image.seat): image.bad_blocks for node in nodes.nodes for image in node.inventory().images
        }
        assert found["shard", 0] == found["shard", 1] == (3,)
        assert found["parity", 2] == (2,)
        nodes.replace(3)
        assert recover(nodes, parity=2) == {"memory-decode": 3, "memory-local": 1}
        assert images(nodes) == before


@pytest.mark.parametrize("offset", [0, 40, 300, -8, -200], ids=["length", "format", "meta", "footer", "checksums"])
def test_an_image_with_a_damaged_header_or_trailer_is_absent(offset: int) -> None:
    with cluster(3) as nodes:
        before = protect(nodes, NEW, [10 * MIB] * 3, parity=1)
        flip(nodes.shard_path(1), offset, 2)
        flip(nodes.parity_path(0), offset, 2)
        assert [image.kind for image in nodes.nodes[1].inventory().images] == ["parity"]
        assert [image.kind for image in nodes.nodes[0].inventory().images] == ["shard"]
        assert len(nodes.nodes[0].call("inventory")["damaged"]) == 1
        flip(nodes.parity_path(0), offset, 2)
        assert recover(nodes, parity=1) == {"memory-decode": 1, "memory-local": 2}
        assert images(nodes) == before


def test_a_keeper_started_again_serves_what_is_there() -> None:
    with cluster(2) as nodes:
        protect(nodes, NEW, [MIB] * 2, parity=1)
        nodes.nodes[0].call("commit", **identity(), generation=str(NEW))
        before = nodes.nodes[0].inventory()
        assert nodes.restart(0).inventory() == before
        assert nodes.nodes[0].call("status")["commit"] == str(NEW)
        with nodes.nodes[0].client() as client, pytest.raises(StaleAttemptError):
            client.call("commit", **identity(Attempt(1, "c" * 16)), generation=str(NEW))


def test_a_keeper_killed_while_it_encodes_leaves_the_older_generation_whole() -> None:
    with cluster(4) as nodes:
        protect(nodes, OLD, [4 * MIB] * 4, parity=2, slot=0)
        lengths = nodes.write_shards(NEW, [4 * MIB] * 4, slot=1)
        args = nodes.encode_args(NEW, lengths, 2, slot=1)
        nodes.nodes[3].signal(signal.SIGSTOP)
        encoding = threading.Thread(
            target=lambda: in_parallel(1, lambda _: nodes.nodes[0].call("encode", index=0, **args))
        )
        encoding.start()
        wait_until(nodes.parity_path(0, slot=1).exists, "the encoding does not begin")
        nodes.restart(0)
        encoding.join(20)
        nodes.nodes[3].signal(signal.SIGCONT)
        held = {(image.kind, image.generation) for image in nodes.nodes[0].inventory().images}
        assert held == {("shard", OLD), ("parity", OLD), ("shard", NEW)}
        again = nodes.encode(nodes.encode_args(NEW, lengths, 2, slot=1))
        assert all(isinstance(reply, dict) for reply in again), again
        before = images(nodes)
        nodes.replace(0)
        nodes.replace(2)
        assert recover(nodes, parity=2) == {"memory-decode": 2, "memory-local": 2}
        after = images(nodes)
        assert after == {name: before[name] for name in after}


def test_a_node_that_was_paused_and_given_up_changes_nothing() -> None:
    with cluster(4) as nodes:
        lengths = nodes.write_shards(NEW, [64 * MIB] * 4)
        args = nodes.encode_args(NEW, lengths, 2)
        zombie = nodes.nodes[1]
        replies: list[object] = []
        encoding = threading.Thread(target=lambda: replies.extend(nodes.encode(args)))
        encoding.start()
        wait_until(nodes.parity_path(2).exists, "the encoding does not begin")
        zombie.signal(signal.SIGSTOP)
        survivors = [nodes.nodes[seat] for seat in (0, 2, 3)]
        for node in survivors:
            assert node.call("fence", **identity(NEXT)) == {"ok": True, "attempt": str(NEXT)}
        before = {node.node: {path.name: path.read_bytes() for path in node.dir.glob("*.img")} for node in survivors}
        zombie.signal(signal.SIGCONT)
        encoding.join(60)
        assert all(isinstance(reply, OutlastError) for reply in replies), replies
        assert len(replies) == 4
        after = {node.node: {path.name: path.read_bytes() for path in node.dir.glob("*.img")} for node in survivors}
        assert after == before
        for node in survivors:
            with pytest.raises(StaleAttemptError, match="attempt 2-"):
                node.call("encode", index=0, **args)


def test_a_keeper_answers_unless_it_is_stopped_or_gone() -> None:
    with cluster(1) as nodes:
        keeper = nodes.nodes[0]
        host, port = keeper.address["host"], keeper.address["port"]
        assert KeeperClient.answers(host, port, TOKEN, 10.0)
        assert not KeeperClient.answers(host, port, TOKEN[::-1], 10.0)
        keeper.signal(signal.SIGSTOP)
        assert not KeeperClient.answers(host, port, TOKEN, 0.3), "only its system took the call"
        keeper.signal(signal.SIGCONT)
        assert KeeperClient.answers(host, port, TOKEN, 10.0)
        keeper.kill()
        assert not KeeperClient.answers(host, port, TOKEN, 10.0)


def test_who_has_not_the_token_is_refused() -> None:
    with cluster(1) as nodes:
        address = nodes.nodes[0].address
        with pytest.raises(RequestError, match="token"):
            KeeperClient(address["host"], address["port"], TOKEN[::-1], 5).call("status")
        with pytest.raises(RequestError, match="no operation 'shell'"):
            nodes.nodes[0].call("shell")
        with pytest.raises(RequestError, match="malformed read"):
            nodes.nodes[0].call("read", kind="shard")


def test_reading_a_generation_that_is_gone_says_what_is_held() -> None:
    with cluster(1) as nodes:
        node, out = nodes.nodes[0], memoryview(bytearray(1000))
        write_shard(nodes.shard_path(0), 0, 0, OLD, MIB)
        with node.client() as client:
            client.read("shard", 0, str(OLD), 4096, out)
            assert bytes(out) == nodes.shard_path(0).read_bytes()[4096:5096]
            write_shard(nodes.shard_path(0), 0, 0, NEW, MIB)
            with pytest.raises(ImageError, match=rf"does not hold .*{OLD} .held: slot 0: seat 0, {NEW}"):
                client.read("shard", 0, str(OLD), 4096, out)


def test_what_was_read_while_it_was_overwritten_is_not_confirmed() -> None:
    with cluster(1) as nodes:
        write_shard(nodes.shard_path(0), 0, 0, OLD, MIB)
        name, deadline = ImageName("shard", 0, OLD), Deadline.after(20, "the test")
        with nodes.nodes[0].client() as client:
            client.begin_read(name, [(0, MIB, "")], deadline)
            client.receive(memoryview(bytearray(MIB)), deadline)
            client.confirm(name, deadline)
            client.begin_read(name, [(0, MIB, "")], deadline)
            client.receive(memoryview(bytearray(1)), deadline)  # so the keeper has looked at the seal of its one piece
            write_shard(nodes.shard_path(0), 0, 0, NEW, MIB)
            client.receive(memoryview(bytearray(MIB - 1)), deadline)
            with pytest.raises(ImageError, match="does not hold"):
                client.confirm(name, deadline)


def test_a_long_read_ends_when_its_image_is_overwritten() -> None:
    size = 64 * MIB  # more than socket buffers hold: the last pieces are not sent yet
    with cluster(1) as nodes:
        write_shard(nodes.shard_path(0), 0, 0, OLD, size)
        name, deadline = ImageName("shard", 0, OLD), Deadline.after(20, "the test")
        with nodes.nodes[0].client() as client:
            client.begin_read(name, [(0, size, "")], deadline)
            client.receive(memoryview(bytearray(1)), deadline)
            write_shard(nodes.shard_path(0), 0, 0, NEW, size)
            with pytest.raises(TransferError, match="closed the connection"):
                client.receive(memoryview(bytearray(size - 1)), deadline)


def test_a_rebuild_that_cannot_end_leaves_nothing() -> None:
    with cluster(3) as nodes:
        protect(nodes, NEW, [4 * MIB] * 3, parity=1)
        nodes.replace(0)
        plan = nodes.plan()
        assert plan is not None
        flip(nodes.shard_path(1), 3 * MIB)
        with pytest.raises(ImageError, match="blocks do not verify after the rebuild"):
            nodes.rebuild(plan, plan.ranks[0])
        assert not list(nodes.nodes[0].dir.glob("*.img*"))
        assert nodes.plan() is None


def test_a_slot_in_use_refuses_older_generations_and_breaks_the_seal_first() -> None:
    with cluster(2) as nodes:
        protect(nodes, NEW, [MIB] * 2, parity=1)
        lengths = nodes.write_shards(OLD, [MIB] * 2, slot=1)
        for reply in nodes.encode(nodes.encode_args(OLD, lengths, 1, slot=0)):
            assert isinstance(reply, StaleAttemptError)
        newer = Generation.of(ATTEMPT, 30)
        for reply in nodes.encode(nodes.encode_args(newer, lengths, 1, slot=0)):
            assert isinstance(reply, ImageError), reply
        assert ImageFile.open(nodes.parity_path(0)).generation is None


def test_encoding_ends_by_its_deadline_and_names_who_is_missing() -> None:
    with cluster(3) as nodes:
        lengths = nodes.write_shards(NEW, [MIB] * 3)
        args = nodes.encode_args(NEW, lengths, 2)
        with nodes.nodes[0].client() as client, pytest.raises(TransferError, match="rows from seats 2"):
            client.call("encode", timeout=2.0, index=0, **args)


def test_max_memory_is_kept() -> None:
    with cluster(2) as nodes:
        nodes.nodes[0].kill()
        nodes.nodes[0] = KeeperProcess(nodes.base, "node-0", max_memory=3 * MIB)
        nodes.started.append(nodes.nodes[0])
        lengths = nodes.write_shards(NEW, [2 * MIB] * 2)
        with pytest.raises(CapacityError, match=r"node-0: parity-0-0.img needs .* bytes are missing"):
            nodes.nodes[0].call("encode", index=0, **nodes.encode_args(NEW, lengths, 1))
        assert nodes.nodes[0].call("status")["available"] == 3 * MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small tmpfs")
def test_a_full_tmpfs_is_reported_and_leaves_nothing() -> None:
    with cluster(2) as nodes:
        small = nodes.nodes[0].dir
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], check=True)
        try:
            nodes.restart(0)
            lengths = nodes.write_shards(NEW, [4 * MIB] * 2)
            with pytest.raises(CapacityError, match="bytes are missing"):
                nodes.nodes[0].call("encode", index=0, **nodes.encode_args(NEW, lengths, 1))
            assert not nodes.parity_path(0).exists()
        finally:
            nodes.nodes[0].kill()
            subprocess.run(["umount", str(small)], check=True)


def test_a_guest_lives_until_another_generation_is_committed() -> None:
    with cluster(4) as nodes:
        before = protect(nodes, OLD, [MIB + seat for seat in range(4)], parity=2)
        lost = nodes.replace(3)
        plan = plan_restore(
            [node.inventory() for node in nodes.nodes], {0: "node-0", 1: "node-1", 2: "node-2", 3: lost.node}, 1
        )
        assert plan is not None
        guest = replace(plan.ranks[3], node="node-0", slot=GUEST_SLOT + 3)
        peers = {node.node: [node.address["host"], node.address["port"]] for node in nodes.nodes}
        host = nodes.nodes[0]
        host.call("rebuild", **identity(), generation=str(OLD), restore=guest.to_json(), peers=peers)
        path = nodes.shard_path(0, slot=GUEST_SLOT + 3)
        assert path.read_bytes() == before[Path("3/slot-0-0.img")]
        held = [image for image in host.inventory().images if image.slot == GUEST_SLOT + 3]
        assert [(image.seat, image.world, image.generation, image.bad_blocks) for image in held] == [(3, 4, OLD, ())]
        out = memoryview(bytearray(1000))
        with host.client() as client:
            client.read("shard", 0, str(OLD), 4096, out, seat=3)
        assert bytes(out) == before[Path("3/slot-0-0.img")][4096:5096]

        host.call("commit", **identity(), generation=str(OLD), slots=2, procs=1)
        assert path.exists(), "it is of the committed generation"
        nodes.write_shards(NEW, [MIB] * 4, slot=1)
        assert host.call("commit", **identity(), generation=str(NEW), slots=2, procs=1)["removed"] == 1
        assert not path.exists()
        assert sorted(p.name for p in host.dir.glob("*.img")) == ["parity-0-0.img", "slot-0-0.img", "slot-0-1.img"]


def test_a_commit_removes_what_a_resize_left() -> None:
    with cluster(2, procs=2) as nodes:
        lengths = nodes.write_shards(OLD, [MIB] * 2, slot=2)
        for reply in nodes.encode(nodes.encode_args(OLD, lengths, 1, slot=2)):
            assert isinstance(reply, dict), reply
        node, later = nodes.nodes[0], Generation.of(NEXT, 30)
        for local_rank, slot in ((0, 0), (1, 2), (3, 0)):
            write_shard(nodes.shard_path(0, local_rank, slot), 0, local_rank, later, MIB, procs=2, world=2)
        node.call("commit", **identity(NEXT), generation=str(later), slots=3, procs=2)
        left = sorted(path.name for path in node.dir.glob("*.img"))
        assert left == ["slot-0-0.img", "slot-0-2.img", "slot-1-2.img"], "parity of a group that is no more, and a rank"


def test_parity_of_the_same_group_stays_for_the_next_build() -> None:
    with cluster(2) as nodes:
        protect(nodes, OLD, [MIB] * 2, parity=1)
        later = Generation.of(NEXT, 30)
        lengths = nodes.write_shards(later, [MIB] * 2, slot=1)
        args = {**nodes.encode_args(later, lengths, 1, slot=1), **identity(NEXT)}
        for reply in nodes.encode(args):
            assert isinstance(reply, dict), reply
        assert nodes.nodes[0].call("commit", **identity(NEXT), generation=str(later), slots=2, procs=1)["removed"] == 0
        assert nodes.parity_path(0).exists()


def test_a_keeper_without_descriptors_goes_on_and_takes_connections_later() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        with cluster(1) as nodes:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            (keeper,) = nodes.nodes
            pid, log = keeper.process.pid, nodes.base / "node-0.log"
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)
            with keeper.client() as early, contextlib.ExitStack() as clients:
                early.call("waiting")
                open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files, hard))
                others = [clients.enter_context(keeper.client()) for _ in range(4)]
                wait_until(lambda: "accepting no connections for now" in log.read_text(), "the keeper says nothing")
                assert early.call("waiting") == {"ok": True, "trouble": None}
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
                assert [other.call("status")["node"] for other in others] == ["node-0"] * 4
            assert log.read_text().count("accepting no connections for now") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
