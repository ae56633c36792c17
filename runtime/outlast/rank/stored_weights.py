"""A checkpoint's weights in a model, for evaluation: without a job, and without a process group for a plain model.

::

    step = outlast.load("s3://bucket/jobs/default/bytelm@1200", model)
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import Manifest, parse_reference
from outlast.checkpoint.reading import ObjectShard
from outlast.checkpoint.store import Store, open_store
from outlast.errors import CheckpointError, ObjectMissing, RequestError
from outlast.protect.reload import load_module
from outlast.protect.shards import ShardReader, Shards


def load(url: str, model: nn.Module, step: int | None = None, *, name: str | None = None) -> int:
    """Load the weights (parameters and buffers) of a checkpoint into ``model``; returns the checkpoint's step.

    url: a job's own, ``<checkpoint.url>/<namespace>/<name>``, perhaps with ``@STEP``; without a step the newest. model:
    plain, or sharded over any mesh: then every rank calls it, and reads only its part. name: what the module was called
    in ``run.protect``, where several were protected.

    Buffers that ``state_dict()`` leaves out are loaded where both have them in one shape, and left alone else.

    Raises RequestError when there is no such checkpoint or module, StateError that names the tensors that do not fit,
    CheckpointError for objects that do not verify, and StoreUnavailable or StoreDenied as the store does.
    """
    job, at = parse_reference(url)
    if step is not None and at is not None and step != at:
        raise RequestError(f"load was given step={step} and {url}: give one step")
    store = open_store(job)
    with contextlib.closing(store):
        archive = Archive(store)
        entry = archive.find(at if step is None else step)
        try:
            shards = _shards(store, archive.manifest(entry))
            load_module(_module(shards, name), model, shards)
        except (ObjectMissing, CheckpointError):
            archive.check_named(entry)
            raise
    return entry.step


def _shards(store: Store, manifest: Manifest) -> Shards:
    def open_shard(rank: int) -> ShardReader:
        image = manifest.images[rank]
        return ObjectShard(store, image.key, manifest.generation, checksum=image.checksum)

    label, turn = f"the checkpoint of step {manifest.step} at {store.url}", _rank()
    return Shards(open_shard(0), open_shard, 0, len(manifest.images), True, turn=turn, label=label)


def _rank() -> int:
    """Ranks of a sharded model spread their reads over the replicas."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if initialized else 0


def _module(shards: Shards, name: str | None) -> str:
    modules: list[str] = shards.state()["weights"]["modules"]
    if name in modules:
        return str(name)
    held = ", ".join(modules) or "none"
    if name is not None:
        raise RequestError(f"{shards.label} has no module called {name!r}: it has {held}")
    if len(modules) != 1:
        raise RequestError(f"{shards.label} has not one module but these: {held}. Say which by name=")
    return modules[0]
