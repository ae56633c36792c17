"""The head Pod's template where the job gives none, or one without an image: the workers', as far as it fits. Pure.

Head and nodes run the same versions of Outlast and Ray, so the image is the workers'. Resources are not: the head has
no ranks. Nor are other containers, claims of devices, and where nodes keep away from each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outlast import kube
from outlast.api import TrainingJobSpec
from outlast_operator.template import containers, main_index, pod_spec

HEAD_REQUESTS: Mapping[str, str] = {"cpu": "250m", "memory": "1Gi"}
"""Of a head whose template asks for nothing: Ray's head and the controller."""

_SECRETS = "imagePullSecrets"
_KEPT = (
    "serviceAccountName",
    "automountServiceAccountToken",
    _SECRETS,
    "volumes",
    "securityContext",
    "tolerations",
    "nodeSelector",
    "priorityClassName",
    "preemptionPolicy",
    "schedulerName",
    "runtimeClassName",
    "dnsPolicy",
    "dnsConfig",
    "hostAliases",
    "enableServiceLinks",
)
_KEPT_OF_CONTAINER = (
    "name",
    "image",
    "imagePullPolicy",
    "workingDir",
    "env",
    "envFrom",
    "volumeMounts",
    "securityContext",
)
_IMAGE = ("image", "imagePullPolicy")


def head_template(spec: TrainingJobSpec) -> dict[str, Any]:
    """The PodTemplateSpec that the head Pod is made of."""
    own, workers = spec.head.template, spec.workers.template
    source = pod_spec(workers)
    main = containers(source)[main_index(containers(source))]
    return _completed(own, source, main) if own else _derived(workers, source, main)


def _derived(template: Mapping[str, Any], spec: Mapping[str, Any], main: Mapping[str, Any]) -> dict[str, Any]:
    container = {name: main[name] for name in _KEPT_OF_CONTAINER if name in main}
    container["resources"] = {"requests": dict(HEAD_REQUESTS)}
    derived = {name: spec[name] for name in _KEPT if name in spec}
    derived["containers"] = [container]
    affinity = (spec.get("affinity") or {}).get("nodeAffinity")
    if affinity:
        derived["affinity"] = {"nodeAffinity": affinity}
    return {"metadata": template.get("metadata") or {}, "spec": derived}


def _completed(own: Mapping[str, Any], source: Mapping[str, Any], main: Mapping[str, Any]) -> dict[str, Any]:
    """A template of the head's own, with the workers' image, what it is pulled with, and modest requests where it is
    silent."""
    spec = dict(pod_spec(own))
    found = [dict(one) for one in containers(spec)]
    container = found[main_index(found)]
    container.setdefault("name", kube.CONTAINER)
    if not container.get("image"):
        container |= {name: main[name] for name in _IMAGE if name in main}
        if _SECRETS in source and not spec.get(_SECRETS):
            spec[_SECRETS] = source[_SECRETS]
    if not container.get("resources"):
        container["resources"] = {"requests": dict(HEAD_REQUESTS)}
    return {**own, "spec": {**spec, "containers": found}}
