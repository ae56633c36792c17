"""What a job's checkpoints are: the head object, the line of checkpoints that it names, and their manifests. Pure.

``head.json`` is the catalogue and the commit point; how it moves: ``outlast.checkpoint.line``. Its line is in the order
of commits: the last entry is the newest checkpoint.

Reading raises CheckpointError for what is no head or manifest, and its subclass NewerFormat for what a newer version
wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from outlast.errors import CheckpointError, RequestError
from outlast.snapshot.identity import Generation
from outlast.snapshot.stored import StoredCheckpoint, StoredImage
from outlast.storeurl import job_of, parse_checkpoint

FORMAT = 1
"""Of head and manifests as this version writes them; it reads no greater one."""
HEAD_KEY = "head.json"
MANIFESTS = "manifests/"


Json = dict[str, Any]
T = TypeVar("T")


class NewerFormat(CheckpointError):
    """A newer version of outlast wrote it."""


def rfc3339(wall: float) -> str:
    """Wall seconds as people and programs read them, in UTC to the millisecond."""
    return datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_url(url: str, namespace: str, name: str) -> str:
    """Where a job's own checkpoints lie, in the store that its specification names."""
    return f"{url.rstrip('/')}/{namespace}/{name}"


def parse_reference(text: str) -> tuple[str, int | None]:
    """The job's URL and the step out of ``URL[@STEP]``; without a step it is None: the newest. Raises RequestError."""
    try:
        reference = parse_checkpoint(text)
    except ValueError as error:
        raise RequestError(str(error)) from error
    url = job_of(reference)
    step = reference[len(url) + 1 :]
    return url, int(step) if step else None


def manifest_key(generation: Generation) -> str:
    return f"{MANIFESTS}{generation}.json"


def image_key(generation: Generation, rank: int) -> str:
    """Where a rank's image of a generation is uploaded to."""
    return f"{generation}/rank-{rank:05d}.safetensors"


# --- values ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobMark:
    """Whose checkpoints they are. ``identity`` is the same for all controllers of one job, another for each job."""

    namespace: str
    name: str
    identity: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name} ({self.identity})"

    def to_json(self) -> Json:
        return {"namespace": self.namespace, "name": self.name, "identity": self.identity}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> JobMark:
        return cls(str(data["namespace"]), str(data["name"]), str(data["identity"]))


@dataclass(frozen=True)
class ClaimMark:
    """Who alone may move the head forward: an attempt of a controller."""

    attempt: int
    incarnation: str
    controller: str

    def __str__(self) -> str:
        return f"attempt {self.attempt}-{self.incarnation} of controller {self.controller}"

    def to_json(self) -> Json:
        return {"attempt": self.attempt, "incarnation": self.incarnation, "controller": self.controller}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ClaimMark:
        return cls(int(data["attempt"]), str(data["incarnation"]), str(data["controller"]))


