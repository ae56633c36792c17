"""What one process of a run tells another at its start: the controller's and each node's configuration.

``ControllerConfig`` goes from the supervisor to the controller (``outlast.controller.launch --config FILE``),
``NodeConfig`` from the supervisor to the controller (in ``nodes_file`` before its first start, by ``POST /nodes`` after
it), which keeps it and hands it to the node's agent. Both are JSON on the way and hold paths as strings,
so that they read the same on both sides. Secrets are named by file, never carried.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, JsonValue

CONTROLLER_ACTOR = "outlast-controller"
"""The controller's actor name within its job's Ray namespace."""


def agent_actor(node: str) -> str:
    """The actor name of a node's agent within its job's Ray namespace."""
    return f"outlast-agent-{node}"


class _Config(BaseModel):
    """Frozen, and strict about names: a field that is not known is a mistake of the sender."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ControllerConfig(_Config):
    """Everything that a controller must know, also after a restart; what it learns later comes from the agents."""

    job: dict[str, JsonValue]
    """The TrainingJob, as ``TrainingJob.model_dump(mode="json", by_alias=True)`` gives it."""
    name: str
    """The job's name, as in the event log."""
    dir: str
    """The run's folder: events.jsonl, metrics.jsonl and control/ are the controller's."""
    namespace: str
    """The Ray namespace of the job's actors."""
    host: str = "127.0.0.1"
    """The address that HTTP binds to."""
    http_port: int = Field(default=0, ge=0, le=65535)
    """The port that HTTP binds to; 0: any free one. What it became is in control/http.json."""
    token_file: str
    """A file that holds the job's bearer token, mode 0600."""
    store_identity: str = ""
    """Marks the job's checkpoints as its own: the same for all controllers of one job, another for each job."""
    resume: bool = False
    """Whether to go on from what the store holds under the job's name, whosever mark it bears; else refused."""
    patient: bool = False
    """Whether somebody else decides how long to wait for nodes: then the want of them never fails the job here."""
    ray_session: str = ""
    """The session of the Ray that it is launched in: told in /status, so that a node knows when its raylet is of
    another."""
    tick_s: float = Field(default=0.1, gt=0)
    """Seconds between two ticks of the machine."""

    @property
    def control_dir(self) -> Path:
        return Path(self.dir) / "control"

    @property
    def http_file(self) -> Path:
        """JSON {"host", "port", "pid", "controller"} of the controller that answers now, replaced atomically."""
        return self.control_dir / "http.json"

    @property
    def nodes_file(self) -> Path:
        """JSON {"nodes": [NodeConfig, ...]} of every node that was registered."""
        return self.control_dir / "nodes.json"

    @property
    def domains_file(self) -> Path:
        """JSON {"machines": {machine: domain}, "nodes": {node: domain}} of failure domains that are known."""
        return self.control_dir / "domains.json"

    @property
    def kept_file(self) -> Path:
        """JSON of what else a controller leaves to the next one (``outlast.messages.kept``)."""
        return self.control_dir / "kept.json"

    @property
    def final_file(self) -> Path:
        """JSON of how the job ended; absent until then."""
        return self.control_dir / "final.json"

    @property
    def events_file(self) -> Path:
        return Path(self.dir) / "events.jsonl"

    @property
    def metrics_file(self) -> Path:
        return Path(self.dir) / "metrics.jsonl"


class Isolation(_Config):
    """Give each process of a node a mount namespace that holds no other node's memory files (needs root)."""

    base: str
    """The parent of all nodes' memory folders."""
    own: str
    """The one below it that stays visible."""


class MemoryShare(_Config):
    """A node's part of a file system that ``nodes`` nodes have in common."""

    nodes: int = Field(ge=1)
    bytes: int = Field(ge=0)
    """Of each, for its images."""


class NodeConfig(_Config):
    """Everything that a node's agent must know, also after a restart."""

    node: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    """The node's id, never used again for another node."""
    machine: str = ""
    """The machine that the node runs on, as the cluster calls it; "": not known, then the node stands for it."""
    domain: str = ""
    """Nodes of one failure domain fail together; "": the machine's, which somebody tells the controller if the job
    names a failureDomain, else the machine itself."""
    host: str = "127.0.0.1"
    """The address at which other nodes reach this one."""
    job: dict[str, JsonValue]
    """The TrainingJob, as in ControllerConfig."""
    namespace: str
    """The Ray namespace in which the controller is found as CONTROLLER_ACTOR."""
    cwd: str
    """The folder in which ranks start."""
    run_dir: str
    """The run's folder (OUTLAST_RUN_DIR)."""
    log_dir: str
    """Where ranks' and the keeper's output goes: rank-R.attempt-A.log."""
    memory_dir: str
    """The node's own folder on tmpfs, mode 0700."""
    share: MemoryShare | None = None
    """What the node may take of that tmpfs; None: all of it is the node's."""
    socket_dir: str
    """The node's own folder for sockets: short, since a socket's path has at most 107 bytes."""
    token_file: str
    """A file that holds the job's token (OUTLAST_TOKEN_FILE)."""
    forkserver_socket: str
    """The socket of the node's forkserver."""
    ray_resource: str = ""
    """The custom resource that the node's own raylet offers, to which its agent is pinned; "": any raylet will do."""
    env: dict[str, str] = Field(default_factory=dict)
    """The environment that ranks start with, before the job's own and the rank's variables."""
    env_file: str | None = None
    """A private file on the node with more of them, as a JSON object: what may be secret is named, not carried."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of a rank's kernels; None: what the library takes."""
    fault_gate: str | None = None
    """The socket at which ranks ask before a step of ``fault_steps``; None: no faults."""
    fault_steps: tuple[int, ...] = ()
    """The steps (0-based) before which ranks ask the gate."""
    grace_s: float = Field(default=30.0, gt=0)
    """Seconds from SIGTERM to the node until it is taken away: the time for handing over."""
    isolate: Isolation | None = None

    def completed(self) -> NodeConfig:
        """With the variables of ``env_file``; for the node itself. Raises OSError, or ValueError for no JSON."""
        if self.env_file is None:
            return self
        more = json.loads(Path(self.env_file).read_text())
        return self.model_copy(update={"env": {**self.env, **more}})
