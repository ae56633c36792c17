"""Following jobs as they go: the resource by a watch, and beside it the controller's own status while it answers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from outlast.errors import RequestError
from trainctl.cluster.connection import Cluster
from trainctl.cluster.controller import ControllerClient, controller_of
from trainctl.cluster.refusals import ClusterError
from trainctl.cluster.resources import JobRef, Object, follow, jobs_path
from trainctl.columns import GAP, facts, printable
from trainctl.jobview import ENDED, job_cells, job_facts, job_table, node_table, phase_of, recovery_table
from trainctl.merging import Ended, Merged
from trainctl.output import Form, name_of, one_of_many, plain
from trainctl.terminal import is_drawable

LIVE_EVERY_S = 2.0
"""How often the controller says how far it is when nothing happens."""
AGAIN_S = 3.0
"""When a controller that could not be asked is asked again, if its job has not changed before."""
SAY_EVERY_S = 10.0
"""How often plain lines say how far the job is."""
_NOTHING_NEW: tuple[str, Any] = ("nothing new", None)


@dataclass(frozen=True)
class Moment:
    """One job at one moment. ``live`` None: ``trouble`` says why the controller cannot be asked."""

    resource: Object
    live: Mapping[str, Any] | None = None
    trouble: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job has succeeded or failed."""
        return phase_of(self.resource) in ENDED


class Latest:
    """The newest resource, handed from the thread that watches it to the one that asks its controller."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._resource: Object | None = None
        self._version = 0

    def put(self, resource: Object) -> None:
        """A newer one."""
        with self._changed:
            self._resource, self._version = resource, self._version + 1
            self._changed.notify_all()

    def newer(self, version: int, timeout_s: float) -> tuple[Object | None, int]:
        """The resource, as soon as there is one after ``version``, else the old one when the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > version, timeout_s)
            return self._resource, self._version


def moments(job: JobRef) -> Iterator[Moment]:
    """A job now, at each change and when nothing has changed for a while, until nobody asks. Raises Absent when it is
    deleted."""
    merged, latest = Merged(), Latest()
    merged.add("resource", job.watch_itself())
    merged.add("live", live_statuses(job, latest))
    resource: Object | None = None
    live: Mapping[str, Any] | None = None
    trouble = ""
    while True:
        name, item = merged.next(SAY_EVERY_S) or _NOTHING_NEW
        if isinstance(item, Ended):
            if item.error is not None:
                raise item.error
        elif name == "resource":
            resource = item
            latest.put(item)
        elif name == "live":
            live, trouble = item
        if resource is not None:
            yield Moment(resource, live, trouble)


def live_statuses(job: JobRef, latest: Latest) -> Iterator[tuple[Mapping[str, Any] | None, str]]:
    """The controller's status every ``LIVE_EVERY_S``, or None and why there is none; until the job has ended."""
    version, trouble = 0, None
    while True:
        resource, version = latest.newer(version, AGAIN_S)
        if resource is None:
            continue
        if phase_of(resource) in ENDED:
            return
        client: ControllerClient | None = None
        try:
            client = controller_of(job, resource)
            status = client.status()
            while True:
                trouble = None
                yield status, ""
                status = client.status(int(status.get("seq", 0)), LIVE_EVERY_S)
                seen, version = latest.newer(version, 0.0)
                if seen is not None and (seen.get("status") or {}).get("head") != client.pod:
                    break
        except (ClusterError, RequestError) as error:
            if trouble != str(error):
                trouble = str(error)
                yield None, trouble
        finally:
            if client is not None:
                client.close()


# --- one job --------------------------------------------------------------------------------------------------------


class JobView(AbstractContextManager["JobView"], Protocol):
    """Where moments go."""

    def show(self, moment: Moment) -> None:
        """Show one."""
        ...


def follow_job(job: JobRef, form: Form | None) -> str:
    """Show a job until it has ended; its phase then."""
    with choose_view(form) as view:
        for moment in moments(job):
            view.show(moment)
            if moment.ended:
                return phase_of(moment.resource)
    raise AssertionError("moments do not end by themselves")


