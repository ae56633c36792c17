"""manifests/: install.yaml is what the chart says, and the examples are jobs."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from outlast.api import load
from support.charts import ROOT, helm, split

MANIFESTS = ROOT / "manifests"
EXAMPLES = sorted((MANIFESTS / "examples").glob("*.yaml"))


@pytest.mark.skipif(helm() is None, reason="helm is needed: it is neither on PATH nor in a lab's assets")
def test_install_is_up_to_date() -> None:
    command = [sys.executable, str(MANIFESTS / "install.py"), str(helm())]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert (MANIFESTS / "install.yaml").read_text() == made, "manifests/install.yaml is not the chart's: make manifests"


def test_install_is_whole_and_of_one_namespace() -> None:
    parts = split((MANIFESTS / "install.yaml").read_text())
    assert parts[0]["kind"] == "Namespace", "kubectl applies in order"
    kinds = {part["kind"] for part in parts}
    assert {"CustomResourceDefinition", "Deployment", "ServiceAccount", "ClusterRole", "Role"} <= kinds
    places = {part["metadata"]["namespace"] for part in parts if "namespace" in part["metadata"]}
    assert places == {parts[0]["metadata"]["name"]}


def test_the_readme_puts_the_images_that_are_built_into_install() -> None:
    """By its sed, and it warns of taking it back."""
    readme = (ROOT / "README.md").read_text()
    (script,) = re.findall(r"`sed '(.*)' manifests/install.yaml \| kubectl apply -f -`", readme)
    made = subprocess.run(["sed", script, str(MANIFESTS / "install.yaml")], capture_output=True, text=True, check=True)
    (deployment,) = [part for part in split(made.stdout) if part["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "outlast-operator:dev"
    assert "--training-image=outlast-training:dev" in container["args"]
    for page in (readme, (ROOT / "docs" / "operations.md").read_text()):
        assert "**" in page.partition("`kubectl delete -f manifests/install.yaml`")[2][:30]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_jobs(path: pathlib.Path) -> None:
    job = load(path.read_text())
    assert job.metadata.name == path.stem
    assert load(job.to_yaml()) == job


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} == {"first", "bytelm", "elastic", "queued", "gpus"}
