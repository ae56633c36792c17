"""Outlast: training that ends with the result it would have had without faults.

::

    run = outlast.init()
    sampler = outlast.ElasticSampler(len(dataset), global_batch=64, seed=7)
    loader = DataLoader(dataset, batch_sampler=sampler)
    run.protect(model=model, optimizer=optimizer, sampler=sampler)
    for batch in run.steps(loader, total=2000):
        ...

    step = outlast.load("s3://bucket/jobs/default/bytelm", model)  # a checkpoint's weights, without a job

Public names are loaded when first used: ``import outlast`` imports neither torch nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outlast.data import ElasticSampler
    from outlast.rank.stored_weights import load
    from outlast.session import Run, init

__version__ = "0.1.0"
__all__ = ["ElasticSampler", "Run", "__version__", "init", "load"]

_HOME = {
    "ElasticSampler": "outlast.data",
    "Run": "outlast.session",
    "init": "outlast.session",
    "load": "outlast.rank.stored_weights",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'outlast' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
