"""From what a person types to the TrainingJob that is sent (pure but for reading the files that were named)."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from outlast.api import API_VERSION, KIND, TrainingJob
from outlast.errors import RequestError, SpecError
from outlast.kube import CONTAINER, LONGEST_JOB_NAME
from outlast_operator.memory import parse_quantity
from outlast_operator.podspec import problems
from trainctl.jobfile import load_named
from trainctl.packing import Packed, pack_folder, pack_script, with_code

GPU = "nvidia.com/gpu"
_YAML = (".yaml", ".yml", ".json")
_SHELL = (".sh", ".bash")
_NAMED = 8
_OF_THE_SERVER = frozenset(
    {
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "generation",
        "managedFields",
        "resourceVersion",
        "selfLink",
        "uid",
    }
)
"""What ``kubectl get -o yaml`` writes into a job's metadata, and no new job has yet."""
_NO_LABEL = " is no DNS label: "
_NO_TEXT = re.compile(r'[^"]*[\ud800-\udfff][^"]*')
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_NAME_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE = re.compile(
    r"(?:(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::\d+)?/)?"
    rf"{_NAME_PART}(?:/{_NAME_PART})*(?::\w[\w.-]{{0,127}})?(?:@[A-Za-z0-9+._-]+:[0-9A-Fa-f]{{32,}})?",
    re.ASCII,
)
"""An image's reference. Source: distribution/reference, regexp.go (host, path, tag, digest)."""


@dataclass(frozen=True)
class Flags:
    """A job in flags, for those who have no YAML yet. None: the job's own default."""

    nodes: int | None = None
    spares: int | None = None
    min_nodes: int | None = None
    procs_per_node: int | None = None
    gpus: int | None = None
    cpu: str | None = None
    memory: str | None = None
    image: str | None = None
    env: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()
    store: str | None = None
    snapshot_every: str | None = None
    checkpoint_every: str | None = None

    def given(self) -> list[str]:
        """The flags that were used, as they are typed."""
        return [
            f"--{item.name.replace('_', '-')}" for item in fields(self) if getattr(self, item.name) not in (None, ())
        ]


@dataclass(frozen=True)
class Submission:
    """What was asked for. ``source``: a TrainingJob's file, or a script. ``code``: a folder to send."""

    source: Path
    text: str | None = None
    name: str | None = None
    namespace: str | None = None
    overrides: tuple[str, ...] = ()
    flags: Flags = Flags()
    arguments: tuple[str, ...] = ()
    code: Path | None = None
    no_code: bool = False


@dataclass(frozen=True)
class Prepared:
    """What is sent: the job as JSON, and its code, if any. ``notes`` are for the person."""

    job: dict[str, Any]
    packed: Packed | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.job["metadata"]["namespace"])


def is_job_file(source: Path) -> bool:
    """Whether ``source`` holds a TrainingJob rather than being a script; ``-`` is standard input."""
    return str(source) == "-" or source.suffix.lower() in _YAML


def prepare(asked: Submission, default_namespace: str) -> Prepared:
    """The job to send. Raises RequestError (SpecError for the job) with the remedy."""
    _check_text(asked)
    if is_job_file(asked.source):
        return _from_file(asked, default_namespace)
    return _from_script(asked, default_namespace)


def _check_text(asked: Submission) -> None:
    """Raises RequestError for an argument of bytes that are no text, which Python has as surrogates."""
    typed = [str(asked.source), asked.name, *asked.overrides, *asked.arguments, asdict(asked.flags)]
    found = _NO_TEXT.search(json.dumps(typed, ensure_ascii=False))
    if found:
        raise RequestError(f"{found[0]!a}: it is no UTF-8 text, so that it cannot be sent")


def _from_file(asked: Submission, default_namespace: str) -> Prepared:
    wrong = [*asked.flags.given(), *(["arguments after --"] if asked.arguments else [])]
    if wrong or asked.no_code:
        what = ", ".join(wrong or ["--no-code"])
        raise RequestError(f"{what}: goes with a script; in {asked.source} write it down, or use --set path=value")
    assert asked.text is not None
    job = _load(asked, asked.text, default_namespace)
    packed = pack_folder(asked.code) if asked.code else None
    notes = _forgotten(job, asked.source) if packed is None else _absent(job, asked.code, packed)
    return _prepared(job, packed, notes)


