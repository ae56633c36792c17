"""Reads a YAML file as Kubernetes does, but says more: one document, no key twice, fields set by path from outside.

Knows nothing of what the fields mean. The result is what JSON could hold: mappings, lists, text, numbers, true, false
and null; a date stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, cast

import yaml

from outlast.errors import SpecError

_STRING = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"
_NULL = "tag:yaml.org,2002:null"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_STEP = re.compile(r"\[([^\[\]]+)\]|([^.\[\]]+)")
_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[[^\[\]]+\])*")


class _Loader(yaml.SafeLoader):
    """The safe loader without dates, as JSON has none."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own class attribute)
        first: [pair for pair in pairs if pair[0] != _TIMESTAMP]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def field_path(steps: tuple[str | int, ...]) -> str:
    """A path in YAML spelling: ``("spec", "env", 0, "name")`` is ``spec.env[0].name``."""
    path = ""
    for step in steps:
        if isinstance(step, int) or not re.fullmatch(r"[\w-]*", step):
            path += f"[{step}]"
        else:
            path += f".{step}" if path else step
    return path


def read_mapping(text: str) -> dict[str, Any]:
    """The one mapping that ``text`` holds.

    Raises SpecError: no YAML, no document or several, no mapping, a key given twice, a key that is not text.
    """
    tree = _parse(text, ())
    if tree is None:
        raise SpecError([("", "the file is empty; it must hold one TrainingJob")])
    if not isinstance(tree, dict):
        raise SpecError(
            [("", f"the file holds {_kind(tree)}; it must hold a mapping (apiVersion, kind, metadata, spec)")]
        )
    return cast("dict[str, Any]", tree)


def set_field(tree: dict[str, Any], assignment: str) -> None:
    """Set one field of ``tree`` in place by ``path=value``: ``spec.env[0].value=x``, where the value is YAML.

    Missing mappings on the way are made; an index one past a list's end appends; a null takes the field away.
    Raises SpecError.
    """
    path, equals, text = assignment.partition("=")
    steps = _parse_path(path.strip())
    if not equals or not steps:
        raise SpecError([(path, "an override is written path=value, such as spec.workers.replicas=2")])
    value = _parse(text, steps)
    target: Any = tree
    for depth, step in enumerate(steps[:-1]):
        _check_container(target, step, steps[:depth])
        target = _descend(target, step, steps[depth + 1])
    _check_container(target, steps[-1], steps[:-1])
    _assign(target, steps[-1], value)


def _parse(text: str, path: tuple[str | int, ...]) -> Any:
    """What stands in ``text``: a file, or with a ``path`` the value there. None when nothing does."""
    try:
        loader = _Loader(text)
        root = _only_document(loader)
        if root is None:
            return None
        problems = list(_problems(root, path, set(), ()))
        if problems:
            raise SpecError(problems)
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise SpecError([(field_path(path), _describe(error))]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError([(field_path(path), f"this is no YAML: {error}")]) from error
    except RecursionError as error:
        raise SpecError([(field_path(path), "this is nested too deeply to be read")]) from error


def _parse_path(path: str) -> tuple[str | int, ...]:
    """The steps of a path in YAML spelling; none when it is no path."""
    if not _PATH.fullmatch(path):
        return ()
    steps = [bracketed or plain for bracketed, plain in _STEP.findall(path)]
    return (steps[0], *(int(step) if step.isdecimal() else step for step in steps[1:]))


def _check_container(target: Any, step: str | int, before: tuple[str | int, ...]) -> None:
    if isinstance(target, dict) or (isinstance(target, list) and isinstance(step, int) and step <= len(target)):
        return
    if isinstance(target, list):
        wanted = f"has {len(target)} entries; write an index of 0 to {len(target)} in brackets, not {step!r}"
    else:
        wanted = f"is {_kind(target)}, so that {step!r} cannot be set in it"
    raise SpecError([(field_path(before), wanted)])


def _descend(target: Any, step: str | int, following: str | int) -> Any:
    """The container at ``step``, made when there is none."""
    there: Any = None
    if isinstance(target, dict):
        there = target.get(str(step))
    elif int(step) < len(target):
        there = target[step]
    if there is None:
        there = [] if isinstance(following, int) else {}
        _assign(target, step, there)
    return there


def _assign(target: Any, step: str | int, value: Any) -> None:
    if isinstance(target, dict):
        if value is None:
            target.pop(str(step), None)
        else:
            target[str(step)] = value
    elif step == len(target):
        target.append(value)
    else:
        target[step] = value


def _only_document(loader: _Loader) -> yaml.Node | None:
    """The node of the one document, if there is one; empty ones do not count."""
    documents: list[yaml.Node] = []
    while loader.check_node():
        node = loader.get_node()
        if node is not None and not (isinstance(node, yaml.ScalarNode) and node.tag == _NULL):
            documents.append(node)
    if len(documents) > 1:
        raise SpecError(
            [("", f"the file holds {len(documents)} documents; it must hold one TrainingJob: split it at ---")]
        )
    return documents[0] if documents else None


def _problems(
    node: yaml.Node, path: tuple[str | int, ...], seen: set[int], above: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    """Keys given twice or not text, and values that hold themselves, below ``node``; an alias is looked at once."""
    if id(node) in above:
        yield field_path(path), "holds itself, by an alias; write it out"
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _problems(child, (*path, index), seen, above)
    elif isinstance(node, yaml.MappingNode):
        yield from _mapping_problems(node, path, seen, above)


def _mapping_problems(
    node: yaml.MappingNode, path: tuple[str | int, ...], seen: set[int], above: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    lines: dict[str, int] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        if key.tag == _MERGE:
            yield from _problems(child, path, seen, above)
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != _STRING:
            shown = f'"{key.value}"' if isinstance(key, yaml.ScalarNode) else "a collection"
            yield (
                field_path(path),
                f"line {line}: {shown} cannot name a field here; a name must be text: put it in quotes",
            )
            continue
        if key.value in lines:
            where = f"lines {lines[key.value]} and {line}"
            yield field_path((*path, key.value)), f"is given twice ({where}); keep one"
        lines[key.value] = line
        yield from _problems(child, (*path, key.value), seen, above)


def _describe(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"this is no YAML{where}: {error.problem or error.context}"


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else f"{value!r}"