@dataclass(frozen=True)
class Entry:
    """One checkpoint of the line. ``manifest``: its key; ``digest``: SHA-256 of the manifest's bytes, hexadecimal;
    ``bytes``: of all images; ``created``: RFC 3339; ``pinned``: retention leaves it alone."""

    generation: Generation
    step: int
    manifest: str
    digest: str
    bytes: int
    created: str
    pinned: bool = False

    def to_json(self) -> Json:
        return {
            "generation": str(self.generation),
            "step": self.step,
            "manifest": self.manifest,
            "digest": self.digest,
            "bytes": self.bytes,
            "created": self.created,
            "pinned": self.pinned,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        return cls(
            generation=Generation.parse(data["generation"]),
            step=int(data["step"]),
            manifest=str(data["manifest"]),
            digest=str(data["digest"]),
            bytes=int(data["bytes"]),
            created=str(data["created"]),
            pinned=bool(data["pinned"]),
        )


@dataclass(frozen=True)
class Quarantined:
    """A checkpoint that must not be used, and why. Its objects stay until a person removes them."""

    entry: Entry
    reason: str
    time: str

    def to_json(self) -> Json:
        return {"entry": self.entry.to_json(), "reason": self.reason, "time": self.time}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Quarantined:
        return cls(Entry.from_json(data["entry"]), str(data["reason"]), str(data["time"]))


@dataclass(frozen=True)
class Head:
    """The one object that readers follow. ``line``: complete checkpoints, the newest last."""

    job: JobMark
    claim: ClaimMark | None = None
    line: tuple[Entry, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    format: int = FORMAT

    @property
    def empty(self) -> bool:
        """Whether there is nothing that a run from the start would throw away."""
        return not self.line and not self.quarantined

    @property
    def vacant(self) -> bool:
        """Whether it is empty, and nobody is about to change that."""
        return self.claim is None and self.empty

    def entry(self, generation: Generation) -> Entry | None:
        """The checkpoint of that generation, if the line has it."""
        return next((entry for entry in self.line if entry.generation == generation), None)

    def at_step(self, step: int) -> Entry | None:
        """The newest checkpoint of that step, if the line has one."""
        return next((entry for entry in reversed(self.line) if entry.step == step), None)

    def to_text(self) -> str:
        """As ``head.json`` holds it, with a digest of itself: the head alone has nobody else to vouch for it."""
        body: Json = {
            "format": self.format,
            "job": self.job.to_json(),
            "claim": self.claim and self.claim.to_json(),
            "line": [entry.to_json() for entry in self.line],
            "quarantined": [item.to_json() for item in self.quarantined],
        }
        return _write({**body, "digest": _digest_of(body)})

    @classmethod
    def from_text(cls, text: str | bytes, where: str = HEAD_KEY) -> Head:
        """Read ``to_text`` back; ``where`` names it in errors. Raises CheckpointError."""
        return _read(text, where, cls._from_json)

    @classmethod
    def _from_json(cls, data: Json) -> Head:
        if data.pop("digest", None) != _digest_of(data):
            raise ValueError("it does not match its own digest")
        claim = data["claim"]
        return cls(
            job=JobMark.from_json(data["job"]),
            claim=None if claim is None else ClaimMark.from_json(claim),
            line=tuple(Entry.from_json(entry) for entry in data["line"]),
            quarantined=tuple(Quarantined.from_json(item) for item in data["quarantined"]),
            format=data["format"],
        )


@dataclass(frozen=True)
class Manifest:
    """One checkpoint: what it consists of and where it comes from. ``nodes`` times ``procs`` ranks wrote it, ``images``
    has one of each, by rank; ``about``: fingerprints, the mesh and so on, any JSON."""

    job: JobMark
    generation: Generation
    step: int
    nodes: int
    procs: int
    created: str
    images: tuple[StoredImage, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def size(self) -> int:
        """Bytes of all images."""
        return sum(image.size for image in self.images)

    def to_text(self) -> str:
        return _write(
            {
                "format": self.format,
                "job": self.job.to_json(),
                "generation": str(self.generation),
                "step": self.step,
                "nodes": self.nodes,
                "procs": self.procs,
                "created": self.created,
                "images": [image.to_json() for image in self.images],
                "about": dict(self.about),
            }
        )

    @classmethod
    def from_text(cls, text: str | bytes, where: str = "manifest") -> Manifest:
        """Read ``to_text`` back; ``where`` names it in errors. Raises CheckpointError."""
        return _read(text, where, cls._from_json)

    @classmethod
    def _from_json(cls, data: Json) -> Manifest:
        manifest = cls(
            job=JobMark.from_json(data["job"]),
            generation=Generation.parse(data["generation"]),
            step=int(data["step"]),
            nodes=int(data["nodes"]),
            procs=int(data["procs"]),
            created=str(data["created"]),
            images=tuple(StoredImage.from_json(image) for image in data["images"]),
            about=dict(data["about"]),
            format=data["format"],
        )
        manifest.check()
        return manifest

    def check(self) -> None:
        """Raises ValueError when it has not one image of every rank, in order."""
        ranks = [image.rank for image in self.images]
        if ranks != list(range(self.nodes * self.procs)):
            raise ValueError(f"it has images of ranks {ranks}, not of each of {self.nodes * self.procs}")


def entry_of(manifest: Manifest, data: bytes) -> Entry:
    """How the head names a manifest whose text is ``data``."""
    return Entry(
        generation=manifest.generation,
        step=manifest.step,
        manifest=manifest_key(manifest.generation),
        digest=hashlib.sha256(data).hexdigest(),
        bytes=manifest.size,
        created=manifest.created,
    )


def checkpoint_of(manifest: Manifest, url: str, foreign: bool = False) -> StoredCheckpoint:
    """What a restore needs of a checkpoint that lies at ``url``, its job's own."""
    return StoredCheckpoint(
        manifest.generation, url, manifest.nodes, manifest.procs, manifest.images, manifest.about, foreign
    )


# --- text -------------------------------------------------------------------------------------------------------------


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _read(text: str | bytes, where: str, build: Callable[[Json], T]) -> T:
    try:
        data = json.loads(text)
        version = data["format"]
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"its format is {version!r}")
        if version > FORMAT:
            raise NewerFormat(f"{where} has format {version}, this outlast reads up to {FORMAT}: use a newer outlast")
        return build(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read ({type(error).__name__}: {error})") from error
