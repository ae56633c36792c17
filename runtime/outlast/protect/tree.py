"""Nested Python state as JSON plus named tensors, without pickle.

``flatten`` turns what a ``state_dict()`` returns into a JSON value and a list of (name, tensor); ``unflatten`` turns it
back. JSON values stand for themselves; everything else is a one-key object whose key starts with ``$``: tuples, sets,
dicts whose keys are not plain strings, bytes, tensors, NumPy arrays and scalars, complex numbers, dtypes. Floats keep
their bits (JSON is written with ``repr``).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from outlast.errors import StateError

Json = Any
Named = list[tuple[str, torch.Tensor]]


def flatten(value: object, path: str, tensors: Named) -> Json:
    """The JSON form of ``value``; appends each tensor found to ``tensors`` under a name that begins with ``path``.

    Raises StateError that names the path and the type of what has no JSON form.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
        return value
    if isinstance(value, torch.Tensor):
        tensors.append((path, value))
        return {"$tensor": path}
    if isinstance(value, Mapping):
        return _flatten_mapping(value, path, tensors)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        items = [flatten(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, (set, frozenset)):
        tag = "$set" if isinstance(value, set) else "$frozenset"
        return {tag: [flatten(item, path, tensors) for item in sorted(value, key=repr)]}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode()}
    return _flatten_rare(value, path, tensors)


def _flatten_mapping(value: Mapping[Any, object], path: str, tensors: Named) -> Json:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: flatten(item, f"{path}/{key}", tensors) for key, item in value.items()}
    pairs = [[flatten(key, path, tensors), flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]
    return {"$dict": pairs}


def _flatten_rare(value: object, path: str, tensors: Named) -> Json:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        tensors.append((path, torch.from_numpy(np.asarray(value, order="C"))))
        return {"$array": path}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {"$scalar": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, complex):
        return {"$complex": [value.real, value.imag]}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, (int, float)):  # subclasses (enums among them) would come back as plain numbers
        return {"$int": int(value)} if isinstance(value, int) else {"$float": float(value)}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise StateError(
        f"state {path!r} is a {kind}, which a snapshot cannot hold: give it a state_dict() of numbers, strings, "
        f"lists, dicts, tensors and NumPy arrays"
    )


def unflatten(value: Json, tensor: Callable[[str], torch.Tensor]) -> Any:
    """The Python value of a JSON form; ``tensor(name)`` supplies each tensor."""
    if isinstance(value, list):
        return [unflatten(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (key := next(iter(value))).startswith("$"):
        return _unflatten_tagged(key, value[key], tensor)
    return {key: unflatten(item, tensor) for key, item in value.items()}


def tensor_names(value: Json) -> Iterator[str]:
    """The names of the tensors that a JSON form refers to, in its order."""
    if isinstance(value, list):
        for item in value:
            yield from tensor_names(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if len(value) == 1 and key in ("$tensor", "$array"):
                yield item
            else:
                yield from tensor_names(item)


def _unflatten_tagged(tag: str, body: Json, tensor: Callable[[str], torch.Tensor]) -> Any:
    match tag:
        case "$tensor":
            return tensor(body)
        case "$array":
            return tensor(body).numpy()
        case "$tuple":
            return tuple(unflatten(item, tensor) for item in body)
        case "$set":
            return {_hashable(unflatten(item, tensor)) for item in body}
        case "$frozenset":
            return frozenset(_hashable(unflatten(item, tensor)) for item in body)
        case "$dict":
            return {_hashable(unflatten(key, tensor)): unflatten(item, tensor) for key, item in body}
        case "$bytes":
            return base64.b64decode(body)
        case "$scalar":
            return np.frombuffer(base64.b64decode(body[1]), dtype=np.dtype(body[0]))[0]
        case "$complex":
            return complex(*body)
        case "$dtype":
            return getattr(torch, body)
        case "$int" | "$float":
            return body
    raise StateError(f"a snapshot's state has the tag {tag!r}, which this version of outlast does not know")


def _hashable(value: Any) -> Any:
    """A set where only a frozen one can have been: earlier images do not tell them apart."""
    return frozenset(value) if isinstance(value, set) else value
