"""The upload of a node's images that is under way: asked for by the controller, done by the keeper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from outlast import messages as m
from outlast.agent.attempt_record import AttemptRecord
from outlast.agent.keeper_calls import KeeperTasks
from outlast.snapshot.identity import Attempt, Generation

LOOK_S = 5.0
"""How often it is looked whether an upload waits for a store that does not answer."""
WELL_LOOKS = 3
"""Looks in a row without trouble after which the store is said to answer again."""

_Job = tuple[Attempt, Generation, str]


class Uploading:
    """One node's. All methods are called on the reactor's thread. ``record``: gives what the node remembers now."""

    def __init__(
        self, node: str, keeper: KeeperTasks, record: Callable[[], AttemptRecord], emit: Callable[[m.Event], None]
    ) -> None:
        self._node, self._keeper, self._record, self._emit = node, keeper, record, emit
        self._under_way: _Job | None = None
        self._uploaded: tuple[_Job, m.Uploaded] | None = None
        self._well = WELL_LOOKS

    def begin(self, upload: m.Upload) -> None:
        """Have the keeper do it; ``Uploaded`` or ``UploadFailed``. Who asks again meanwhile gets the same answer."""
        record = self._record()
        if record.started is None or record.started != record.in_force or record.seat is None:
            self._emit(m.UploadFailed(self._node, upload.generation, "it has no seat in the attempt in force"))
            return
        job = (record.started, upload.generation, upload.url)
        if upload.again and self._uploaded is not None and self._uploaded[0] == job:
            self._emit(self._uploaded[1])
        elif job != self._under_way:
            self._under_way, self._uploaded = job, None
            self._keeper.upload(upload, record.started, record.seat, partial(self._done, job))
            self._watch(job)

    def _watch(self, job: _Job) -> None:
        self._keeper.store_trouble(LOOK_S, partial(self._looked, job))

    def _looked(self, job: _Job, trouble: str | None) -> None:
        """Say of an upload that it waits, which is no failure yet: the keeper is patient; and when it does no more.
        An upload that failed is trouble too, until the next one was seen to go on."""
        if self._under_way is not job:
            return
        if trouble is not None and self._well >= WELL_LOOKS:
            text = f"{self._node} waits for the store and tries again: {trouble}"
            self._emit(m.Note(self._node, None, "store-unavailable", text))
        elif trouble is None and self._well == WELL_LOOKS - 1:
            self._emit(m.Note(self._node, None, "store-answers", f"{self._node}: the store answers again"))
        self._well = 0 if trouble is not None else self._well + 1
        self._watch(job)

    def _done(self, job: _Job, event: m.Uploaded | m.UploadFailed) -> None:
        """Nobody asked in this attempt for what another one began."""
        if self._under_way == job:
            self._under_way = None
        if isinstance(event, m.Uploaded):
            self._uploaded, self._well = (job, event), WELL_LOOKS
        else:
            self._well = 0
        if self._record().in_force == job[0]:
            self._emit(event)
