"""The CustomResourceDefinition: what lies in the repository is what is made, and it says what it must."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import yaml

from outlast.jobstatus import Phase, TrainingJobStatus
from outlast.kube import LONGEST_JOB_NAME
from outlast.resource import fields_of
from outlast_operator.crd import RULES, WITHOUT_PODS, definition, resource_schema, to_yaml
from support.charts import ROOT

FIXED = [rule.message.split()[0].removeprefix("spec.") for rule in RULES if "oldSelf" in rule.rule]


def version() -> dict[str, Any]:
    (found,) = definition()["spec"]["versions"]
    return dict(found)


def test_the_files_are_up_to_date() -> None:
    made = to_yaml()
    for path in ("manifests/crd.yaml", "charts/outlast/files/crd.yaml"):
        assert (ROOT / path).read_text() == made, f"{path} is not what outlast.api says: make manifests"
    assert yaml.safe_load(made) == definition()


def test_making_it_again_makes_the_same() -> None:
    assert to_yaml() == to_yaml()


def test_scale_knows_its_pods() -> None:
    scale = version()["subresources"]["scale"]
    assert scale == {
        "specReplicasPath": ".spec.workers.replicas",
        "statusReplicasPath": ".status.workers.ready",
        "labelSelectorPath": ".status.selector",
    }
    assert "status" in version()["subresources"]


def test_names_are_limited() -> None:
    rules = [rule["rule"] for rule in resource_schema()["x-kubernetes-validations"]]
    assert f"self.metadata.name.size() <= {LONGEST_JOB_NAME}" in rules


def test_printer_columns_point_at_what_there_is() -> None:
    columns = version()["additionalPrinterColumns"]
    assert [column["name"] for column in columns] == [
        "Phase",
        "Step",
        "Workers",
        "Goodput",
        "Restarts",
        "Checkpoint",
        "Age",
    ]
    for column in columns:
        place = resource_schema()
        path = column["jsonPath"].strip(".").split(".")
        for name in path if path[0] != "metadata" else ():
            place = place["properties"][name]
        assert column["type"] in ("date", "string") or place["type"] == column["type"]


def test_the_status_has_the_fields_of_the_contract() -> None:
    status = resource_schema()["properties"]["status"]
    assert set(status["properties"]) == set(fields_of(TrainingJobStatus))


def test_descriptions_say_nothing_to_who_calls_python() -> None:
    assert resource_schema()["description"] == "One training job: the custom resource, or the same YAML run locally."
    assert "Raises" not in to_yaml()


def test_amounts_say_what_to_write_instead() -> None:
    """Where there is a pattern, the API server prints the pattern."""

    def amounts(schema: dict[str, Any]) -> list[dict[str, Any]]:
        inner = [found for part in schema.get("properties", {}).values() for found in amounts(part)]
        return [schema, *inner] if "x-kubernetes-int-or-string" in schema else inner

    found = amounts(resource_schema()["properties"]["spec"])
    assert len(found) == 9
    for schema in found:
        assert "pattern" not in schema
        assert [rule["message"].startswith("write ") for rule in schema["x-kubernetes-validations"]] == [True]


def test_only_phases_without_pods_let_fixed_fields_change() -> None:
    """Those that are not known, as of another version, do not."""
    rules = [rule.rule for rule in RULES if "oldSelf" in rule.rule]
    assert len(rules) == len(FIXED)
    assert all("oldSelf.status.phase in ['Suspended', 'Succeeded', 'Failed']" in rule for rule in rules)
    assert set(WITHOUT_PODS) <= set(get_args(Phase))


@pytest.mark.parametrize("field", FIXED)
def test_the_operations_page_names_what_is_fixed(field: str) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| `entrypoint`") and "refused" in line]
    names = re.findall(r"`([a-zA-Z.]+)`", row)
    assert field in names or field.partition(".")[2] in names


def test_explanations_are_true_of_a_cluster() -> None:
    spec = resource_schema()["properties"]["spec"]["properties"]
    assert "asks for them again" in spec["recovery"]["properties"]["startTimeout"]["description"]
    assert "first given Pods" in spec["activeDeadlineSeconds"]["description"]


def test_every_field_is_described() -> None:
    def missing(path: str, schema: dict[str, Any]) -> list[str]:
        found = [] if "description" in schema or path in ("", ".apiVersion", ".kind", ".metadata") else [path]
        for name, inner in schema.get("properties", {}).items():
            found += missing(f"{path}.{name}", inner)
        return found

    assert missing("", resource_schema()) == []
