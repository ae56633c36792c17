"""What a rank is started with, and what its error file says. Pure but for reading that file.

The environment is torchrun's, so that an unmodified script finds its rendezvous, plus what ``outlast.init`` reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.agent.forkprotocol import Spawn, program
from outlast.agent.isolation import Isolate
from outlast.api import TrainingJob
from outlast.config import NodeConfig
from outlast.joblogs import log_file
from outlast.messages.events import ErrorInfo
from outlast.messages.instructions import Start

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class RankFiles:
    """A rank's own files: where it finds its agent, its output, and the error file that it may write."""

    link: Path
    log: Path
    error: Path

    @classmethod
    def of(cls, config: NodeConfig, start: Start, rank: int) -> RankFiles:
        sockets, name = Path(config.socket_dir), log_file(start.attempt.number, rank)
        return cls(link_path(config, start), Path(config.log_dir) / name, sockets / f"{name}.error.json")


def link_path(config: NodeConfig, start: Start) -> Path:
    """The socket of an attempt's ranks: another one each time."""
    return Path(config.socket_dir) / f"ranks-{start.attempt.number}-{start.attempt.incarnation[:4]}"


def rank_spawn(config: NodeConfig, job: TrainingJob, start: Start, local_rank: int) -> Spawn:
    """The process of one rank."""
    rank = start.seat * start.procs + local_rank
    files = RankFiles.of(config, start, rank)
    given = {variable.name: variable.value for variable in job.spec.env}
    threads = int(given["OMP_NUM_THREADS"]) if given.get("OMP_NUM_THREADS", "").isdecimal() else config.threads
    kind, argv = program(job.spec.entrypoint)
    return Spawn(
        id=f"rank-{rank}.attempt-{start.attempt}",
        kind=kind,
        argv=argv,
        env={
            **_base(config),
            **given,
            **_torchrun(job, start, local_rank, files),
            **_outlast(config, job, start, files),
        },
        cwd=config.cwd,
        stdout=str(files.log),
        stderr=str(files.log),
        threads=threads,
        isolate=isolate_of(config),
        role=f"rank-{rank}",
    )


def isolate_of(config: NodeConfig) -> Isolate | None:
    """How the node's processes are kept from other nodes' files."""
    return Isolate(config.isolate.base, config.isolate.own) if config.isolate else None


def _base(config: NodeConfig) -> dict[str, str]:
    local = {"GLOO_SOCKET_IFNAME": "lo"} if config.host in _LOOPBACK else {}
    return {**local, **config.env}


def _torchrun(job: TrainingJob, start: Start, local_rank: int, files: RankFiles) -> dict[str, str]:
    """As torch.distributed.elastic's LocalElasticAgent sets it (the store is rank 0's own, not the agent's)."""
    rank, world = start.seat * start.procs + local_rank, start.world_nodes * start.procs
    values: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": start.procs,
        "GROUP_RANK": start.seat,
        "GROUP_WORLD_SIZE": start.world_nodes,
        "ROLE_NAME": "default",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world,
        "MASTER_ADDR": start.master_host,
        "MASTER_PORT": start.master_port,
        "TORCHELASTIC_RESTART_COUNT": start.restart_count,
        "TORCHELASTIC_MAX_RESTARTS": job.spec.recovery.max_restarts,
        "TORCHELASTIC_RUN_ID": job.metadata.name,
        "TORCHELASTIC_ERROR_FILE": files.error,
        "PYTHONHASHSEED": 0,
    }
    return {name: str(value) for name, value in values.items()}


def _outlast(config: NodeConfig, job: TrainingJob, start: Start, files: RankFiles) -> dict[str, str]:
    values: dict[str, Any] = {
        "OUTLAST_AGENT": files.link,
        "OUTLAST_TOKEN_FILE": config.token_file,
        "OUTLAST_ATTEMPT": start.attempt.number,
        "OUTLAST_INCARNATION": start.attempt.incarnation,
        "OUTLAST_MEMORY_DIR": config.memory_dir,
        "OUTLAST_MAX_MEMORY": job.spec.snapshot.max_memory,
        "OUTLAST_NODE": config.node,
        "OUTLAST_RUN_DIR": config.run_dir,
    }
    if config.fault_gate is not None and config.fault_steps:
        values |= {"OUTLAST_FAULT_GATE": config.fault_gate, "OUTLAST_FAULT_STEPS": json.dumps(config.fault_steps)}
    return {name: str(value) for name, value in values.items() if value is not None}


def read_error_file(path: Path, now: float) -> ErrorInfo | None:
    """The exception in a torchelastic error file, None when there is no file that can be read.

    The file is ``{"message": {"message": "Type: text", "extraInfo": {"py_callstack", "timestamp"}}}``, or has a bare
    text as ``message``; ``now`` stands in for a time that is missing.
    """
    try:
        told = json.loads(path.read_text())["message"]
        if not isinstance(told, dict):
            return ErrorInfo(now, "", str(told))
        extra = told.get("extraInfo", {})
        kind, colon, text = str(told["message"]).partition(": ")
        typed = bool(colon) and kind.replace(".", "").isidentifier()
        callstack = str(extra.get("py_callstack", ""))
        time = float(extra.get("timestamp", now))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return ErrorInfo(time, kind if typed else "", text if typed else str(told["message"]), callstack)
