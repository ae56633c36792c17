"""``trainctl logs``: what ranks wrote, wherever it is now: in their Pods, or, when these are gone, in the store."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.errors import ObjectMissing, OutlastError, RequestError, StoreError
from outlast.joblogs import STORED, log_key, parse_log_key
from outlast.kube import HEAD_ROLE, NODE_ROLE, pod_index
from outlast.quantities import parse_duration
from trainctl.cluster.connection import Cluster, Json
from trainctl.cluster.controller import ask_status
from trainctl.cluster.refusals import Unreadable
from trainctl.cluster.resources import JobRef, Object, role_of
from trainctl.cluster.where import Where
from trainctl.columns import printable
from trainctl.podlogs import Container, Following, container_of, pod_lines, whole_output
from trainctl.ranklines import (
    RankLine,
    Wanted,
    by_attempt,
    parse_line,
    pods_of_ranks,
    shown,
    split_time,
)

ASK_FROM_PODS = 3
"""From how many node Pods on the controller is asked which of them has the rank."""


@dataclass(frozen=True)
class LogRequest:
    """The options. ``rank`` None: all; ``attempt`` None: the newest, or ``back`` before it."""

    rank: int | None = 0
    head: bool = False
    follow: bool = False
    attempt: int | None = None
    back: int = 0
    tail: int | None = None
    since_s: int | None = None
    timestamps: bool = False

    @property
    def since(self) -> dict[str, Any]:
        return {} if self.since_s is None else {"sinceSeconds": self.since_s}


def log_request(
    rank: int | None,
    *,
    all_ranks: bool,
    head: bool,
    follow: bool,
    attempt: int | None,
    previous: bool,
    tail: int | None,
    since: str | None,
    timestamps: bool,
) -> LogRequest:
    """The options as they were typed, checked. Raises RequestError."""
    if sum((rank is not None, all_ranks, head)) > 1:
        raise RequestError("RANK, --all-ranks and --head: give one of them")
    if previous and attempt is not None:
        raise RequestError("--previous and --attempt: give one of them")
    if previous and follow:
        raise RequestError("--previous and --follow: an attempt that is over has nothing more to say")
    try:
        since_s = None if since is None else max(1, round(parse_duration(since)))
    except ValueError as error:
        raise RequestError(f"--since: {error}") from error
    chosen = None if all_ranks else rank or 0
    return LogRequest(chosen, head, follow, attempt, int(previous), tail, since_s, timestamps)


def show_logs(where: Where, name: str, asked: LogRequest) -> None:
    """Print them. Raises RequestError for a rank that is none, OutlastError when there is nothing to show."""
    with Cluster(where) as cluster:
        job = JobRef(cluster, cluster.namespace, name)
        resource = job.get()
        if asked.head:
            _show_head(job, resource, asked)
        else:
            _check_rank(resource, asked)
            _RankLogs(job, resource, asked).show()


def _check_rank(resource: Object, asked: LogRequest) -> None:
    """Raises RequestError for a rank that the job does not have. An attempt that is over may have had more."""
    workers = resource["spec"].get("workers") or {}
    world = int(workers.get("replicas", 1)) * int(workers.get("procsPerWorker", 1))
    if asked.rank is not None and asked.rank >= world and asked.attempt is None and not asked.back:
        raise RequestError(f"there is no rank {asked.rank}: the job has ranks 0 to {world - 1}")


class _RankLogs:
    def __init__(self, job: JobRef, resource: Json, asked: LogRequest) -> None:
        self._job, self._resource, self._asked = job, resource, asked
        status = resource.get("status") or {}
        self._current = int(status.get("attempt") or 0)
        self._procs = int((resource["spec"].get("workers") or {}).get("procsPerWorker", 1))
        self._seen: dict[str, str] = {}
        self._unreadable: set[str] = set()
        self._has_read = False

    def show(self) -> None:
        """What there is; then, if asked to, what comes."""
        pods = [pod for pod in self._job.pods() if role_of(pod) == NODE_ROLE]
        containers = [container_of(pod) for pod in sorted(pods, key=lambda pod: pod_index(pod["metadata"]["name"]))]
        last = self._show_now(containers)
        if self._asked.follow:
            self._follow(last)

    def _show_now(self, containers: Sequence[Container]) -> int:
        """Print what is there; the attempt it was of."""
        wanted = Wanted(self._asked.rank, self._asked.attempt)
        found: dict[int, list[RankLine]] = {}
        for some in self._places(containers):
            found = by_attempt(self._read(some), wanted, self._asked.tail)
            if self._attempt(found) in found or self._is_quiet:
                break
        attempt = self._attempt(found)
        if attempt in found:
            self._note_older(attempt)
            self._print(found[attempt])
            return attempt
        if not (self._asked.follow or self._is_quiet):
            self._show_stored(attempt if self._asked.attempt or self._asked.back else 0, len(containers))
        return attempt

    @property
    def _is_quiet(self) -> bool:
        """Whether a Pod that was read is the answer even when it has nothing: nothing so recent was asked for."""
        return self._asked.since_s is not None and self._has_read

    def _show_stored(self, attempt: int, pods: int) -> None:
        try:
            stored = self._stored(attempt)
        except StoreError as error:
            raise OutlastError(self._nothing(pods, f"and the store cannot be asked from here: {error}")) from error
        if stored is None:
            url = job_store(self._resource)
            none = "and the job has no store (spec.checkpoint) that kept any"
            raise OutlastError(self._nothing(pods, f"nor in the job's store ({url}/logs)" if url else none))

    def _places(self, containers: Sequence[Container]) -> list[Sequence[Container]]:
        """Where to look, one after the other: the Pod that has the rank now, then all of them."""
        asked = self._asked
        if asked.rank is None or asked.attempt is not None or asked.back or len(containers) < ASK_FROM_PODS:
            return [containers]
        live, _ = ask_status(self._job, self._resource)
        names = pods_of_ranks([container.pod for container in containers], live, self._procs, asked.rank)
        first = [container for container in containers if container.pod in names]
        return [first] if len(first) == len(containers) else [first, containers]

    def _read(self, containers: Sequence[Container]) -> Iterable[RankLine]:
        """Their ranks' lines. A Pod that cannot be read is told, once, and left out."""
        for container in containers:
            if container.pod in self._unreadable:
                continue
            try:
                for text in whole_output(self._job, container, self._asked.since):
                    self._seen[container.pod] = split_time(text)[0] or self._seen.get(container.pod, "")
                    line = parse_line(text)
                    if line is not None:
                        yield line
                self._has_read |= container.started
            except Unreadable as error:
                self._unreadable.add(container.pod)
                print(f"note: {printable(str(error))}", file=sys.stderr, flush=True)

    def _attempt(self, found: Mapping[int, object]) -> int:
        """The attempt to show: as asked, else counted back from the newest there is or has been."""
        if self._asked.attempt is not None:
            return self._asked.attempt
        newest = max(found, default=0)
        is_counted = self._asked.back > 0 or self._asked.since_s is not None
        return max(newest, self._current) - self._asked.back if is_counted else newest

    def _note_older(self, attempt: int) -> None:
        if self._asked.attempt is None and not self._asked.back and attempt < self._current:
            none = f"nothing was written in attempt {self._current} yet"
            if self._unreadable:
                none = f"the Pods that can be read have nothing of attempt {self._current}"
            print(f"note: {none}; this is attempt {attempt}", file=sys.stderr)

    def _print(self, lines: Iterable[RankLine]) -> None:
        for line in lines:
            print(
                shown(line, marked=self._asked.rank is None, timestamps=self._asked.timestamps),
                flush=self._asked.follow,
            )

    def _stored(self, attempt: int) -> int | None:
        """Print what the store has of ``attempt`` (0: of the newest it has); None: nothing."""
        url = job_store(self._resource)
        if url is None:
            return None
        from contextlib import closing

        from outlast.checkpoint.store import StoreOptions, open_store
        from trainctl.catalogue import PATIENCE_S

        with closing(open_store(url, StoreOptions(patience_s=PATIENCE_S))) as store:
            keys = [key for info in store.list(STORED) if (key := parse_log_key(info.key)) is not None]
            ranks = [key for key in keys if self._asked.rank is None or key[1] == self._asked.rank]
            chosen = attempt or max((number for number, _ in ranks), default=0) - self._asked.back
            lines: list[RankLine] = []
            for _, rank in sorted(key for key in ranks if key[0] == chosen):
                try:
                    text, _ = store.get(log_key(chosen, rank))
                except ObjectMissing:
                    continue
                lines += [RankLine("", rank, chosen, line) for line in _lines_of(text.decode(errors="replace"))]
        if not lines:
            return None
        where = "no Pod that can be read has these lines" if self._unreadable else "no Pod has these lines any more"
        print(f"note: from {url}/logs/attempt-{chosen}: {where}{self._unheeded()}", file=sys.stderr)
        self._print(by_attempt(lines, Wanted(self._asked.rank), self._asked.tail)[chosen])
        return chosen

    def _unheeded(self) -> str:
        """What cannot be obeyed in lines that are stored without their times."""
        asked = self._asked
        flags = [*(["--since"] if asked.since_s is not None else []), *(["--timestamps"] if asked.timestamps else [])]
        return f"; they are stored without their times, so that {' and '.join(flags)} cannot be obeyed" if flags else ""

    def _nothing(self, pods: int, store: str) -> str:
        asked = self._asked
        whose = "any rank" if asked.rank is None else f"rank {asked.rank}"
        which = (
            f" in attempt {asked.attempt}"
            if asked.attempt is not None
            else " in the attempt before"
            if asked.back
            else ""
        )
        where = f"the {pods} node Pods there are" + (", as far as they can be read" if self._unreadable else "")
        text = f"there is no output of {whose}{which}: not in {where}, {store}"
        return f"{text}: `trainctl describe {self._job.name}` tells how the job is"

    def _follow(self, attempt: int) -> None:
        asked = self._asked
        wanted = Wanted(asked.rank, asked.attempt, max(attempt, self._current))
        following = Following(
            self._job,
            NODE_ROLE,
            lambda pods, live: pods_of_ranks(pods, live, self._procs, asked.rank),
            self._seen,
            ask_controller=asked.rank is not None,
        )
        for pod, text in following.lines():
            line = parse_line(text)
            if line is None or not wanted.has(line):
                continue
            if line.attempt > attempt and asked.rank is not None:
                print(f"--- rank {line.rank}, attempt {line.attempt}, Pod {pod}", file=sys.stderr, flush=True)
            attempt = max(attempt, line.attempt)
            self._print([line])


