"""What every mapping of a resource has in common, and how it is told what is wrong with one.

``Part`` is the base of the models of ``outlast.api``. ``explain`` turns pydantic's errors into (field path in YAML
spelling, text) pairs that a person can act on: what was given and what is allowed. Unknown fields get a suggestion: a
sibling that is spelled alike, or the place elsewhere in the resource where a field of this name belongs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from outlast.yamlfile import field_path

_LONGEST_SHOWN = 60
_WANTED = {
    "int_type": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be text: put it in quotes",
    "tuple_type": "must be a list, such as [a, b]",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} entry",
    "literal_error": "must be {expected}",
}


class Part(BaseModel):
    """A mapping of the resource: camelCase in YAML, strict types, no unknown fields, null means absent.

    ``later`` names the fields that the design has and this version has not, with what they would bring: they are
    refused as not there yet rather than as unknown.
    """

    model_config = ConfigDict(
        strict=True,
        defer_build=True,
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
    )
    later: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {*fields_of(cls), *cls.model_fields, *cls.later}
        return {key: value for key, value in data.items() if value is not None or key not in known}

    @classmethod
    def from_yaml_tree(cls, tree: Mapping[str, Any]) -> Self:
        """Validate what a YAML file holds (names in camelCase only). Raises pydantic.ValidationError."""
        return cls.model_validate(tree, by_alias=True, by_name=False)


@cache
def fields_of(part: type[Part]) -> Mapping[str, type[Part] | None]:
    """The names of a mapping's fields in YAML; with the mapping's class where the field is one, or a list of one."""
    return {(info.alias or name): _part_in(info.annotation) for name, info in part.model_fields.items()}


def explain(error: ValidationError, root: type[Part]) -> list[tuple[str, str]]:
    """``error`` of validating ``root`` as (path, text) pairs, in the order of the fields."""
    return [_explain_one(dict(detail), root) for detail in error.errors(include_url=False)]


def shown(value: object) -> str:
    """``value`` as it would stand in a YAML file, cut when long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


def _explain_one(detail: dict[str, Any], root: type[Part]) -> tuple[str, str]:
    kind, steps, given = detail["type"], tuple(detail["loc"]), detail["input"]
    if kind == "extra_forbidden":
        return field_path(steps), _unknown(root, steps)
    if kind == "missing":
        return field_path(steps), f"is missing ({_description(root, steps)})"
    if kind == "value_error":
        return field_path(steps), str(detail["ctx"]["error"])
    if steps and steps[-1] == "[key]":
        steps = steps[:-1]
    wanted = _WANTED.get(kind, detail["msg"]).format(**detail.get("ctx", {}))
    if kind == "string_type" and isinstance(given, dict | list):
        wanted = "must be text"
    return field_path(steps), f"{shown(given)} was given, but it {wanted}"


def _unknown(root: type[Part], steps: tuple[str | int, ...]) -> str:
    parent, name = _part_at(root, steps[:-1]), str(steps[-1])
    if parent is None:
        return "there is no such field here"
    if name in parent.later:
        return f"is not there yet: {parent.later[name]}"
    fields = list(fields_of(parent))
    near = _nearest(name, fields)
    if near:
        return f'there is no such field; did you mean "{near}"?'
    elsewhere = [path for path in _all_paths(root, ()) if path[-1] == name]
    if elsewhere:
        return f'there is no such field here; did you mean "{field_path(elsewhere[0])}"?'
    return f"there is no such field; allowed are {', '.join(sorted(fields))}"


def _nearest(name: str, fields: list[str]) -> str | None:
    plain = {field.lower(): field for field in fields}
    found = difflib.get_close_matches(name.lower().replace("_", "").replace("-", ""), plain, n=1, cutoff=0.7)
    return plain[found[0]] if found else None


def _all_paths(part: type[Part], before: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, inner in fields_of(part).items():
        yield (*before, name)
        if inner is not None:
            yield from _all_paths(inner, (*before, name))


def _part_at(root: type[Part], steps: tuple[str | int, ...]) -> type[Part] | None:
    part: type[Part] | None = root
    for step in steps:
        if isinstance(step, str) and part is not None:
            part = fields_of(part).get(step)
    return part


def _part_in(annotation: Any) -> type[Part] | None:
    """The Part inside ``Part``, ``Part | None`` or ``tuple[Part, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation
    inner = (_part_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((part for part in inner if part is not None), None)


def _description(root: type[Part], steps: tuple[str | int, ...]) -> str:
    parent = _part_at(root, steps[:-1])
    fields = parent.model_fields.values() if parent else ()
    found = next((info.description for info in fields if info.alias == steps[-1]), None)
    return found.removesuffix(".") if found else "required"
