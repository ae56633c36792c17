"""A job that shall have no nodes for now: told to take its last checkpoint, then without Pods, then started anew. Pure.

``status.suspendingSince`` holds since when it is told. A controller that answers, and says that it suspends the job,
ends by itself: within its patience with a store that complains, after an upload that goes on. Any other, and one that
waits for nodes of which none is on its way, has that patience (where steps are long, six of them: the next snapshot is
some steps away) and 15 s more, and then the Pods go; it begins anew when a controller falls silent. A head that is lost
meanwhile gets a successor, as long as nodes hold what could still be brought to a store. The condition says what is
kept and what is lost.
"""

from __future__ import annotations

from outlast.jobstatus import StartStatus, TrainingJobStatus
from outlast_operator.heard import GATHERING, JOINED
from outlast_operator.model import Action, Call, Happening
from outlast_operator.progress import emptied, kept_step
from outlast_operator.replacing import empty_roster, head_alone, next_index
from outlast_operator.sight import Sight
from outlast_operator.starting import joined
from outlast_operator.timestamps import read_or_none, written
from outlast_operator.upkeep import lacking
from outlast_operator.verdict import Decision, Word

REASON = "spec.suspend"
NONE_YET = {"start_time": None, "active_since": None}
"""What the status of a job without Pods does not say."""
EXTRA_S = 15.0
"""What the operator waits beyond the controller's patience."""
STEPS = 6
"""In so many steps the controller takes a snapshot (``outlast.controller.suspending.STEPS``)."""
LONGEST_UPLOAD_S = 6 * 3600.0
"""How long the controller waits for an upload without complaint (``outlast.controller.settings.Patience.upload_s``)."""
NEW_HEAD_S = 120.0
"""How long a head may take until it answers."""


def suspend(sight: Sight, status: TrainingJobStatus) -> Decision:
    """The next step towards having no Pods."""
    if sight.old.phase == "Suspended":
        return _stay(sight, status)
    if not sight.pods or not (_has_state(sight, status) or _may_have_state(sight)):
        return _take_away(sight, status)
    since = _since(sight, status)
    ends = min(_ends(sight, since), since + LONGEST_UPLOAD_S + EXTRA_S)
    if sight.suspended or sight.now >= ends:
        return _take_away(sight, status)
    # Nodes that are lacking are not counted meanwhile: they are not made either. And who waits may have state to keep.
    waiting = {"suspending_since": written(since), "start": StartStatus()}
    return _wait(sight, status.model_copy(update=waiting), ends)


def _since(sight: Sight, status: TrainingJobStatus) -> float:
    """Since when the controller is told: anew by one that has begun since, and knows of nothing, and when a suspension
    was taken back and asked for again while nobody looked."""
    known = read_or_none(status.suspending_since)
    if known is None or _is_new(sight):
        return sight.now
    unseen = sight.old.observed_generation != status.observed_generation and sight.now >= _ends(sight, known)
    return sight.now if unseen else known


def _is_new(sight: Sight) -> bool:
    """Whether another controller than before answers, which has not been told yet."""
    heard, before = sight.heard, sight.old.controller.identity
    return sight.answering and heard is not None and not heard.suspending and before not in ("", heard.identity)


def _ends(sight: Sight, since: float) -> float:
    """Until when to wait."""
    patience = _patience_s(sight) + EXTRA_S
    if sight.head is None:
        if not _is_worth_a_head(sight):
            return since + patience
        return max(since, sight.now if sight.trouble is None else sight.trouble.since) + patience
    if sight.answering:
        told = sight.heard is not None and sight.heard.suspending and not _waits_in_vain(sight)
        return since + (LONGEST_UPLOAD_S + EXTRA_S if told else patience)
    begins = sight.head.made_at + NEW_HEAD_S if sight.heard is None else 0.0
    return max(since, sight.controller.failing_since or 0.0, begins) + patience


def _waits_in_vain(sight: Sight) -> bool:
    """Whether the controller waits for nodes before it can save anything, and none is on its way: none is made now."""
    heard = sight.heard
    if heard is None or heard.text("stage") != GATHERING or joined(sight) >= sight.least:
        return False
    return all(heard.states.get(pod.name) in JOINED for pod in sight.live if pod.is_node)


def _is_worth_a_head(sight: Sight) -> bool:
    """Whether nodes may hold what a new head could bring to a store."""
    return sight.job.spec.checkpoint is not None and any(pod.is_node for pod in sight.live)


def _patience_s(sight: Sight) -> float:
    """How long a controller that answers may take until the store has answered."""
    step_s = sight.heard.status.get("step_s") if sight.answering and sight.heard is not None else None
    least = sight.settings.suspend_patience_s
    return max(least, STEPS * float(step_s)) if isinstance(step_s, int | float) else least


def start_anew(sight: Sight, status: TrainingJobStatus) -> Decision:
    """The controller has suspended the job, and it is wanted again: its nodes are spent, the next pass makes others."""
    kept = _what_is_kept(sight, status)
    why = Word("Resuming", f"the suspension was taken back when it was complete: {kept.message}")
    told = (Happening("Normal" if kept.reason == "Suspended" else "Warning", "Resumed", why.message),)
    return Decision("Pending", why, _bare(sight, status), empty_roster(sight), told, waits=(sight.now,))


