"""What an answer of the API server that is no success means for the pass that asked.

``ApiError`` is what ``cluster`` raises; ``verdict`` says what follows from it (pure):

====================  =================================================================================
``Verdict.DONE``      what was asked for is so already: a deleted object is gone
``Verdict.BEHIND``    the cache is behind (AlreadyExists, Conflict): look again when it has caught up
``Verdict.REFUSED``   will be refused until somebody changes something: the job's status says so
                      (also while an admission webhook does not answer: 500)
``Verdict.RETRY``     may work later: no answer, 5xx, throttling
====================  =================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any, Literal

from outlast.errors import OutlastError

NAME_TAKEN = "NameTaken"
WEBHOOK = "failed calling webhook"
"""What the API server says when somebody's admission webhook does not answer it: nothing was made."""
UNDECODED = "cannot be handled as a"
"""What it says to an object with a field that does not exist, or a value of another type (400)."""
Verb = Literal["get", "list", "watch", "create", "apply", "patch", "update", "delete"]


class ApiError(OutlastError):
    """A request to the API server failed. ``status`` 0: there was no answer; ``reason`` is the Status's."""

    def __init__(
        self, verb: Verb, what: str, status: int, reason: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(verb, what, status, reason, message, retry_after_s)
        self.verb, self.what, self.status, self.reason, self.message = verb, what, status, reason, message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.verb} {self.what}: {self.message or self.reason} ({self.status or 'no answer'})"


class Verdict(Enum):
    """See the module."""

    DONE = "done"
    BEHIND = "behind"
    REFUSED = "refused"
    RETRY = "retry"


def verdict(error: ApiError) -> Verdict:
    """What follows from ``error``."""
    if error.verb == "delete" and error.status in (404, 409):
        return Verdict.DONE
    if error.status == 409:
        foreign = error.verb == "apply" and "conflict" in error.message and "using" in error.message
        return Verdict.REFUSED if foreign or error.reason == NAME_TAKEN else Verdict.BEHIND
    if error.status == 404 and error.verb in ("patch", "update"):
        return Verdict.BEHIND
    if error.status == 403 and "is being terminated" in error.message:
        return Verdict.BEHIND
    if error.status == 500 and WEBHOOK in error.message:
        return Verdict.REFUSED
    if error.status in (400, 401, 403, 404, 405, 413, 415, 422):
        return Verdict.REFUSED if error.status != 401 else Verdict.RETRY
    return Verdict.RETRY


def reason_of(error: ApiError) -> str:
    """One word in CamelCase for the condition of a job whose object was refused."""
    if error.status == 403:
        return "QuotaExceeded" if "exceeded quota" in error.message else "Forbidden"
    if error.status == 409:
        return NAME_TAKEN
    if error.status == 422 or (error.status == 400 and UNDECODED in error.message):
        return f"Invalid{error.what.partition(' ')[0]}"
    return "Refused"


def from_answer(verb: Verb, what: str, status: int, body: bytes, headers: Mapping[str, str]) -> ApiError:
    """The error in an answer's Status, or, where something between here and the API server answered, in its text."""
    try:
        said: Any = json.loads(body)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        said = {"message": body[:200].decode(errors="replace")}
    wait = headers.get("Retry-After", "")
    return ApiError(
        verb,
        what,
        status,
        str(said.get("reason") or ""),
        str(said.get("message") or ""),
        float(wait) if wait.isdigit() else None,
    )
