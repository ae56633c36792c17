"""DistributedDataParallel's bucket order is state.

DDP starts with buckets in reverse order of registration and rebuilds them after its first backward in the order in
which gradients arrived. The order decides in which order a sum is taken, hence bits: a restarted run whose first step
used the initial buckets would differ from the undisturbed one. So the order in force at a snapshot is recorded (as
indices of parameters, bucket by bucket) and set again on restore by giving the fresh DDP object a reducer made with
it.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel


def instances(parameters: Iterable[torch.Tensor]) -> list[DistributedDataParallel]:
    """Every DDP object alive that holds one of these parameters, in the order of their first parameter."""
    order = {id(parameter): index for index, parameter in enumerate(parameters)}
    found = []
    for candidate in gc.get_objects():
        if issubclass(type(candidate), DistributedDataParallel):  # isinstance would ask foreign objects for __class__
            places = [order[id(p)] for p in candidate.parameters() if id(p) in order]
            if places:
                found.append((min(places), candidate))
    return [ddp for _, ddp in sorted(found, key=lambda pair: pair[0])]


def bucket_order(ddp: DistributedDataParallel) -> list[list[int]]:
    """The buckets in force: lists of indices into the parameters that DDP reduces."""
    index = {id(parameter): i for i, parameter in enumerate(_reduced(ddp))}
    buckets = ddp.reducer._get_zeros_like_grad_buckets()
    return [[index[id(parameter)] for parameter in bucket.parameters()] for bucket in buckets]


def set_bucket_order(ddp: DistributedDataParallel, order: list[list[int]]) -> None:
    """Give ``ddp`` a new reducer with these buckets; its first backward then adds in that order already.

    Left alone when the order is of another number of parameters. Communication hooks go with it (Python's; built-in
    ones are recorded nowhere: register them after ``protect``), as does what else was set on the reducer.
    """
    now = bucket_order(ddp)
    if order == now or sorted(itertools.chain(*order)) != sorted(itertools.chain(*now)):
        return
    module: Any = torch.distributed
    original = module._compute_bucket_assignment_by_size

    def assignment(*args: Any, **kwargs: Any) -> tuple[list[list[int]], list[int]]:
        limit = original(*args, **kwargs)[1][-1]
        return list(reversed(order)), [limit] * len(order)

    parameters, expect_sparse = ddp._build_params_for_reducer()  # type: ignore[no-untyped-call]
    names = ddp._build_debug_param_to_name_mapping(parameters)  # type: ignore[no-untyped-call]
    ddp.reducer._remove_autograd_hooks()
    module._compute_bucket_assignment_by_size = assignment
    try:
        ddp._ddp_init_helper(parameters, expect_sparse, names, ddp.static_graph)  # type: ignore[no-untyped-call]
    finally:
        module._compute_bucket_assignment_by_size = original
    _equip(ddp)


def rebuild_buckets(ddp: DistributedDataParallel) -> bool:
    """Do now what DDP's next forward would do first: rebuild the buckets, once, if a backward has been seen.

    A collective of DDP's process group, like the rebuild itself. Returns whether they were rebuilt.
    """
    return bool(ddp.reducer._rebuild_buckets())


def is_settled(ddp: DistributedDataParallel) -> bool:
    """Whether the buckets will stay as they are."""
    never_rebuilt = ddp.find_unused_parameters and not ddp.static_graph
    return never_rebuilt or bool(ddp._get_ddp_logging_data().get("has_rebuilt_buckets"))  # type: ignore[no-untyped-call]


def _equip(ddp: DistributedDataParallel) -> None:
    """Set on a new reducer what DDP's constructor, its first forward and the script had set on the one before."""
    module: Any = torch.distributed
    reducer: Any = ddp.reducer
    for hook, state in ddp._comm_hooks:
        module._register_comm_hook(reducer, state, hook)
    if ddp.mixed_precision is not None:
        reducer._set_mixed_precision_param_dtype(ddp.mixed_precision.param_dtype)
    if ddp._lazy_init_ran and any(hasattr(parameter, "_in_backward_optimizers") for parameter in ddp.parameters()):
        reducer._set_optimizer_in_backward()
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        reducer._set_static_graph()
        ddp.logger._set_static_graph()  # type: ignore[union-attr]


def _reduced(ddp: DistributedDataParallel) -> list[torch.Tensor]:
    parameters, _ = ddp._build_params_for_reducer()  # type: ignore[no-untyped-call]
    return list(parameters)
