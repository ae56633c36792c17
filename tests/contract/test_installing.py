"""What lies in manifests/, on a real API server: it takes all of it, and the examples are valid jobs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest

from support.apiserver import ApiServer, api_server, eventually
from support.charts import ROOT

MANIFESTS = ROOT / "manifests"


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with api_server() as found:
        yield found


@pytest.fixture(scope="module")
def installed(server: ApiServer) -> ApiServer:
    server.kubectl("apply", "-f", str(MANIFESTS / "install.yaml"))
    eventually("the resource is served", lambda: "trainingjobs" in server.kubectl("api-resources").stdout)
    return server


def versions(server: ApiServer) -> dict[str, str]:
    items = json.loads(server.kubectl("get", "-o", "json", "-f", str(MANIFESTS / "install.yaml")).stdout)["items"]
    return {f"{item['kind']}/{item['metadata']['name']}": item["metadata"]["resourceVersion"] for item in items}


def test_applied_again_nothing_changes(installed: ApiServer) -> None:
    before = versions(installed)
    assert {"Deployment/outlast-operator", "CustomResourceDefinition/trainingjobs.outlast.dev"} <= set(before)
    installed.kubectl("apply", "-f", str(MANIFESTS / "install.yaml"))
    assert versions(installed) == before


@pytest.mark.parametrize("path", sorted((MANIFESTS / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(installed: ApiServer, path: pathlib.Path) -> None:
    """Nothing in them is unknown to the definition either: ``--validate=strict`` refuses such fields."""
    made = installed.kubectl("apply", "--dry-run=server", "--validate=strict", "-o", "json", "-f", str(path)).stdout
    assert json.loads(made)["spec"]["recovery"]["maxRestarts"], "defaults are there"


def test_an_unknown_field_is_told(installed: ApiServer) -> None:
    job = (MANIFESTS / "examples" / "first.yaml").read_text().replace("replicas: 2", "replica: 2")
    done = installed.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=job, check=False)
    assert done.returncode != 0
    assert "spec.workers.replica" in done.stderr
