"""A TrainingJob's file as a person has named it: what is wrong with it as a whole is told with its name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import yaml

from outlast.api import TrainingJob, load
from outlast.errors import RequestError, SpecError
from outlast.yamlfile import read_mapping

MOST_VALUES = 50_000
"""Values of a file, those that aliases repeat counted each time: the API server takes no object that large."""


def read_text(path: Path) -> str:
    """The file's text. Raises RequestError."""
    try:
        return path.read_text()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: it is no text") from error


def load_named(text: str, name: str, overrides: Sequence[str] = ()) -> TrainingJob:
    """The job in the ``text`` of the file ``name``, as ``outlast.api.load`` reads it. Raises SpecError."""
    text = _without_tabs(text)
    if _values(text) > MOST_VALUES:
        raise SpecError(
            [(name, f"it holds more than {MOST_VALUES} values, those that aliases repeat among them: leave some out")]
        )
    try:
        read_mapping(text)
    except SpecError as error:
        raise SpecError([(path or name, what) for path, what in error.problems]) from error
    return load(text, overrides)


def _without_tabs(text: str) -> str:
    """JSON is YAML, but for tabs between its values; within them it has none."""
    if "\t" not in text:
        return text
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text.replace("\t", " ")


def _values(text: str) -> int:
    """How many there are once all aliases are written out; 0 for what ``read_mapping`` has more to say about."""
    try:
        counts: dict[int, int] = {}
        return sum(_values_below(node, counts) for node in yaml.compose_all(text, yaml.SafeLoader) if node is not None)
    except (yaml.YAMLError, ValueError, RecursionError):
        return 0


def _values_below(node: yaml.Node, counts: dict[int, int]) -> int:
    """Of ``node`` and what is in it; ``counts``: of nodes that were met before, by which a value that holds itself
    ends."""
    if id(node) not in counts:
        counts[id(node)] = 1
        children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        below = 0 if isinstance(node, yaml.ScalarNode) else sum(_values_below(child, counts) for child in children)
        counts[id(node)] = 1 + below
    return counts[id(node)]
