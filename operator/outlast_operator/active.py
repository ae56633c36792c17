"""A job that shall run: its objects, its Pods, what its controller is told, and why it trains or does not. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from outlast.jobstatus import Phase, TrainingJobStatus
from outlast_operator import recoveries
from outlast_operator.calls import calls
from outlast_operator.ending import deadline, finish
from outlast_operator.model import Happening
from outlast_operator.progress import emptied, kept_step
from outlast_operator.replacing import empty_roster, full_roster, next_index
from outlast_operator.sight import Sight
from outlast_operator.starting import Course, Gathering, gather, obstacle
from outlast_operator.timestamps import written
from outlast_operator.upkeep import lacking
from outlast_operator.verdict import Decision, Truth, Word
from outlast_operator.versions import skew

STORE_TROUBLE_S = 15.0
"""After so long without a good answer a store's trouble is told of a job that trains."""
SILENT_S = 30.0
"""After so long without an answer it is not known whether the job trains."""
_SHOWN: Mapping[str, Phase] = {
    "Pending": "Pending",
    "Starting": "Starting",
    "Running": "Running",
    "Recovering": "Recovering",
}
"""The controller's phases of a job that is not over."""


def run(sight: Sight, status: TrainingJobStatus) -> Decision:
    """What a job needs that is neither over nor to be suspended."""
    gathering = gather(sight)
    if gathering.course is Course.FAIL:
        return finish(sight, status, "Failed", gathering.why)
    if gathering.course in (Course.GIVE_BACK, Course.WAIT):
        return _without_pods(sight, status, gathering)
    roster = full_roster(sight)
    known = {
        "start": gathering.start,
        "head": roster.head,
        "next_pod": roster.next_pod,
        "suspending_since": None,
        "active_since": status.active_since or status.start_time or written(sight.now),
    }
    phase = _phase(sight, status)
    silence_ends = None if _is_silent(sight) else _silence_ends(sight)
    waits = [gathering.until, roster.again_at, deadline(sight, status), silence_ends]
    return Decision(
        phase,
        _why(sight, status, phase, gathering),
        status.model_copy(update=known),
        # What is let go comes first: where a quota is used up, it makes room for what replaces it.
        (*lacking(sight, roster.head), *roster.deletes, *roster.creates, *calls(sight)),
        roster.happenings,
        ready=_ready(sight, phase),
        waits=tuple(at for at in waits if at is not None),
    )


def _without_pods(sight: Sight, status: TrainingJobStatus, gathering: Gathering) -> Decision:
    """Every Pod is given back until the job may ask again."""
    bare = emptied(status).model_copy(update={"start": gathering.start, "next_pod": next_index(sight)})
    told: tuple[Happening, ...] = ()
    if gathering.course is Course.GIVE_BACK:
        bare = bare.model_copy(update={"step": kept_step(status)})
        told = (Happening("Warning", "GivenBack", gathering.why.message),)
    waits = tuple(at for at in (gathering.until, deadline(sight, status)) if at is not None)
    return Decision("Pending", gathering.why, bare, empty_roster(sight), told, waits=waits)


# --- how it is ------------------------------------------------------------------------------------------------------


def _phase(sight: Sight, status: TrainingJobStatus) -> Phase:
    """The controller's word; what it calls a start is a recovery when ranks of the job were started before."""
    before = sight.old.start_time is not None
    if sight.head is None:
        return "Recovering" if before else "Pending"
    if sight.heard is None:  # a head that is new, or an operator that is
        return "Pending" if sight.old.phase == "Suspended" else sight.old.phase
    shown = _SHOWN.get(sight.heard.text("phase"), sight.old.phase)
    if shown in ("Pending", "Starting") and before and _began_before(sight, status):
        return "Recovering"
    return shown


def _began_before(sight: Sight, status: TrainingJobStatus) -> bool:
    """Whether more than the first attempt of the job is under way."""
    if status.controller.earlier_attempt > 0 or sight.old.start.failures > 0:
        return True
    return sight.heard is not None and bool(sight.heard.status.get("recoveries"))


def _ready(sight: Sight, phase: Phase) -> Truth | None:
    return "Unknown" if phase == "Running" and _is_silent(sight) else None


def _silence_ends(sight: Sight) -> float | None:
    """When a silence of the controller's becomes something to tell; None: it answers, or there is none."""
    since = sight.controller.failing_since
    return None if since is None or not sight.old.controller.identity else since + SILENT_S


def _is_silent(sight: Sight) -> bool:
    ends = _silence_ends(sight)
    return ends is not None and sight.now >= ends


def _why(sight: Sight, status: TrainingJobStatus, phase: Phase, gathering: Gathering) -> Word:
    """Why the job trains, or does not."""
    if sight.problem:
        return Word("InvalidSpec", f"the edit is not in force, the job goes on as before: {sight.problem}")
    if phase != "Running" and obstacle(sight) is not None:
        return gathering.why
    if _is_silent(sight):
        return Word("ControllerSilent", f"{sight.old.head} does not answer the operator: {sight.controller.trouble}")
    if sight.objection:
        return Word("ResizeRefused", f"the job goes on as before: its controller objects to {sight.objection}")
    apart = skew(sight.settings.version, status.controller.version)
    if apart:
        return Word("VersionSkew", apart)
    if phase == "Running":
        return _training(sight)
    if gathering.start.since is not None:
        return gathering.why
    waiting = _waiting_for_store(sight)
    if waiting is not None:
        return waiting
    if phase == "Recovering":
        return recoveries.under_way(sight)
    return Word("Starting", f"{gathering.why.message}; ranks start")


def _waiting_for_store(sight: Sight) -> Word | None:
    """Why ranks do not start although there are nodes enough, if it is the store's fault."""
    heard = sight.heard
    if heard is None or heard.store_trouble is None or heard.text("stage") != "waiting":
        return None
    return Word("WaitingForStore", f"what the job goes on from is not in memory: {heard.store_trouble[0]}")


def _training(sight: Sight) -> Word:
    """All is well, but for what keeps a spare from starting, or a resize from being done."""
    hindrance, wanted = obstacle(sight), sight.job.spec.workers.replicas
    now = sight.heard.count(sight.heard.workers, "size") if sight.heard is not None else 0
    parts = ["all ranks train"]
    if now not in (0, wanted):
        parts.append(f"on {now} nodes, while {wanted} are wanted")
    text = " ".join(parts)
    trouble = sight.heard.store_trouble if sight.heard is not None else None
    if trouble is not None and trouble[1] >= STORE_TROUBLE_S:
        return Word("StoreUnavailable", f"{text}, but no checkpoint can be made: {trouble[0]}")
    return Word("Training", text if hindrance is None else f"{text}; {hindrance.reason}: {hindrance.message}")
