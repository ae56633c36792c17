"""What the machine is told once: the job's wishes, and how long it waits for what."""

from __future__ import annotations

from dataclasses import dataclass, field

from outlast.controller.detector import DetectorConfig


@dataclass(frozen=True)
class Patience:
    """Seconds that the machine waits for an answer before it does without it.

    ``settle_s``: for further nodes after enough have joined, when they may bring snapshots; ``stop_s``: for a node to
    confirm that its ranks are dead and to verify its files, and more where these are large; ``collateral_s``: for the
    cause, after an error that only says that somebody else is gone; ``stacks_s``: for the stacks of hung ranks;
    ``silent_s``: for a rank to say anything, before the script counts as one that does not use outlast; ``copy_s`` and
    ``encode_s``: for a snapshot's two parts; ``commit_s``: before a commit is said again; ``finish_s``: for the driver
    to end everything; ``claim_s``: for the object store, before an attempt begins without having claimed it;
    ``final_s``: for the store to answer well, when training is over and the last checkpoint is not there; ``upload_s``:
    for that checkpoint in all, as long as nobody complains.
    """

    settle_s: float = 3.0
    stop_s: float = 60.0
    collateral_s: float = 0.3
    stacks_s: float = 6.0
    silent_s: float = 60.0
    copy_s: float = 120.0
    encode_s: float = 120.0
    commit_s: float = 5.0
    finish_s: float = 60.0
    claim_s: float = 8.0
    final_s: float = 900.0
    upload_s: float = 6 * 3600.0


@dataclass(frozen=True)
class CheckpointConfig:
    """The object tier. ``url``: the job's own; ``interval_steps`` or ``interval_s``: when a checkpoint is due, chosen
    when both are None; ``bandwidth``: bytes a second and node, None for no limit; ``restore_from``: another job's
    checkpoint to begin with.
    """

    url: str
    interval_steps: int | None = None
    interval_s: float | None = None
    bandwidth: int | None = None
    restore_from: str | None = None


@dataclass(frozen=True)
class MachineConfig:
    """One job. ``every_steps``, ``hang_timeout_s``, ``group_size`` and ``parity`` are None where they are chosen.

    ``replicas`` is the size that is wanted; ``min_replicas`` (None: the same) the least that may train, which is done
    when nodes are missing for ``shrink_after_s``. A resize is followed by another that makes the job larger only after
    ``grow_after_s``. ``checkpoint`` None: no object tier. ``fingerprint``: of the job's specification. ``patient``:
    somebody else ends a job for want of nodes. ``faults``: it may be broken on purpose.
    """

    replicas: int
    spares: int = 0
    procs: int = 1
    every_steps: int | None = None
    group_size: int | None = None
    parity: int | None = None
    max_restarts: int = 20
    window_s: float = 3600.0
    hang_timeout_s: float | None = None
    start_timeout_s: float = 900.0
    active_deadline_s: float | None = None
    patience: Patience = field(default_factory=Patience)
    detector: DetectorConfig = field(default_factory=DetectorConfig)
    min_replicas: int | None = None
    shrink_after_s: float = 60.0
    grow_after_s: float = 30.0
    checkpoint: CheckpointConfig | None = None
    fingerprint: str = ""
    patient: bool = False
    faults: bool = False

    @property
    def slots(self) -> int:
        """Files that a rank's images take turns in; with an object tier one more, for what is being uploaded."""
        return 2 if self.checkpoint is None else 3

    @property
    def least(self) -> int:
        """The fewest nodes that may train."""
        return self.replicas if self.min_replicas is None else self.min_replicas
