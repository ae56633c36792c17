"""What a job may write into its Pod templates: a PodTemplateSpec as in a Job, less what Outlast sets itself. Pure.

The schema keeps a template as it is, so what is wrong with it is found here, with the field's path and what to write
instead; what only the API server knows (a field that does not exist, the type of a value) it says when the first Pod is
made: a job with such a template fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from outlast import kube
from outlast.api import TrainingJob
from outlast.resource import shown

JOB_VOLUME, RUN_VOLUME, MEMORY_VOLUME = "outlast-job", "outlast-run", "outlast-memory"
VOLUMES = {JOB_VOLUME: kube.JOB_FOLDER, RUN_VOLUME: kube.RUN_FOLDER, MEMORY_VOLUME: kube.MEMORY_FOLDER}
"""The volumes that Outlast adds, and where it mounts them."""
WORKERS_PATH, HEAD_PATH = "spec.workers.template", "spec.head.template"
DEFAULT_CONTAINER: Mapping[str, Any] = {"name": kube.CONTAINER}
"""Of a template that names no container."""

Problem = tuple[str, str]
"""(Field path, what is wrong and what to write instead)."""

_RESERVED_VARIABLE = re.compile(r"OUTLAST_.*")
_REFUSED: Mapping[str, str] = {
    "hostNetwork": "nodes on one machine would take each other's ports, and no NetworkPolicy would hold: leave it out; "
    "for fast interconnects use the device plugin or the secondary network of your cluster",
    "hostIPC": "/dev/shm would be the machine's own, not the job's: leave it out",
    "hostPID": "the processes of other Pods would be in reach: leave it out",
    "ephemeralContainers": "those are added to a running Pod: kubectl debug",
}
_ONE_SECOND = 1


def problems(job: TrainingJob) -> list[Problem]:
    """What is wrong with the job's templates."""
    found = list(_template_problems(WORKERS_PATH, job.spec.workers.template))
    return found + list(_template_problems(HEAD_PATH, job.spec.head.template))


def pod_spec(template: Mapping[str, Any]) -> Mapping[str, Any]:
    """The template's ``spec``; empty when it has none."""
    found = template.get("spec")
    return found if isinstance(found, Mapping) else {}


