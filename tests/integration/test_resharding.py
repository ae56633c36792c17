"""Restoring on another number of ranks: real gloo worlds on this machine, their tensors compared bit for bit.

The file is its own program: ``python test_resharding.py FOLDER WORLDS`` runs one world after the other, each forked from
a process that has imported torch. The first ones write images, the others load them in all ways that images are read.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(280)

GENERATION = "1-abababababababab-5"
TOKEN = "resharding"


@dataclass(frozen=True)
class World:
    """``mesh``: () for DDP, ("plain",) for no wrapper at all, else the sizes of an FSDP2 or HSDP mesh. ``source``: where
    images are read from."""

    role: str
    ranks: int
    mesh: tuple[Any, ...]
    source: str = "path"


def run_worlds(folder: pathlib.Path, *worlds: World) -> list[dict[str, Any]]:
    """Run worlds in a process of their own; what rank 0 of each reports."""
    command = [sys.executable, __file__, str(folder), json.dumps([asdict(world) for world in worlds])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((folder / f"report-{index}.json").read_text()) for index in range(len(worlds))]


def check(reports: list[dict[str, Any]]) -> None:
    for report in reports[1:]:
        assert report["different"] == [], report
        assert report["compared"] > 20
        assert report["step"] == 5


def test_fsdp_on_any_number_of_ranks_bit_for_bit(tmp_path: pathlib.Path) -> None:
    write = World("write", 4, (4,))
    reads = [
        World("read", ranks, (ranks,), source)
        for ranks, source in ((3, "path"), (2, "keeper"), (1, "path"), (5, "store"))
    ]
    reports = run_worlds(tmp_path, write, *reads)
    check(reports)
    assert len({report["seeds"] for report in reports[1:]}) == 4
    assert [report["source"] for report in reports[1:]] == ["memory-peer", "memory-peer", "memory-peer", "object"]
    for report, share in zip(reports[1:], (1 / 3, 1 / 2, 1, 1 / 5), strict=True):
        most = (share + 0.2) * report["state_bytes"]  # uneven shards: a fifth more than the mean share
        assert report["most_read"] <= most + report["extra_bytes"], report


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 2), (1, 2)), ((3, 2), (2, 2)), ((2, 2), (3,)), ((4,), (2, 2)), ((2, 2), ("plain",)), ((1,), (2, 1))],
)
def test_hsdp_and_fsdp_meshes_of_any_size(
    tmp_path: pathlib.Path, before: tuple[Any, ...], after: tuple[Any, ...]
) -> None:
    ranks = [1 if mesh == ("plain",) else mesh[0] * (mesh[1] if len(mesh) == 2 else 1) for mesh in (before, after)]
    reports = run_worlds(tmp_path, World("write", ranks[0], before), World("read", ranks[1], after, "store"))
    check(reports)


@pytest.mark.parametrize("mesh", [(), ("plain",)])
def test_replicated_models_on_another_number_of_ranks(tmp_path: pathlib.Path, mesh: tuple[Any, ...]) -> None:
    reports = run_worlds(
        tmp_path, World("write", 3, mesh), World("read", 2, mesh, "keeper"), World("read", 3, mesh, "path")
    )
    check(reports)
    assert reports[0]["cut"] > 0
    assert reports[1]["notes"] == ["per-rank-state"]
    assert reports[1]["note"].startswith("notes: ")
    assert reports[2]["notes"] == []
    assert reports[2]["own"] == 0, "the same world goes on with its own states"


def test_a_mesh_that_shards_nothing_takes_a_plain_snapshot(tmp_path: pathlib.Path) -> None:
    check(run_worlds(tmp_path, World("write", 2, ("plain",)), World("read", 3, (3,))))


def test_weights_alone_load_into_plain_and_sharded_models(tmp_path: pathlib.Path) -> None:
    reports = run_worlds(tmp_path, World("write", 4, (2, 2)), World("load", 3, (3,)), World("load", 1, ("plain",)))
    for report in reports[1:]:
        assert report["different"] == []
        assert report["step"] == 5


# --- one rank of a world ----------------------------------------------------------------------------------------------


def build(mesh: tuple[Any, ...]) -> dict[str, Any]:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.nn.parallel import DistributedDataParallel

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 7)  # rows that no world shares out evenly
            self.columns = nn.Linear(60, 7, bias=False)
            self.norm = nn.BatchNorm1d(7)
            self.low = nn.Linear(7, 9, dtype=torch.bfloat16)
            self.embed = nn.Embedding(200, 7)
            self.tied = nn.Linear(7, 200, bias=False)
            self.tied.weight = self.embed.weight
            self.big = nn.Linear(200, 2000)
            self.small = nn.Parameter(torch.randn(2))  # less than the world
            self.frozen = nn.Parameter(torch.randn(5, 3), requires_grad=False)

        def forward(self, x: Any) -> Any:
            h = self.norm(self.first(x) + self.columns(x.repeat(1, 4)[:, :60]))
            h = h + self.low(h.bfloat16())[:, :7].float() * self.small.sum()
            return self.big(self.tied(h + self.embed(torch.arange(len(x))))) + self.frozen.sum()

    class LocalMoments(torch.optim.Optimizer):
        """Keeps plain tensors of the local part's shape, as third-party optimizers do."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    local, gradient = local_part(parameter), local_part(parameter.grad)
                    state = self.state[parameter]
                    if not state:
                        state["moment"], state["seen"], state["both"] = torch.zeros_like(local), 0, torch.zeros(2)
                    moment = local_part(state["moment"]).mul_(0.5).add_(gradient)
                    state["seen"] += 1
                    state["both"] += 1
                    local.sub_(moment, alpha=group["lr"])

    torch.manual_seed(3)
    net = Net()
    wrapped: Any = net
    if mesh == ():
        wrapped = DistributedDataParallel(net)
    elif mesh != ("plain",):
        names = ("shard",) if len(mesh) == 1 else ("replicate", "shard")
        device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
        fully_shard(net.columns, mesh=device_mesh, shard_placement_fn=lambda _: Shard(1))
        for part in (net.low, net.big):
            fully_shard(part, mesh=device_mesh)
        fully_shard(net, mesh=device_mesh)
    rest = [net.first.weight, net.first.bias, net.small]
    named = [p for p in net.parameters() if p.requires_grad and not any(p is q for q in rest)]
    optimizer, local = torch.optim.AdamW(named, lr=1e-2), LocalMoments(rest)
    return {
        "model": wrapped,
        "optimizer": optimizer,
        "local": local,
        "notes": {"own": 0, "average": net.first.weight.detach().clone()},
    }


