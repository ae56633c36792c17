"""The CustomResourceDefinition, made from ``outlast.api``: ``python -m outlast_operator.crd`` prints it as YAML.

Pydantic's JSON schema becomes a structural one (Kubernetes, "Specifying a structural schema"): references are put in
place, ``null`` goes (an absent field is absent), what only a PodTemplateSpec knows is kept as it is. What a schema
cannot say, or cannot say in words, is said in CEL: here (``RULES``), and by the types of ``outlast.quantities``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from outlast.api import API_VERSION, ENV_NAME, KIND, LARGEST_CHOSEN_GROUP, SET_BY_OUTLAST, TrainingJob
from outlast.kube import LONGEST_JOB_NAME

Schema = dict[str, Any]

PLURAL, SINGULAR, SHORT = "trainingjobs", "trainingjob", "tj"
GROUP, VERSION = API_VERSION.split("/")

_KEPT = (
    "description",
    "default",
    "enum",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "pattern",
    "x-kubernetes-int-or-string",
    "x-kubernetes-validations",
)


@dataclass(frozen=True)
class Rule:
    """A CEL rule at ``path`` below the resource ("": of the whole; ``[]``: of each entry of a list), and what it tells
    people when it does not hold."""

    path: str
    rule: str
    message: str


_GROUPS = (
    "((has(self.snapshot.erasure.groupSize) ? "
    f"(self.workers.replicas + self.snapshot.erasure.groupSize - 1) / self.snapshot.erasure.groupSize : "
    f"(self.workers.replicas + {LARGEST_CHOSEN_GROUP - 1}) / {LARGEST_CHOSEN_GROUP}))"
)
_COUNT = f"({_GROUPS} < self.workers.replicas / 2 ? {_GROUPS} : self.workers.replicas / 2)"
_SMALLEST_GROUP = f"(self.workers.replicas / ({_COUNT} > 1 ? {_COUNT} : 1))"
_ERASURE = "self.snapshot.erasure"


WITHOUT_PODS = ("Suspended", "Succeeded", "Failed")
"""Phases in which no Pod is made or left to run; of a phase that another version wrote nobody knows that."""


def _fixed(field: str) -> Rule:
    """A field of the spec that may change only while the job is suspended and has no Pods. ``spec.suspend`` alone does
    not tell: it can be set and taken back before the Pods have gone. A job without a status has none yet."""
    new, old = f"self.spec.{field}", f"oldSelf.spec.{field}"
    parts = ["spec", *field.split(".")]
    present = " && ".join(f"has(%s.{'.'.join(parts[: i + 1])})" for i in range(1, len(parts)))
    places = len(parts) - 1
    same = f"(({present % (('self',) * places)}) == ({present % (('oldSelf',) * places)}))"
    equal = f"(!({present % (('self',) * places)}) || {new} == {old})"
    suspended = "(self.spec.suspend || oldSelf.spec.suspend)"
    phases = ", ".join(f"'{phase}'" for phase in WITHOUT_PODS)
    bare = f"(!has(oldSelf.status) || !has(oldSelf.status.phase) || oldSelf.status.phase in [{phases}])"
    return Rule(
        "",
        f"({suspended} && {bare}) || ({same} && {equal})",
        f"spec.{field} cannot change while the job runs: set spec.suspend to true, and wait for the phase Suspended; a "
        "job that has ended does not run again: delete it and make it anew (trainctl submit --replace)",
    )


def _store(path: str, wanted: str) -> tuple[Rule, ...]:
    """What ``outlast.storeurl`` refuses of a URL, in its words; ``wanted``: what to write."""
    return (
        Rule(path, "self.matches('^(s3://|file:///+[^/]).*')", f"write {wanted}"),
        Rule(
            path,
            "!self.startsWith('s3://') || self.matches('^s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](/|$)')",
            "a bucket's name has 3 to 63 of a-z, 0-9, - and .: write it after s3://",
        ),
        Rule(path, r"!self.matches(r'[?#\s\p{Z}\x00-\x1f\x7f\x{85}]')", "?, # and blanks may not stand in it"),
        Rule(
            path,
            r"!self.matches(r'^(s3://|file:///)(.*/)?(/+[^/]|\.\.?(/|$))')",
            "must be written out: without //, . and .. in its path",
        ),
    )


_CHECKPOINT = "s3://bucket/prefix/<namespace>/<name> or file:///folder/<namespace>/<name>, and @STEP behind it"

RULES: tuple[Rule, ...] = (
    Rule(
        "",
        f"self.metadata.name.size() <= {LONGEST_JOB_NAME}",
        f"metadata.name must have at most {LONGEST_JOB_NAME} characters: the names of its Pods are host names",
    ),
    Rule(
        "",
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        "metadata.name must begin with a letter, as the name of its Service does, and go on with a-z, 0-9 and -, "
        "without dots, and with a letter or digit at its end",
    ),
    Rule(
        "spec.workers",
        "!has(self.minReplicas) || self.minReplicas <= self.replicas",
        "minReplicas must be at most replicas",
    ),
    Rule("spec", "self.entrypoint[0].trim() != ''", "entrypoint must begin with a program, such as python"),
    Rule(
        "spec",
        f"self.workers.replicas > 1 || !has({_ERASURE}.groupSize)",
        "snapshot.erasure.groupSize: one node has no other to hold parity: leave it out",
    ),
    Rule(
        "spec",
        f"self.workers.replicas > 1 || !has({_ERASURE}.parity)",
        "snapshot.erasure.parity: one node has no other to hold parity: leave it out",
    ),
    Rule(
        "spec",
        f"!has({_ERASURE}.groupSize) || self.workers.replicas == 1 || {_ERASURE}.groupSize <= self.workers.replicas",
        "snapshot.erasure.groupSize must be at most workers.replicas",
    ),
    Rule(
        "spec",
        f"!has({_ERASURE}.parity) || self.workers.replicas == 1 || {_ERASURE}.parity < {_SMALLEST_GROUP}",
        "snapshot.erasure.parity must be less than the nodes of a redundancy group: lower it, or raise groupSize or "
        "workers.replicas",
    ),
    Rule(
        "spec.env[].name",
        f"self.matches('^{ENV_NAME.pattern}$')",
        "cannot name a variable: write letters, digits and _ . -, and no digit first",
    ),
    Rule(
        "spec.env[].name",
        f"!self.matches('^({SET_BY_OUTLAST.pattern})$')",
        "is set by Outlast for each rank: remove it here",
    ),
    *_store("spec.checkpoint.url", "s3://bucket/prefix or file:///folder"),
    *_store("spec.checkpoint.restoreFrom", _CHECKPOINT),
    Rule(
        "spec.checkpoint.restoreFrom",
        "!self.startsWith('s3://') || self.matches('^s3://[^/]*/+[^/@]')",
        f"names a bucket, not a job: write {_CHECKPOINT}",
    ),
    Rule(
        "spec.checkpoint.restoreFrom",
        "!self.matches('@[^/]*/*$') || self.matches('/[^/@]+@[0-9]+/*$')",
        "what follows @ is no step: write @12000, or leave it out for the newest",
    ),
    *(
        _fixed(field)
        for field in (
            "entrypoint",
            "env",
            "workers.procsPerWorker",
            "workers.failureDomain",
            "workers.template",
            "head.template",
            "snapshot.erasure",
            "checkpoint.url",
            "checkpoint.restoreFrom",
        )
    ),
)

LIMITS: Mapping[str, Mapping[str, int]] = {
    "spec.env": {"maxItems": 1000},
    "spec.env[].name": {"maxLength": 256},
    "spec.checkpoint.url": {"maxLength": 1024},
    "spec.checkpoint.restoreFrom": {"maxLength": 1024},
}
"""Sizes that nobody comes near: without them the API server has to expect rules to cost more than it allows."""

COLUMNS: tuple[Mapping[str, Any], ...] = (
    {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Step", "type": "integer", "jsonPath": ".status.step"},
    {"name": "Workers", "type": "integer", "jsonPath": ".status.workers.ready"},
    {"name": "Goodput", "type": "string", "jsonPath": ".status.goodput"},
    {"name": "Restarts", "type": "integer", "jsonPath": ".status.restartCount"},
    {"name": "Checkpoint", "type": "date", "jsonPath": ".status.checkpoint.time"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
)


def definition() -> dict[str, Any]:
    """The whole CustomResourceDefinition."""
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": resource_schema()},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.workers.replicas",
                "statusReplicasPath": ".status.workers.ready",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": [dict(column) for column in COLUMNS],
    }
    names = {
        "plural": PLURAL,
        "singular": SINGULAR,
        "kind": KIND,
        "listKind": f"{KIND}List",
        "shortNames": [SHORT],
        "categories": ["all", "training"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def resource_schema() -> Schema:
    """The structural schema of a TrainingJob, with its CEL rules."""
    source = TrainingJob.model_json_schema(by_alias=True, mode="serialization")
    schema = _structural(source, source["$defs"])
    schema["properties"]["apiVersion"] = {"type": "string"}
    schema["properties"]["kind"] = {"type": "string"}
    schema["properties"]["metadata"] = {"type": "object"}
    schema["required"] = ["spec"]
    for path, limits in LIMITS.items():
        _at(schema, path).update(limits)
    for rule in RULES:
        rules = _at(schema, rule.path).setdefault("x-kubernetes-validations", [])
        rules.append({"rule": rule.rule, "message": rule.message})
    return schema


def _at(schema: Schema, path: str) -> Schema:
    """The schema of the field at ``path``, as in ``Rule``."""
    for step in path.split(".") if path else ():
        name = step.removesuffix("[]")
        schema = schema["properties"][name]
        if name != step:
            schema = schema["items"]
    return schema


def _structural(node: Mapping[str, Any], known: Mapping[str, Any]) -> Schema:
    """One schema without references, titles and nulls."""
    node = _resolved(node, known)
    kept = {key: node[key] for key in _KEPT if key in node and node[key] is not None}
    if "description" in kept:
        kept["description"] = kept["description"].split("\n\nRaises ")[0]  # is for who calls Python
    if node.get("x-kubernetes-int-or-string"):
        return {**kept, "anyOf": [{"type": "integer"}, {"type": "string"}]}
    if "const" in node:
        return {**kept, "type": "string", "enum": [node["const"]]}
    kind = node.get("type", "object")
    schema: Schema = {**kept, "type": kind}
    if kind == "integer":
        schema["format"] = "int64"
    elif kind == "array":
        schema["items"] = _structural(node["items"], known)
        _as_map(schema)
    elif kind == "object":
        _fill_object(schema, node, known)
    return schema


def _resolved(node: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """``node`` with its reference in place, its own words winning; of ``X or null`` the X."""
    found = dict(node)
    while "$ref" in found or _is_optional(found):
        if "$ref" in found:
            target = known[found.pop("$ref").rsplit("/", 1)[1]]
            found = {**target, **found}
        else:
            inner = next(choice for choice in found.pop("anyOf") if choice.get("type") != "null")
            found = {**inner, **found}
    return found


def _is_optional(node: Mapping[str, Any]) -> bool:
    return any(choice.get("type") == "null" for choice in node.get("anyOf", ()))


def _fill_object(schema: Schema, node: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    properties = node.get("properties")
    if properties:
        schema["properties"] = {name: _structural(value, known) for name, value in properties.items()}
        required = [name for name in node.get("required", ()) if name in properties]
        if required:
            schema["required"] = required
        if "default" in schema:
            schema["default"] = {}  # the fields' own defaults fill it
        return
    values = node.get("additionalProperties")
    if isinstance(values, Mapping) and values:
        schema["additionalProperties"] = _structural(values, known)
    else:
        schema["x-kubernetes-preserve-unknown-fields"] = True


def _as_map(schema: Schema) -> None:
    """Lists of named things merge by name, and a name that comes twice is refused."""
    items = schema["items"].get("properties", {})
    for key in ("name", "type"):
        if key in items and key in schema["items"].get("required", ()):
            schema["x-kubernetes-list-type"] = "map"
            schema["x-kubernetes-list-map-keys"] = [key]
            return
    if not items:
        schema["x-kubernetes-list-type"] = "atomic"


def to_yaml() -> str:
    """The definition as it lies in manifests/crd.yaml and in the chart."""
    head = "# Made from outlast.api by `make manifests`: change it there.\n"
    return head + yaml.safe_dump(definition(), sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    print(to_yaml(), end="")