def containers(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The containers of a Pod's ``spec``: a nameless one of Outlast's when it has none."""
    return list(spec.get("containers") or [DEFAULT_CONTAINER])


def main_index(found: Sequence[Mapping[str, Any]]) -> int:
    """Which container trains: the one called ``outlast``, else the first."""
    return next((at for at, one in enumerate(found) if one.get("name") == kube.CONTAINER), 0)


def _template_problems(path: str, template: Mapping[str, Any]) -> Iterator[Problem]:
    for name in sorted(template.keys() - {"metadata", "spec"}):
        yield f"{path}.{name}", f"is no field of a PodTemplateSpec: write it below {path}.spec"
    shape = list(_shape_problems(path, template))
    yield from shape
    if shape:
        return
    yield from _metadata_problems(f"{path}.metadata", template.get("metadata") or {})
    spec = pod_spec(template)
    yield from _spec_problems(f"{path}.spec", spec)
    yield from _volume_problems(f"{path}.spec", spec)
    found = containers(spec)
    yield from _container_problems(f"{path}.spec.containers[{main_index(found)}]", found[main_index(found)])


def _shape_problems(path: str, template: Mapping[str, Any]) -> Iterator[Problem]:
    """What is no mapping, or no list of mappings: everything else relies on that."""
    for name in ("metadata", "spec"):
        if not isinstance(template.get(name) or {}, Mapping):
            yield f"{path}.{name}", "must be a mapping"
            return
    spec = pod_spec(template)
    lists = ("containers", "initContainers", "volumes", "topologySpreadConstraints", "tolerations", "imagePullSecrets")
    for name in lists:
        yield from _list_problems(f"{path}.spec.{name}", spec.get(name))
    for name in ("securityContext", "affinity", "nodeSelector"):
        if not isinstance(spec.get(name) or {}, Mapping):
            yield f"{path}.spec.{name}", "must be a mapping"
    for name in ("containers", "initContainers"):
        found = spec.get(name)
        for at, one in enumerate(found if isinstance(found, list) else ()):
            if isinstance(one, Mapping):
                yield from _container_shape(f"{path}.spec.{name}[{at}]", one)


def _container_shape(path: str, container: Mapping[str, Any]) -> Iterator[Problem]:
    for name in ("env", "envFrom", "volumeMounts", "ports"):
        yield from _list_problems(f"{path}.{name}", container.get(name))
    env = container.get("env")
    for at, variable in enumerate(env if isinstance(env, list | tuple) else ()):
        value = variable.get("value") if isinstance(variable, Mapping) else None
        if value is not None and not isinstance(value, str):
            yield f"{path}.env[{at}].value", f"{shown(value)} was given, but a variable is a text: put it into quotes"
    resources = container.get("resources") or {}
    parts: list[Any] = [container.get("securityContext") or {}, resources]
    if isinstance(resources, Mapping):
        parts += [resources.get(name) or {} for name in ("limits", "requests")]
    if not all(isinstance(part, Mapping) for part in parts):
        yield path, "securityContext, resources, resources.limits and resources.requests must be mappings"


def _list_problems(path: str, value: Any) -> Iterator[Problem]:
    if value is None:
        return
    if not isinstance(value, list | tuple) or not all(isinstance(entry, Mapping) for entry in value):
        yield path, "must be a list of mappings"
        return
    for at, entry in enumerate(value):
        if not isinstance(entry.get("name"), str | None):
            yield f"{path}[{at}].name", "must be a text"
            return
    names = [entry.get("name") for entry in value]
    if path.rpartition(".")[2] not in ("containers", "initContainers", "volumes", "env"):
        return
    for at, name in enumerate(names):
        if name is not None and name in names[:at]:
            yield f"{path}[{at}].name", f'"{name}" is given twice; keep one'


def _metadata_problems(path: str, metadata: Mapping[str, Any]) -> Iterator[Problem]:
    for name in sorted(metadata.keys() - {"labels", "annotations", "creationTimestamp"}):
        yield f"{path}.{name}", "is set by Outlast for each Pod: only labels and annotations can be given here"
    for name in ("labels", "annotations"):
        given = metadata.get(name) or {}
        if not isinstance(given, Mapping):
            yield f"{path}.{name}", "must be a mapping"
            continue
        for key in given:
            if str(key).partition("/")[0] == kube.DOMAIN or key == kube.MANAGED_BY_LABEL:
                yield f"{path}.{name}", f'"{key}" is set by Outlast: leave it out'


def _spec_problems(path: str, spec: Mapping[str, Any]) -> Iterator[Problem]:
    for name, why in _REFUSED.items():
        if spec.get(name):
            yield f"{path}.{name}", f"{shown(spec[name])} was given, but {why}"
    policy = spec.get("restartPolicy", "OnFailure")
    if policy != "OnFailure":
        why = "a container is started again in its Pod, beside the snapshots in its memory: leave it out"
        yield f"{path}.restartPolicy", f"{shown(policy)} was given, but {why}"
    if "activeDeadlineSeconds" in spec:
        why = "it would end Pods one by one: write spec.activeDeadlineSeconds, which ends the job"
        yield f"{path}.activeDeadlineSeconds", f"{shown(spec['activeDeadlineSeconds'])} was given, but {why}"
    grace = spec.get("terminationGracePeriodSeconds", kube.GRACE_S)
    if not isinstance(grace, int) or isinstance(grace, bool) or grace < _ONE_SECOND:
        why = "a node that is told to go needs time to hand over: write a whole number of seconds, such as 60"
        yield f"{path}.terminationGracePeriodSeconds", f"{shown(grace)} was given, but {why}"
    for at, one in enumerate([*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]):
        if not one.get("name"):
            yield f"{path}.containers", f"container {at + 1} has no name: give it one, or call it {kube.CONTAINER}"


def _volume_problems(path: str, spec: Mapping[str, Any]) -> Iterator[Problem]:
    for at, volume in enumerate(spec.get("volumes") or ()):
        if volume.get("name") in VOLUMES:
            yield f"{path}.volumes[{at}].name", f'"{volume["name"]}" is a volume of Outlast\'s: call yours otherwise'


def _container_problems(path: str, container: Mapping[str, Any]) -> Iterator[Problem]:
    for name in ("command", "args"):
        if container.get(name):
            why = "this container runs Outlast, which starts the ranks: write the training command as spec.entrypoint"
            yield f"{path}.{name}", f"{shown(container[name])} was given, but {why}"
    for at, variable in enumerate(container.get("env") or ()):
        name = str(variable.get("name", ""))
        if _RESERVED_VARIABLE.fullmatch(name):
            yield f"{path}.env[{at}].name", f'"{name}" is set by Outlast: leave it out'
    for at, mount in enumerate(container.get("volumeMounts") or ()):
        yield from _mount_problems(f"{path}.volumeMounts[{at}]", mount)
    for name in ("stdin", "tty", "lifecycle"):
        if container.get(name):
            yield f"{path}.{name}", f"{shown(container[name])} was given, but this container runs Outlast: leave it out"


def _mount_problems(path: str, mount: Mapping[str, Any]) -> Iterator[Problem]:
    name, place = mount.get("name"), str(mount.get("mountPath", "")).rstrip("/")
    if name in VOLUMES:
        yield f"{path}.name", f'"{name}" is a volume of Outlast\'s: mount one of your own'
    for folder in VOLUMES.values():
        if place == folder or place.startswith(f"{folder}/"):
            yield (
                f"{path}.mountPath",
                f'"{mount["mountPath"]}" lies in {folder}, which is Outlast\'s: mount it elsewhere',
            )