def _from_script(asked: Submission, default_namespace: str) -> Prepared:
    if asked.source.is_dir() and not asked.no_code:
        raise RequestError(
            f"{asked.source}: it is a folder: name the script in it, and send all of it with --code {asked.source}"
        )
    if asked.source.suffix.lower() in _SHELL:
        raise RequestError(
            f"{asked.source}: a script is run by python: name the one that trains, or write a TrainingJob with "
            f"entrypoint: [sh, {asked.source.name}] and send the folder with --code"
        )
    if not asked.name:
        raise RequestError(f"--name: a job from a script needs a name, such as --name {_suggested(asked.source)}")
    packed, script = _code(asked)
    tree = job_tree(asked.name, script, asked.arguments, asked.flags)
    return _prepared(_load(asked, yaml.safe_dump(tree, sort_keys=False), default_namespace), packed, ())


def job_tree(name: str, script: str, arguments: Sequence[str], flags: Flags) -> dict[str, Any]:
    """The TrainingJob that flags describe, with the fields that were given and no others."""
    workers: dict[str, Any] = {}
    named = {
        "replicas": flags.nodes,
        "minReplicas": flags.min_nodes,
        "spares": flags.spares,
        "procsPerWorker": flags.procs_per_node if flags.procs_per_node is not None else flags.gpus,
    }
    workers.update((field_name, value) for field_name, value in named.items() if value is not None)
    container = _container(flags)
    if container:
        workers["template"] = {"spec": {"containers": [{"name": CONTAINER, **container}]}}
    spec: dict[str, Any] = {"entrypoint": ["python", script, *arguments]}
    if flags.env:
        spec["env"] = [_variable(text) for text in flags.env]
    if workers:
        spec["workers"] = workers
    if flags.snapshot_every is not None:
        spec["snapshot"] = {"everySteps": _number_or_text(flags.snapshot_every)}
    if flags.store is not None or flags.checkpoint_every is not None:
        spec["checkpoint"] = _checkpoint(flags)
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec}


def _container(flags: Flags) -> dict[str, Any]:
    """A memory request is also its limit; processor time is requested and not limited, since a limit only slows."""
    if flags.cpu is not None and not _is_cpu(flags.cpu):
        raise RequestError(f"--cpu {flags.cpu}: it is no number of processors: write 4, 0.5 or 500m")
    if flags.gpus is not None and flags.gpus < 1:
        raise RequestError(f"--gpus {flags.gpus}: write 1 or more, or leave it out for nodes without GPUs")
    if flags.image is not None and not _IMAGE.fullmatch(flags.image):
        raise RequestError(f'--image "{flags.image}": it is no image: write registry/name:tag')
    requests = {"cpu": flags.cpu, "memory": flags.memory}
    limits = {"memory": flags.memory, GPU: None if flags.gpus is None else str(flags.gpus)}
    resources = {
        name: kept
        for name, amounts in (("requests", requests), ("limits", limits))
        if (kept := {key: value for key, value in amounts.items() if value is not None})
    }
    wrong = next((name for name in flags.secret if not _OBJECT.fullmatch(name)), None)
    if wrong is not None:
        raise RequestError(f'--secret "{wrong}": it is no name of a Secret: see kubectl get secrets')
    parts = {
        "image": flags.image,
        "envFrom": [{"secretRef": {"name": name}} for name in flags.secret],
        "resources": resources,
    }
    return {name: value for name, value in parts.items() if value}


def _is_cpu(text: str) -> bool:
    try:
        return parse_quantity(text) > 0
    except ValueError:
        return False


def _checkpoint(flags: Flags) -> dict[str, Any]:
    if flags.store is None:
        raise RequestError("--checkpoint-every: there is no store to checkpoint to: add --store s3://bucket/prefix")
    interval = flags.checkpoint_every
    return {"url": flags.store, **({} if interval is None else {"interval": _number_or_text(interval)})}


