"""Checkpoints for tests, made in this process: real images of models on several ranks, put into a folder and committed.

Ranks are played one after the other: FSDP2 shards without talking when the process group is torch's fake one, and
gradients are given instead of computed, so that no collective is needed and a plain model does exactly the same.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import ClaimMark, JobMark, Manifest, image_key, rfc3339
from outlast.checkpoint.store import open_store
from outlast.protect.capture import Capture, Seat
from outlast.protect.leaves import Collector
from outlast.protect.plan import cut_of, group_equal
from outlast.protect.replicas import digest
from outlast.protect.weights import write_weights
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import ImageFile
from outlast.snapshot.kernel import Checksums
from outlast.snapshot.stored import StoredImage
from support.plain_net import Net, make_optimizer

JOB = JobMark("default", "test", "0123456789abcdef")
CLAIM = ClaimMark(1, "ab" * 8, "controller")
WORLD = 3

Objects = dict[str, Any]


def train(objects: Objects, steps: int) -> None:
    """Optimizer steps with gradients that depend on nothing but the parameter's name and the step."""
    model = objects["model"]
    for step in range(steps):
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            whole = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = _as(parameter, whole) if isinstance(parameter, DTensor) else whole
        objects["optimizer"].step()
        objects["optimizer"].zero_grad()
    model.norm.running_mean += 0.5


def _as(parameter: DTensor, whole: torch.Tensor) -> DTensor:
    """This rank's part of a tensor that all ranks have, without a collective."""
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def build(shard: Callable[[nn.Module], None] = lambda model: None, steps: int = 3) -> Objects:
    torch.manual_seed(5)
    model = Net()
    shard(model)
    objects = {"model": model, "optimizer": make_optimizer(model), "notes": {"seen": [1, 2]}}
    train(objects, steps)
    return objects


def weights_digest(objects: Mapping[str, Any]) -> str:
    """As a run reports it at its end."""
    modules = {key: value for key, value in objects.items() if isinstance(value, nn.Module)}
    return write_weights(modules, None, 1)


@contextmanager
def as_rank(rank: int, world: int = WORLD) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(model: nn.Module) -> None:
    """FSDP2 over all ranks. The mesh's name keeps DTensor from taking another rank's mesh out of its caches."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(f"as_{dist.get_rank()}",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded_images(folder: pathlib.Path, generation: Generation) -> None:
    """The images of ``WORLD`` ranks of an FSDP model."""
    for rank in range(WORLD):
        with as_rank(rank):
            write_image(build(sharded), folder, rank, generation, {})


def replicated_images(folder: pathlib.Path, generation: Generation, objects: Objects) -> None:
    """The images of ``WORLD`` ranks that hold everything alike, cut into parts."""
    leaves = Collector(objects).collect().leaves.values()
    digests = {leaf.key: found for leaf in leaves if leaf.lazy and (found := digest(leaf.tensor)) is not None}
    groups = group_equal(dict.fromkeys(range(WORLD), digests))
    for rank in range(WORLD):
        write_image(objects, folder, rank, generation, cut_of(rank, groups))


def write_image(
    objects: Objects, folder: pathlib.Path, rank: int, generation: Generation, cut: Mapping[str, Any]
) -> None:
    place = folder / f"rank-{rank}"
    place.mkdir(parents=True, exist_ok=True)
    capture = Capture(Collector(objects), Seat(place, rank, WORLD, rank, 0))
    moment = capture.observe({"step": generation.step})
    capture.make_plan(moment, cut)
    capture.start(moment, generation, 0, fresh=True).wait(60)
    capture.close()


def checkpoint(url: str, folder: pathlib.Path, generation: Generation) -> None:
    """Put the images in ``folder`` into the store at ``url`` and commit them."""
    with closing(open_store(url)) as store:
        archive = Archive(store)
        archive.claim(JOB, CLAIM, None)
        images = []
        for rank in range(WORLD):
            path = folder / f"rank-{rank}" / "slot-0-0.img"
            data, key = path.read_bytes(), image_key(generation, rank)
            store.upload(key, memoryview(data))
            images.append(StoredImage(rank, rank, 0, key, len(data), _checksum(path)))
        created = rfc3339(1_700_000_000.0 + generation.step)
        archive.commit(Manifest(JOB, generation, generation.step, WORLD, 1, created, tuple(images)), CLAIM)


def _checksum(path: pathlib.Path) -> str:
    import xxhash

    image = ImageFile.open(path)
    sums: Checksums = image.checksums()
    image.close()
    return f"{xxhash.xxh64_intdigest(sums.astype('<u8').tobytes()):016x}"
