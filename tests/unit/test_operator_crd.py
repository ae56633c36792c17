"""The CustomResourceDefinition: what lies in the repository is what is made, and it says what it must."""

from __future__ import annotations

from typing import Any

import yaml

from outlast.jobstatus import TrainingJobStatus
from outlast.kube import LONGEST_JOB_NAME
from outlast.resource import fields_of
from outlast_operator.crd import definition, resource_schema, to_yaml
from support.charts import ROOT


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


def test_every_field_is_described() -> None:
    def missing(path: str, schema: dict[str, Any]) -> list[str]:
        found = [] if "description" in schema or path in ("", ".apiVersion", ".kind", ".metadata") else [path]
        for name, inner in schema.get("properties", {}).items():
            found += missing(f"{path}.{name}", inner)
        return found

    assert missing("", resource_schema()) == []