def _variable(text: str) -> dict[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RequestError(f"--env {text}: write NAME=VALUE")
    return {"name": name, "value": value}


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdecimal() else text


def _code(asked: Submission) -> tuple[Packed | None, str]:
    """The files to send and the script's path where ranks start."""
    if asked.no_code:
        if asked.code:
            raise RequestError("--code and --no-code: give one of them")
        return None, str(asked.source)
    if asked.code is None:
        if not asked.source.is_file():
            raise RequestError(
                f"{asked.source}: there is no such file; if it is in the image, at that path from its working "
                "directory, add --no-code"
            )
        return pack_script(asked.source), asked.source.name
    packed = pack_folder(asked.code)
    return packed, _within(asked.source, asked.code, packed)


def _within(script: Path, folder: Path, packed: Packed) -> str:
    """The script's path in the folder: as seen from here, or from there."""
    sent = {file.path for file in packed.files}
    candidates = [script.as_posix()]
    if script.resolve().is_relative_to(folder.resolve()):
        candidates.insert(0, script.resolve().relative_to(folder.resolve()).as_posix())
    found = next((path for path in candidates if path in sent), None)
    if found is None:
        raise RequestError(f"{script}: it is not among the files of --code {folder}: {', '.join(sorted(sent)[:8])}")
    return found


def _load(asked: Submission, text: str, default_namespace: str) -> TrainingJob:
    """The job with its name and namespace, every check of ``outlast.api`` and of the operator's templates done."""
    overrides = list(asked.overrides)
    if asked.name:
        overrides.append(f"metadata.name={json.dumps(asked.name)}")
    name = "standard input" if str(asked.source) == "-" else str(asked.source)
    job = _loaded(text, name, overrides)
    written = job.metadata.namespace if "namespace" in job.metadata.model_fields_set else None
    if written and asked.namespace and written != asked.namespace:
        raise RequestError(f'-n {asked.namespace}: the job is written for namespace "{written}": leave one of them out')
    if not written:
        job = _loaded(text, name, [*overrides, f"metadata.namespace={json.dumps(default_namespace)}"])
    unmakeable = problems(job)
    if unmakeable:
        raise SpecError(unmakeable)
    misnamed = _name_problem(job.metadata.name)
    if misnamed:
        raise SpecError([("metadata.name", misnamed)])
    return job


def _loaded(text: str, name: str, overrides: Sequence[str]) -> TrainingJob:
    """As ``load_named``; what it says of a job's name is made what Kubernetes allows."""
    try:
        return load_named(text, name, overrides)
    except SpecError as error:
        told = [(path, _of_names(what) if path == "metadata.name" else what) for path, what in error.problems]
        raise SpecError(told) from error


def _of_names(problem: str) -> str:
    """A job's name is shorter than other DNS labels, for its Pods are named after it."""
    subject, is_label, _ = problem.partition(_NO_LABEL)
    if not is_label:
        return problem
    return (
        f"{subject}{_NO_LABEL}write at most {LONGEST_JOB_NAME} of a-z, 0-9 and -, with a letter at the beginning and a "
        "letter or digit at the end"
    )


def _name_problem(name: str) -> str:
    """What the definition of TrainingJobs refuses of a name that is a DNS label; "" when nothing."""
    if len(name) > LONGEST_JOB_NAME:
        return f"it has {len(name)} letters; Pods are named after it: {LONGEST_JOB_NAME} at most"
    return "" if name[0].isalpha() else f'"{name}" must begin with a letter, as the name of its Service does'


def _prepared(job: TrainingJob, packed: Packed | None, notes: tuple[str, ...]) -> Prepared:
    """The fields that were given, and no defaults: those are the server's to fill in."""
    tree = job.model_dump(mode="json", by_alias=True, exclude_unset=True)
    tree["metadata"] = {key: value for key, value in tree["metadata"].items() if key not in _OF_THE_SERVER}
    tree["metadata"]["namespace"] = job.metadata.namespace
    if packed is None:
        return Prepared(tree, None, notes)
    return Prepared(with_code(tree, packed), packed, (*notes, *_not_sent(packed.left_out)))


def _not_sent(paths: Sequence[str]) -> tuple[str, ...]:
    """A note on what lies in the folder of code and is not sent."""
    if not paths:
        return ()
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return (f"not sent (hidden, or links to folders): {', '.join(paths[:_NAMED])}{more}",)


def _script(job: TrainingJob) -> str | None:
    """The Python script that the entrypoint runs, if it runs one."""
    return next((word for word in job.spec.entrypoint[1:2] if word.endswith(".py")), None)


def _forgotten(job: TrainingJob, source: Path) -> tuple[str, ...]:
    """A note where the entrypoint's script lies beside the file, which a Pod does not see."""
    script = _script(job)
    if str(source) == "-" or script is None or not (source.parent / script).is_file():
        return ()
    return (f"{script} beside {source} is not sent: the image's own is run; to send it, add --code {source.parent}",)


def _absent(job: TrainingJob, folder: Path | None, packed: Packed) -> tuple[str, ...]:
    """A note where the entrypoint's script is not in the folder that is sent."""
    script = _script(job)
    sent = {file.path for file in packed.files}
    if script is None or script.startswith("/") or posixpath.normpath(script) in sent:
        return ()
    return (f"{script} is not in --code {folder}, where ranks start: they find it only if the image puts it there",)


def _suggested(source: Path) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", source.stem.lower()).strip("-")
    named = stem if stem[:1].isalpha() else f"job-{stem}"
    return named[:LONGEST_JOB_NAME].strip("-")
