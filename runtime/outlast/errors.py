"""What can go wrong, as one tree. Every message names the object, the cause and the remedy.

::

    OutlastError
    ├── RequestError                    the request was wrong: exit status 2
    │   └── SpecError                   a TrainingJob that cannot be: field path, value, what is allowed
    ├── JobFailed                       the job ended without success: exit status 1
    ├── CapacityError                   memory, slots or nodes do not suffice: says how much is missing
    ├── StaleAttemptError               a message of another attempt: refused, never retried
    ├── SnapshotError
    │   ├── ImageError                  an image cannot be parsed or does not verify
    │   ├── StateError                  a protected object's state cannot be captured or restored
    │   └── UnrecoverableError          no generation can be rebuilt from what is left
    ├── StoreError                      the object store could not do what was asked
    │   ├── StoreUnavailable            503, throttling, timeouts, lost connections: was retried, may be again later
    │   ├── StoreDenied                 403, no such bucket, wrong configuration: says the remedy, never retried
    │   ├── ObjectMissing               there is no object of that key
    │   └── PreconditionFailed          a conditional put found another object than expected
    ├── CheckpointError                 a checkpoint's manifest or objects do not hold together
    ├── ClaimLost                       another controller has claimed the job's checkpoints: this one must stop
    └── TransferError                   a peer did not answer in time or answered nonsense: may be retried

Errors cross process boundaries, so each pickles by its constructor's arguments.
"""

from __future__ import annotations


class OutlastError(Exception):
    """Base of all errors that outlast raises on purpose."""


class RequestError(OutlastError):
    """What was asked for cannot be done as asked."""


class SpecError(RequestError):
    """A TrainingJob is invalid. ``problems`` are (field path, what is wrong and what is allowed)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(f"{path}: {text}" if path else text for path, text in self.problems)


class JobFailed(OutlastError):
    """The job ended without success."""


class CapacityError(OutlastError):
    """Memory, slots or nodes do not suffice."""


class StaleAttemptError(OutlastError):
    """A message carried another attempt than the one in force."""


class SnapshotError(OutlastError):
    """Something about a snapshot."""


class ImageError(SnapshotError):
    """An image file cannot be parsed or does not verify."""


class StateError(SnapshotError):
    """A protected object's state cannot be captured or restored."""


class UnrecoverableError(SnapshotError):
    """No generation can be rebuilt from what is left."""


class StoreError(OutlastError):
    """The object store could not do what was asked."""


class StoreUnavailable(StoreError):
    """The store did not answer, or asked to come again later, for as long as was waited."""


class StoreDenied(StoreError):
    """The store refuses, and will go on refusing until somebody changes something."""


class ObjectMissing(StoreError):
    """There is no object of that key."""


class PreconditionFailed(StoreError):
    """A conditional put found another object than expected."""


class CheckpointError(OutlastError):
    """A checkpoint's manifest or objects do not hold together."""


class ClaimLost(OutlastError):
    """Another controller has claimed the job's checkpoints."""


class TransferError(OutlastError):
    """A peer did not answer in time, or answered nonsense."""
