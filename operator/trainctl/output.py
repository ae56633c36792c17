"""``-o``: how objects are written out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

Object = Mapping[str, Any]


class Form(StrEnum):
    """As kubectl has them; ``wide`` is a table with more columns."""

    JSON = "json"
    YAML = "yaml"
    WIDE = "wide"
    NAME = "name"


def plain(resource: Object) -> dict[str, Any]:
    """The resource without the API server's bookkeeping of who wrote which field."""
    meta = {key: value for key, value in resource.get("metadata", {}).items() if key != "managedFields"}
    return {**resource, "metadata": meta}


def write_objects(objects: Sequence[Object], form: Form | None, text: Callable[[], str], *, as_list: bool) -> None:
    """Print ``objects`` as ``form`` says, else ``text()``; ``as_list``: as a List, also when there is one."""
    match form:
        case Form.JSON | Form.YAML:
            items = [plain(item) for item in objects]
            value = {"apiVersion": "v1", "kind": "List", "items": items} if as_list else items[0]
            print(dumped(value, form))
        case Form.NAME:
            for item in objects:
                print(name_of(item))
        case _:
            print(text())


def dumped(value: Object, form: Form) -> str:
    """One value as JSON or YAML, without an end of line at its end."""
    if form is Form.JSON:
        return json.dumps(value, indent=4, ensure_ascii=False)
    from trainctl.yamltext import as_yaml

    return as_yaml(value).rstrip("\n")


def one_of_many(value: Object, form: Form) -> str:
    """A value of a stream as JSON or YAML: a line, or a document."""
    return json.dumps(value) if form is Form.JSON else f"---\n{dumped(value, form)}"


def name_of(resource: Object) -> str:
    """As kubectl writes it: "trainingjob.outlast.dev/x"."""
    return f"trainingjob.outlast.dev/{resource['metadata']['name']}"
