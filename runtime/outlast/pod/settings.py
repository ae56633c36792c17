"""What a Pod's process is told: folders and ports by arguments, who it is by the variables of ``outlast.kube``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from outlast import kube
from outlast.api import TrainingJob
from outlast.errors import RequestError


@dataclass(frozen=True)
class Folders:
    """``job``: the job's Secret; ``run``: sockets, logs and the like, which outlive the container; ``memory``: images
    and parity, which do too."""

    job: Path
    run: Path
    memory: Path

    @property
    def token_file(self) -> Path:
        return self.job / kube.TOKEN_KEY

    @property
    def logs(self) -> Path:
        return self.run / "logs"

    @property
    def sockets(self) -> Path:
        """Of this container alone: process ids in it mean nothing to the next one."""
        return self.run / "s"

    @property
    def ray(self) -> Path:
        """Short: a socket's path has at most 107 bytes, of which Ray's session folder below this takes 66."""
        return self.run / "r"

    @property
    def controller(self) -> Path:
        """The controller's folder."""
        return self.run / "job"

    def read_job(self) -> TrainingJob:
        """The job as the operator wrote it. Raises RequestError."""
        path = self.job / kube.JOB_KEY
        try:
            return TrainingJob.model_validate_json(path.read_text())
        except OSError as error:
            raise RequestError(f"{path} cannot be read ({error.strerror}): is the job's Secret mounted?") from error
        except ValidationError as error:
            raise RequestError(f"{path} holds no TrainingJob of this version of outlast: {error}") from error

    def read_token(self) -> str:
        """The job's bearer token. Raises RequestError."""
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise RequestError(
                f"{self.token_file} cannot be read ({error.strerror}): is the Secret mounted?"
            ) from error


@dataclass(frozen=True)
class PodSettings:
    """``pod``: its name; ``ip``: its address; ``grace_s``: from SIGTERM until it is killed; ports: of Ray's GCS and
    of the controller, in the head Pod."""

    folders: Folders
    pod: str
    ip: str
    grace_s: float
    gcs_port: int
    controller_port: int


@dataclass(frozen=True)
class NodeSettings:
    """Of a node Pod. ``head``: the host name of the head in force; ``machine``: what the Pod runs on; ``port``: of
    /healthz, 0 for any."""

    own: PodSettings
    head: str
    machine: str
    port: int


def head_settings(arguments: Sequence[str] | None, environ: Mapping[str, str]) -> PodSettings:
    """Of a head Pod. Raises RequestError that names the variables which are missing."""
    given = _parser("outlast.pod.head").parse_args(arguments)
    return _pod_settings(given, environ)


def node_settings(arguments: Sequence[str] | None, environ: Mapping[str, str]) -> NodeSettings:
    """Of a node Pod. Raises RequestError that names the variables which are missing."""
    parser = _parser("outlast.pod.node")
    parser.add_argument("--port", type=int, default=kube.NODE_PORT, help="of /healthz; 0: any free one")
    given = parser.parse_args(arguments)
    own = _pod_settings(given, environ, kube.HEAD_VARIABLE)
    return NodeSettings(own, environ[kube.HEAD_VARIABLE], environ.get(kube.MACHINE_VARIABLE, ""), given.port)


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--job-folder", type=Path, default=Path(kube.JOB_FOLDER), help="the job's Secret")
    parser.add_argument("--run-folder", type=Path, default=Path(kube.RUN_FOLDER), help="outlives the container; short")
    parser.add_argument("--memory-folder", type=Path, default=Path(kube.MEMORY_FOLDER), help="a tmpfs")
    parser.add_argument("--gcs-port", type=int, default=kube.GCS_PORT, help="of Ray's head")
    parser.add_argument("--controller-port", type=int, default=kube.CONTROLLER_PORT, help="of the controller's HTTP")
    return parser


def _pod_settings(given: argparse.Namespace, environ: Mapping[str, str], *more: str) -> PodSettings:
    wanted = (kube.POD_VARIABLE, kube.POD_IP_VARIABLE, *more)
    missing = [name for name in wanted if not environ.get(name)]
    if missing:
        raise RequestError(f"{', '.join(missing)} must be set: see outlast.kube for what a Pod is told")
    try:
        grace_s = float(environ.get(kube.GRACE_VARIABLE) or kube.GRACE_S)
    except ValueError as error:
        raise RequestError(f"{kube.GRACE_VARIABLE} must be a number of seconds: {error}") from error
    return PodSettings(
        folders=Folders(given.job_folder, given.run_folder, given.memory_folder),
        pod=environ[kube.POD_VARIABLE],
        ip=environ[kube.POD_IP_VARIABLE],
        grace_s=grace_s,
        gcs_port=given.gcs_port,
        controller_port=given.controller_port,
    )
