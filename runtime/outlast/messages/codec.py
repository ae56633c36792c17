"""Frozen dataclasses as JSON and back, by their annotations.

What has its own text form (``Attempt``, ``Generation``) travels as that text, what has its own ``to_json`` as that.
Types decide how a value is read, so integer keys, tuples and nested dataclasses come back as they were.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from outlast.snapshot.identity import Attempt, Generation

_TEXT_FORMS = (Attempt, Generation)


def encode(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as a JSON object."""
    return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}


def decode(kind: type, data: Mapping[str, Any]) -> Any:
    """Read ``encode(value)`` back as the dataclass ``kind``. Raises ValueError when it is none."""
    try:
        return _reader(kind)(data)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"malformed {kind.__name__}: {error}") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, _TEXT_FORMS):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "to_json"):
        return value.to_json()
    return encode(value)


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """A function that reads a value of the annotated type ``kind`` out of plain JSON."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in _TEXT_FORMS:
        return lambda value: kind.parse(value)
    if kind in (int, str):
        return lambda value: kind(value)
    if kind is float:
        return float
    if origin in (Union, types.UnionType):
        return _union_reader(args)
    if origin is tuple:
        return _tuple_reader(args)
    if origin is dict:
        key, item = _reader(args[0]), _reader(args[1])
        return lambda value: {key(k): item(v) for k, v in value.items()}
    if hasattr(kind, "from_json"):
        return lambda value: kind.from_json(value)
    return _dataclass_reader(kind) if dataclasses.is_dataclass(kind) else lambda value: value


def _union_reader(args: tuple[Any, ...]) -> Callable[[Any], Any]:
    real = [arg for arg in args if arg is not type(None)]
    if len(real) != 1:
        return lambda value: value
    read = _reader(real[0])
    return lambda value: None if value is None else read(value)


def _tuple_reader(args: tuple[Any, ...]) -> Callable[[Any], Any]:
    if len(args) == 2 and args[1] is Ellipsis:
        read = _reader(args[0])
        return lambda value: tuple(read(item) for item in value)
    reads = [_reader(arg) for arg in args]
    return lambda value: tuple(read(item) for read, item in zip(reads, value, strict=True))


def _dataclass_reader(kind: Any) -> Callable[[Any], Any]:
    reads = {name: _reader(hint) for name, hint in get_type_hints(kind).items()}
    return lambda value: kind(**{name: reads[name](item) for name, item in value.items()})
