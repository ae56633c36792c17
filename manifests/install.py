"""Print manifests/install.yaml: the chart with its defaults, for ``kubectl apply -f``, without what only Helm reads.

python manifests/install.py HELM
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

CHART = pathlib.Path(__file__).resolve().parents[1] / "charts" / "outlast"
NAMESPACE = "outlast-system"
HEAD = f"""\
# Made from charts/outlast by `make manifests`: change it there. Needs nothing else:
#   kubectl apply --server-side -f manifests/install.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    app.kubernetes.io/name: outlast
    pod-security.kubernetes.io/enforce: restricted
"""
ONLY_HELM = re.compile(r"^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by): .*\n|^# Source: .*\n", re.MULTILINE)


def manifests(helm: str) -> str:
    """The whole file. Raises CalledProcessError, after Helm's own words, when the chart cannot be rendered."""
    command = [helm, "template", "outlast", str(CHART), "--namespace", NAMESPACE, "--set", "crd.keep=false"]
    command += ["--kube-version", "1.34.0"]  # what Helm takes where it asks no cluster depends on how it was built
    rendered = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout
    return HEAD + ONLY_HELM.sub("", rendered)


if __name__ == "__main__":
    print(manifests(sys.argv[1]), end="")