def local_part(tensor: Any) -> Any:
    return getattr(tensor, "_local_tensor", tensor.detach())


def train(objects: dict[str, Any], steps: int, rank: int, late: bool) -> None:
    import torch
    import torch.distributed as dist

    torch.manual_seed(100 + rank)
    for step in range(steps):
        objects["model"](torch.randn(6, 16)).square().mean().backward()
        for parameter in objects["model"].parameters():
            if parameter.grad is not None and not hasattr(parameter, "device_mesh"):
                dist.all_reduce(parameter.grad)
        objects["optimizer"].step()
        if step >= 1 or not late:
            objects["local"].step()
        objects["optimizer"].zero_grad()
        objects["local"].zero_grad()


def whole(objects: dict[str, Any]) -> dict[str, Any]:
    """Every parameter, buffer and optimizer state, gathered."""
    from torch.distributed.tensor import DTensor

    from outlast.protect.leaves import clean

    def gather(tensor: Any, like: Any) -> Any:
        if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(
                tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()

    found: dict[str, Any] = {}
    names = {id(p): clean(name) for name, p in objects["model"].named_parameters()}
    for name, tensor in (*objects["model"].named_parameters(), *objects["model"].named_buffers()):
        found[clean(name)] = gather(tensor, tensor)
    for key in ("optimizer", "local"):
        for parameter, state in objects[key].state.items():
            for name, value in state.items():
                label = f"{key}/{names[id(parameter)]}/{name}"
                cut = name in ("moment", "exp_avg", "exp_avg_sq")  # the others are whole, if of some local part's shape
                found[label] = gather(value, parameter if cut else value) if hasattr(value, "shape") else value
    found["average"] = gather(objects["notes"]["average"], objects["notes"]["average"])
    return found


def write(folder: pathlib.Path, world: World, rank: int) -> dict[str, Any]:
    """Train, write this rank's image, and what all ranks have together."""
    import torch
    import torch.distributed as dist

    from outlast.protect import rng
    from outlast.protect.capture import Capture, Seat
    from outlast.protect.leaves import Collector
    from outlast.protect.replicas import ReplicaVote, digest
    from outlast.snapshot.identity import Generation

    objects = build(world.mesh)
    train(objects, 5, rank, late=True)
    objects["notes"]["own"] = rank
    expected = whole(objects)
    capture = Capture(Collector(objects), Seat(folder / "images", rank, world.ranks, rank, rank))
    moment = capture.observe({"step": 5, "rng": rng.capture(), "ddp": [], "environment": {}})
    store = dist.FileStore(str(folder / "vote"), world.ranks)
    vote = ReplicaVote(store, rank, world.ranks)
    digests = {leaf.key: digest(leaf.tensor) for leaf in moment.leaves.values() if leaf.lazy}
    cut = vote.agree("vote", digests, threading.Event()) if world.ranks > 1 else {}
    capture.make_plan(moment, cut)
    capture.start(moment, Generation.parse(GENERATION), 0, fresh=False).wait(60)
    if rank == 0:
        torch.save(expected, folder / "expected.pt")
    return {"cut": len(cut)}


class NoteLink:
    """Stands for the agent's link: keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def send(self, op: str, **fields: Any) -> None:
        self.sent.append((op, fields))


def compare(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    import torch

    different = sorted(set(found) ^ set(expected))
    for name in set(found) & set(expected):
        mine, theirs = found[name], expected[name]
        if isinstance(theirs, torch.Tensor):
            same = mine.dtype == theirs.dtype and mine.shape == theirs.shape and torch.equal(mine, theirs)
        else:
            same = mine == theirs
        different += [] if same else [name]
    return different


def read(folder: pathlib.Path, world: World, rank: int) -> dict[str, Any]:
    """Load the images, compare with what was written, and train on."""
    import torch
    import torch.distributed as dist

    from outlast.protect.leaves import Collector
    from outlast.rank.restoring import restore

    objects, link, count = build(world.mesh), NoteLink(), [0]
    places = json.loads((folder / f"images-{world.source}.json").read_text())
    plan = {"generation": GENERATION, "direct": True, "world": len(places), "sources": {}}
    message = {"op": "restore", "plan": plan, "images": places}
    with counting(count):
        restored = restore(link, message, Collector(objects), None, rank, world.ranks)  # type: ignore[arg-type]
    found = whole(objects)
    restored.set_generators(rank, world.ranks)
    draws: list[Any] = [None] * world.ranks
    dist.all_gather_object(draws, (float(torch.rand(())), random.random(), count[0]))
    assert len({draw[:2] for draw in draws}) == world.ranks, "every rank draws other numbers"
    different = compare(found, torch.load(folder / "expected.pt"))
    own = objects["notes"]["own"]
    train(objects, 1, rank, late=False)
    notes = [fields for op, fields in link.sent if op == "note"]
    sizes = [path.stat().st_size for path in sorted((folder / "images").iterdir())]
    return {
        "different": different,
        "compared": len(found),
        "step": restored.step,
        "own": own,
        "source": restored.source,
        "seeds": draws[0][0],
        "notes": [note["kind"] for note in notes],
        "note": notes[0]["text"] if notes else "",
        "most_read": max(draw[2] for draw in draws),
        "state_bytes": sum(sizes),
        "extra_bytes": len(sizes) * 96 * 1024,  # headers, JSON states, gaps between rows
    }


def load(folder: pathlib.Path, world: World, rank: int) -> dict[str, Any]:
    """``outlast.load`` from a checkpoint that consists of the images."""
    import torch

    import outlast

    objects = build(world.mesh)
    step = outlast.load(f"file://{folder}/store/jobs/test", objects["model"])
    names = [n for n, _ in (*objects["model"].named_parameters(), *objects["model"].named_buffers())]
    expected = torch.load(folder / "expected.pt")
    found = {name: value for name, value in whole(objects).items() if name in names}
    return {"different": compare(found, {name: expected[name] for name in names}), "step": step}


@contextlib.contextmanager
def counting(count: list[int]) -> Iterator[None]:
    """Count the bytes that are asked of images."""
    from outlast.checkpoint.reading import ObjectShard
    from outlast.protect.shards import LocalPieces
    from outlast.rank.sources import RemoteShard

    def counted(kind: Any) -> Any:
        original = kind.read_many

        def read_many(self: Any, reads: Any) -> None:
            count[0] += sum(len(target) for _, target in reads)
            original(self, reads)

        return original, read_many

    replaced = [(kind, *counted(kind)) for kind in (LocalPieces, RemoteShard, ObjectShard)]
    for kind, _, new in replaced:
        kind.read_many = new
    try:
        yield
    finally:
        for kind, old, _ in replaced:
            kind.read_many = old


# --- the program: one world after the other -----------------------------------------------------------------------------


def be_rank(folder: pathlib.Path, index: int, world: World, rank: int) -> None:
    import torch.distributed as dist

    rendezvous = f"file://{folder}/rendezvous-{index}"
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world.ranks, timeout=limit)
    report = {"write": write, "read": read, "load": load}[world.role](folder, world, rank)
    if rank == 0:
        (folder / f"report-{index}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def run_world(folder: pathlib.Path, index: int, world: World) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=be_rank, args=(folder, index, world, rank)) for rank in range(world.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    if any(codes):
        raise SystemExit(f"ranks of {world} ended with {codes}")


def publish(folder: pathlib.Path, ranks: int) -> None:
    """Write down where images can be read, start a keeper that serves them, and make a checkpoint of them."""
    from outlast.checkpoint.archive import Archive
    from outlast.checkpoint.manifest import ClaimMark, JobMark, Manifest, image_key
    from outlast.checkpoint.store import open_store
    from outlast.snapshot.identity import Generation
    from outlast.snapshot.image import ImageFile
    from outlast.snapshot.keeper import Keeper, KeeperConfig
    from outlast.snapshot.stored import StoredImage

    paths = [folder / "images" / f"slot-{rank}-0.img" for rank in range(ranks)]
    config = KeeperConfig("node", str(folder / "images"), "127.0.0.1", TOKEN, str(folder / "keeper.json"))
    keeper = Keeper(config)
    threading.Thread(target=keeper.serve, daemon=True).start()
    url, generation = f"file://{folder}/store/jobs/test", Generation.parse(GENERATION)
    store = open_store(url)
    archive, stored = Archive(store), []
    mark, claim = JobMark("jobs", "test", "id"), ClaimMark(1, "ab", "here")
    archive.claim(mark, claim, None)
    for rank, path in enumerate(paths):
        key, image = image_key(generation, rank), ImageFile.open(path)
        store.upload(key, memoryview(path.read_bytes()))
        stored.append(StoredImage(rank, rank, 0, key, path.stat().st_size, str(image.digest)))
        image.close()
    archive.commit(Manifest(mark, generation, 5, ranks, 1, "2026-01-01T00:00:00Z", tuple(stored)), claim)
    places: dict[str, list[dict[str, Any]]] = {
        "path": [{"path": str(path)} for path in paths],
        "keeper": [
            {"host": keeper.host, "port": keeper.port, "local_rank": rank, "seat": rank} for rank in range(ranks)
        ],
        "store": [{"url": url, "key": image.key} for image in stored],
    }
    for source, where in places.items():
        (folder / f"images-{source}.json").write_text(json.dumps(dict(enumerate(where))))


def main(folder: pathlib.Path, worlds: list[World]) -> None:
    import torch
    import torch._dynamo
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    (folder / "images").mkdir()
    (folder / "token").write_text(TOKEN)
    os.environ["OUTLAST_TOKEN_FILE"] = str(folder / "token")
    for index, world in enumerate(worlds):
        run_world(folder, index, world)
        if world.role == "write":
            publish(folder, world.ranks)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), [World(**{**w, "mesh": tuple(w["mesh"])}) for w in json.loads(sys.argv[2])])
