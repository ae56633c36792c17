"""The chart as Helm renders it, for tests. ``make golden`` writes the golden files anew: read their difference."""

from __future__ import annotations

import functools
import pathlib
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import yaml

from support.stores import lab

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "outlast"
GOLDEN = ROOT / "tests" / "golden" / "chart"
KUBERNETES = "1.34.0"

VALUE_SETS: Mapping[str, Mapping[str, Any]] = {
    "defaults": {},
    "dev": {"image": {"tag": "dev"}, "replicas": 1, "rbac": {"aggregate": False}, "crd": {"keep": False}},
    "guarded": {
        "image": {"repository": "images.example.com/ml/outlast-operator", "tag": "1.2.3", "pullSecrets": ["pull"]},
        "trainingImage": "images.example.com/ml/training:7",
        "namespaces": ["vision", "speech"],
        "replicas": 3,
        "crd": {"install": False},
        "serviceAccount": {"name": "trainer", "annotations": {"example.com/role": "none"}},
        "logLevel": "debug",
        "extraArgs": ["--workers=8"],
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"team": "ml"},
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "networkPolicy": {
            "enabled": True,
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "observability"}}}],
        },
        "serviceMonitor": {"enabled": True, "interval": "15s", "labels": {"release": "prometheus"}},
    },
}
"""What the golden files were rendered with; ``guarded`` sets all that has no effect on others."""


@functools.cache
def helm() -> str | None:
    """Helm's command, None where there is none."""
    command = lab()
    if found := shutil.which("helm"):
        return found
    if command is None:
        return None
    assets = subprocess.run([command, "assets"], capture_output=True, text=True, timeout=120, check=False)
    path = pathlib.Path(assets.stdout.strip()) / "helm"
    return str(path) if assets.returncode == 0 and path.exists() else None


def run_helm(*arguments: str, values: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm with ``values`` on its standard input, whatever its status is."""
    command = helm()
    assert command is not None, "no helm here: the caller has to ask helm() first"
    given = [] if values is None else ["--values", "-"]
    if arguments[0] in ("template", "lint") and "--kube-version" not in arguments:
        given += ["--kube-version", KUBERNETES]  # what Helm takes where it asks no cluster depends on how it was built
    text = yaml.safe_dump(dict(values or {}))
    return subprocess.run(
        [command, *arguments, *given], input=text, capture_output=True, text=True, timeout=60, check=False
    )


def render(values: Mapping[str, Any]) -> str:
    """The manifests of a release "outlast" in the namespace "outlast-system"."""
    done = run_helm("template", "outlast", str(CHART), "--namespace", "outlast-system", values=values)
    assert done.returncode == 0, done.stderr
    return done.stdout


def split(text: str) -> list[dict[str, Any]]:
    """The objects in a stream of YAML documents."""
    return [document for document in yaml.safe_load_all(text) if document]


def without_crd(text: str) -> str:
    """``text`` without the CRD, which is made from ``outlast.api`` and has its own tests."""
    parts = [part for part in text.split("---\n") if "kind: CustomResourceDefinition" not in part]
    return "---\n".join(parts)


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, values in VALUE_SETS.items():
        (GOLDEN / f"{name}.yaml").write_text(without_crd(render(values)))


if __name__ == "__main__":
    main()