def choose_view(form: Form | None) -> JobView:
    """The view for standard output."""
    if form in (Form.JSON, Form.YAML, Form.NAME):
        return ObjectView(form)
    return LiveJobView() if is_drawable() else PlainJobView()


def page(moment: Moment, now: float) -> str:
    """All of a moment as text (pure)."""
    parts = [facts(job_facts(moment.resource, moment.live, now)), recovery_table(moment.live)]
    parts.append(node_table(moment.live, ()) if moment.live else "")
    if moment.trouble and not moment.ended:
        parts.append(f"(from the resource alone: {printable(moment.trouble)})")
    return "\n\n".join(part for part in parts if part)


class _View:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class ObjectView(_View):
    """The resource, or its name, at each of its changes."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._version: object = None

    def show(self, moment: Moment) -> None:
        version = moment.resource["metadata"].get("resourceVersion")
        if version != self._version:
            self._version = version
            print(_changed(moment.resource, self._form), flush=True)


def _changed(resource: Object, form: Form) -> str:
    """One that has changed, in a form that is no table."""
    return name_of(resource) if form is Form.NAME else one_of_many(plain(resource), form)


class PlainJobView(_View):
    """A line when the phase, its reason or the number of restarts changes, or nobody looks at the job, and now and then
    one for how far it is."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._said: tuple[object, ...] = ()
        self._at = float("-inf")
        self._trouble = ""

    def show(self, moment: Moment) -> None:
        now = self._clock()
        rows = dict(job_facts(moment.resource, moment.live, now))
        news = (*(rows.get(name, "") for name in ("phase", "why", "attempt", "restarts")), "note" in rows)
        if news != self._said or (now - self._at >= SAY_EVERY_S and not moment.ended):
            self._said, self._at = news, now
            shown = [f"{name} {value}" for name, value in rows.items() if value != "-" and name != "job"]
            print(printable(", ".join(shown)), flush=True)
        if moment.trouble != self._trouble and not moment.ended:
            self._trouble = moment.trouble
            if moment.trouble:
                print(f"from the resource alone: {printable(moment.trouble)}", file=sys.stderr, flush=True)


class LiveJobView(_View):
    """A page that is drawn anew twice a second; the last one stays."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._moment: Moment | None = None
        self._live = Live(get_renderable=self._draw, console=Console(), refresh_per_second=2)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, moment: Moment) -> None:
        self._moment = moment

    def _draw(self) -> Any:
        from rich.text import Text

        text = "" if self._moment is None else page(self._moment, time.time())
        return Text(text, no_wrap=True, overflow="ellipsis")


# --- all of them ----------------------------------------------------------------------------------------------------


def follow_jobs(cluster: Cluster, namespace: str | None, form: Form | None) -> None:
    """Show the jobs of a namespace (None: of all) at each change, until interrupted."""
    wide, everywhere = form is Form.WIDE, namespace is None
    source = follow(cluster, jobs_path(namespace))
    if form is None and is_drawable():
        _follow_live(source, everywhere)
        return
    if form in (None, Form.WIDE):
        print(job_table([], 0.0, namespaces=everywhere, wide=wide), flush=True)
    known: dict[str, object] = {}
    for objects in source:
        for uid, item in objects.items():
            if known.get(uid) != item["metadata"]["resourceVersion"]:
                known[uid] = item["metadata"]["resourceVersion"]
                if form is None or form is Form.WIDE:
                    cells = job_cells(item, time.time(), namespaces=everywhere, wide=wide)
                    print(printable(GAP.join(cells)), flush=True)
                else:
                    print(_changed(item, form), flush=True)


def _follow_live(source: Iterator[Mapping[str, Object]], namespaces: bool) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    newest: Sequence[Object] = []

    def draw() -> Text:
        text = job_table(newest, time.time(), namespaces=namespaces)
        return Text(text, no_wrap=True, overflow="ellipsis")

    with Live(get_renderable=draw, console=Console(), refresh_per_second=2):
        for objects in source:
            newest = list(objects.values())