def _lines_of(text: str) -> list[str]:
    """As ranks ended them: what else Python takes for an end of line is theirs."""
    return text.removesuffix("\n").split("\n") if text else []


def _show_head(job: JobRef, resource: Object, asked: LogRequest) -> None:
    """The output of the head Pod in force: Ray's head and the controller."""
    heads = {pod["metadata"]["name"]: container_of(pod) for pod in job.pods() if role_of(pod) == HEAD_ROLE}
    name = (resource.get("status") or {}).get("head") or max(heads, key=pod_index, default=None)
    seen: dict[str, str] = {}
    if name in heads:
        container = heads[str(name)]
        lines = _head_lines(job, container, asked)
        for text in lines if asked.tail is None else lines[max(0, len(lines) - asked.tail) :]:
            _print_head(text, asked)
        if lines:
            seen[container.pod] = split_time(lines[-1])[0]
    elif not asked.follow:
        raise OutlastError(
            f'the TrainingJob "{job.name}" has no head Pod: `trainctl describe {job.name}` tells how it is'
        )
    if asked.follow:
        for _, text in Following(job, HEAD_ROLE, _newest, seen, ask_controller=False).lines():
            _print_head(text, asked)


def _head_lines(job: JobRef, container: Container, asked: LogRequest) -> list[str]:
    """What the head has said. Where it cannot be read and another one is waited for, that is told, and nothing read."""
    try:
        return list(pod_lines(job, container, previous=bool(asked.back), since=asked.since))
    except Unreadable as error:
        if not asked.follow:
            raise
        print(f"note: {printable(str(error))}", file=sys.stderr, flush=True)
        return []


def _newest(pods: Sequence[str], live: object) -> Sequence[str]:
    del live
    return sorted(pods, key=pod_index)[-1:]


def _print_head(text: str, asked: LogRequest) -> None:
    print(text if asked.timestamps else split_time(text)[1], flush=asked.follow)


def job_store(resource: Object) -> str | None:
    """Where the job's checkpoints and logs lie; None: it has no store."""
    url = (resource["spec"].get("checkpoint") or {}).get("url")
    meta = resource["metadata"]
    return f"{url.rstrip('/')}/{meta.get('namespace', 'default')}/{meta['name']}" if url else None