def _has_state(sight: Sight, status: TrainingJobStatus) -> bool:
    """Whether ranks were started since the Pods were last given back, so that there is something to keep."""
    started = status.start_time is not None and not status.start.failures
    return started or (sight.heard is not None and sight.heard.started)


def _may_have_state(sight: Sight) -> bool:
    """Whether ranks may have been started unseen: nodes run, and nobody could be asked when the suspension began. A new
    head knows nothing of them before they find it."""
    unasked = not sight.answering or sight.old.suspending_since is not None
    return unasked and any(pod.is_node and pod.phase == "Running" for pod in sight.live)


def _wait(sight: Sight, status: TrainingJobStatus, ends: float) -> Decision:
    patience = sight.settings.suspend_patience_s
    actions: tuple[Action, ...] = ()
    told: tuple[Happening, ...] = ()
    waits = [ends]
    if sight.answering:
        actions = (Call("POST", "/suspend", {"patience_s": patience, "reason": REASON}),)
        text = "the controller takes a snapshot, and brings its checkpoint to the store"
        if _waits_in_vain(sight):
            text = f"the controller finds too few nodes to restore what they hold; the Pods go at {written(ends)}"
    elif sight.head is None and _is_worth_a_head(sight):
        roster = head_alone(sight)
        actions, told = (*lacking(sight, roster.head), *roster.deletes, *roster.creates), roster.happenings
        status = status.model_copy(update={"head": roster.head, "next_pod": roster.next_pod})
        waits += [] if roster.again_at is None else [roster.again_at]
        text = "the head was lost: the next one brings what the nodes hold to the store"
    else:
        text = f"the controller does not answer; the Pods go at {written(ends)} in any case"
    why = Word("Suspending", text)
    return Decision(sight.old.phase, why, status, actions, told, ready="False", suspended=why, waits=tuple(waits))


def _take_away(sight: Sight, status: TrainingJobStatus) -> Decision:
    """All Pods go; what is said of them is said from now on of none."""
    return Decision("Suspended", _what_is_kept(sight, status), _bare(sight, status), empty_roster(sight))


def _bare(sight: Sight, status: TrainingJobStatus) -> TrainingJobStatus:
    """The status of a job whose Pods all go, and that will start anew from what is kept."""
    return emptied(status).model_copy(update={**NONE_YET, "step": kept_step(status), "next_pod": next_index(sight)})


def _stay(sight: Sight, status: TrainingJobStatus) -> Decision:
    """Suspended already; what was said stays said. Pods that are still there go."""
    known = sight.condition("Suspended")
    why = Word(known.reason, known.message) if known is not None else _what_is_kept(sight, status)
    bare = emptied(status).model_copy(update={**NONE_YET, "next_pod": next_index(sight)})
    return Decision("Suspended", why, bare, empty_roster(sight))


def _what_is_kept(sight: Sight, status: TrainingJobStatus) -> Word:
    """What the job goes on from when it is resumed, and what is lost until then."""
    done = max(status.step, sight.heard.count(sight.heard.status, "best_step") if sight.heard is not None else 0)
    checkpoint = status.checkpoint
    began = _has_state(sight, status) or _may_have_state(sight)
    unheard = began and not sight.suspended and (not sight.answering or _waits_in_vain(sight))
    who = "its controller found too few nodes" if sight.answering else "its controller did not answer"
    if not began and checkpoint is None and not done:
        return Word("Suspended", "the job has not begun; it starts when spec.suspend is false")
    if checkpoint is None:
        return _without_checkpoint(sight.job.spec.checkpoint is not None, done, who if unheard else "")
    kept = f"step {checkpoint.step} is kept at {checkpoint.url}"
    if unheard:
        lost = "the job goes on from the newest that is there, and what was done after that is lost"
        return Word("SuspendedWithLoss", f"{who}; {kept}, as was said last: {lost}")
    if done > checkpoint.step:
        lost = f"the {done - checkpoint.step} steps done after it are lost"
        return Word("SuspendedWithLoss", f"{kept}; {lost}")
    return Word("Suspended", f"{kept}; nothing is lost")


def _without_checkpoint(store: bool, done: int, unheard: str) -> Word:
    """What is said where no checkpoint is known of. ``unheard``: why its controller, which may have made one, could not
    say so; "" when it was heard."""
    if unheard and store:
        what = "was done" if done else "was done, if anything,"
        return Word("SuspendedWithLoss", f"{unheard}: what {what} is lost, beyond what its store has")
    lost = f"all {done} steps that were done are lost" if done else "nothing was done yet"
    if unheard and not done:
        lost = f"{unheard}, and what was done, if anything, is lost"
    why = "has no checkpoint yet" if store else "has no object tier (spec.checkpoint)"
    reason = "SuspendedWithoutCheckpoint" if done or unheard else "Suspended"
    return Word(reason, f"the job {why}: {lost}; it begins at step 0")
