"""Enough nodes or none: what becomes of a job that has too few of them. Pure.

::

    Pods made, too few nodes --startTimeout--> Pods given back --back-off--> Pods made ...
         |                        '-- what hinders them, nobody's waiting mends --> failed (an image that cannot be
         |                        |   pulled: if the job has never trained)
         |                        '-- the job's only state is in its nodes' memory --> failed
         '-- enough nodes --> counts anew

``status.start`` holds since when nodes are lacking, how often in a row Pods were given back, and when they are asked
for again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from outlast.jobstatus import StartStatus
from outlast.quantities import format_duration
from outlast_operator.pods import IMAGE_PULL, Obstacle, summed_up
from outlast_operator.progress import kept_step
from outlast_operator.sight import Sight
from outlast_operator.timestamps import read_or_none, written
from outlast_operator.verdict import Word

FIRST_RETRY_S, LONGEST_RETRY_S = 60.0, 900.0
_REFUSALS = frozenset({"QuotaExceeded", "Forbidden", "NameTaken", "Refused"})
"""Reasons of the API server's refusals that somebody else may lift (``refusals.reason_of``)."""
_INVALID = "Invalid"
"""Begins the reasons of those that only the template can mend: InvalidPod and the like."""


class Course(Enum):
    """What follows from how many nodes are here."""

    GO_ON = "go on"
    GIVE_BACK = "give back"
    WAIT = "wait"
    FAIL = "fail"


@dataclass(frozen=True)
class Gathering:
    """``start``: for the status; ``why``: what to say while nodes are lacking; ``until``: when to look again."""

    course: Course
    start: StartStatus
    why: Word
    until: float | None = None


def retry_delay(failures: int) -> float:
    """Seconds until Pods are asked for again, after so many starts in a row that were given up."""
    return float(min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(max(0, failures - 1), 10)))


def gather(sight: Sight) -> Gathering:
    """Whether to wait, to give back, to ask again, or to fail."""
    start, now = sight.old.start, sight.now
    retry = read_or_none(start.retry_time)
    if retry is not None and now < retry:
        return Gathering(Course.WAIT, start, Word("WaitingToRetry", _why_given_back(sight)), retry)
    since = None if retry is not None or _started_since(sight) else read_or_none(start.since)
    hindrance = obstacle(sight)
    here, least = joined(sight), sight.least
    if here >= least:
        return Gathering(Course.GO_ON, StartStatus(), _word(hindrance, here, least))
    began = now if since is None else since
    attempts = start.attempts if since is not None else _attempts(sight)
    text = start.since if since is not None else written(now)
    waiting = StartStatus(failures=start.failures, since=text, attempts=attempts)
    limit = sight.job.spec.recovery.start_timeout
    if now - began < limit:
        return Gathering(Course.GO_ON, waiting, _word(hindrance, here, least), began + limit)
    return _given_up(sight, waiting, hindrance, here)


def _started_since(sight: Sight) -> bool:
    """Whether ranks were started after nodes were found lacking: they are lacking again, not still."""
    return _attempts(sight) > sight.old.start.attempts


def _attempts(sight: Sight) -> int:
    return sight.heard.count(sight.heard.status, "attempts") if sight.heard is not None else 0


def joined(sight: Sight) -> int:
    """Nodes that train or could. While the controller does not answer, Pods that are ready count, if its head is."""
    if sight.heard is not None and sight.controller.failing_since is None:
        return sight.heard.joined
    if sight.head is None or not sight.head.ready:
        return 0
    return sum(pod.ready for pod in sight.live if pod.is_node)


def obstacle(sight: Sight) -> Obstacle | None:
    """The one thing to name that keeps Pods from starting."""
    found = [found for pod in sight.live for found in pod.obstacles]
    if sight.trouble is not None:
        found.append(_refusal(sight.trouble.reason, sight.trouble.message))
    return summed_up(found)


def _refusal(reason: str, message: str) -> Obstacle:
    return Obstacle("", reason, message, passes=not reason.startswith(_INVALID))


def _refused_before(sight: Sight) -> Obstacle | None:
    """What the API server had refused when the status was written last, while Pods are lacking."""
    ready = sight.condition("Ready")
    if ready is None or sum(pod.is_node for pod in sight.live) >= sight.wanted:
        return None
    refused = ready.reason in _REFUSALS or (ready.reason.startswith(_INVALID) and ready.reason != "InvalidSpec")
    return _refusal(ready.reason, ready.message) if refused and ready.reason != "InvalidImageName" else None


def _given_up(sight: Sight, waiting: StartStatus, hindrance: Obstacle | None, here: int) -> Gathering:
    """startTimeout is over."""
    hindrance = hindrance or _refused_before(sight)
    limit = format_duration(sight.job.spec.recovery.start_timeout)
    short = f"{here} of {sight.least} nodes joined within {limit} (recovery.startTimeout)"
    if hindrance is not None and not hindrance.passes and not _passes_with_time(sight, hindrance):
        return Gathering(Course.FAIL, waiting, Word(hindrance.reason, f"only {short}: {hindrance.message}"))
    detail = f": {hindrance.message}" if hindrance is not None else ""
    if in_memory_alone(sight):
        text = (
            f"only {short}{detail}; the job's only state is in its nodes' memory, so that they cannot be given back "
            "and asked for again: give the job an object tier (spec.checkpoint), more spares or a longer startTimeout"
        )
        return Gathering(Course.FAIL, waiting, Word("StartTimeout", text))
    failures = waiting.failures + 1
    retry = sight.now + retry_delay(failures)
    start = StartStatus(failures=failures, retry_time=written(retry))
    text = f"only {short}{detail}; {_lost_text(sight)}{_given_back_text(start)}"
    return Gathering(Course.GIVE_BACK, start, Word("GivenBack", text), retry)


def in_memory_alone(sight: Sight) -> bool:
    """Whether giving the nodes back would lose what the job has done."""
    if sight.job.spec.checkpoint is not None:
        return False
    return sight.old.snapshot is not None or (sight.heard is not None and sight.heard.has_snapshot)


def _passes_with_time(sight: Sight, hindrance: Obstacle) -> bool:
    """Whether a job that has trained waits for what a new one would fail of: its image was there once."""
    return hindrance.reason == IMAGE_PULL and sight.old.start_time is not None


def _lost_text(sight: Sight) -> str:
    """What goes with the nodes' memory, if anything does."""
    heard, old = sight.heard, sight.old
    done = max(old.step, heard.count(heard.status, "best_step") if heard is not None else 0)
    told = heard.part("checkpoint").get("step") if heard is not None else None
    kept = told if isinstance(told, int) else kept_step(old)
    if done <= kept or old.start_time is None:
        return ""
    return f"the {done - kept} steps that were done after the newest checkpoint (step {kept}) are lost; "


def _why_given_back(sight: Sight) -> str:
    """As it was told when it was done, which names what was in the way."""
    ready = sight.condition("Ready")
    text = _given_back_text(sight.old.start)
    known = ready is not None and ready.reason in ("GivenBack", "WaitingToRetry") and text in ready.message
    return ready.message if ready is not None and known else text


def _given_back_text(start: StartStatus) -> str:
    times = "once" if start.failures == 1 else f"{start.failures} times in a row"
    return f"the Pods were given back {times}; they are asked for again at {start.retry_time}"


def _word(hindrance: Obstacle | None, here: int, least: int) -> Word:
    if hindrance is not None:
        return Word(hindrance.reason, hindrance.message)
    return Word("WaitingForNodes", f"{here} of at least {least} nodes have joined")
