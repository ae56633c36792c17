"""Asks each running job's controller how it is: one long poll a job, all of them on one thread's event loop.

Only the head Pod in force is asked (``aim``). A pass reads the last answer (``heard``) and is asked for when something
changed that a plan may act on, and otherwise when the job's progress may be written again. An answer that came early
but changed nothing of that kind makes the next question of that job wait, up to a few seconds: events of a training
step that goes well do not keep the operator busy.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import aiohttp

from outlast.clock import Clock
from outlast.errors import TransferError
from outlast.kube import CONTROLLER_PORT
from outlast_operator.model import Call, Controller, Key

log = logging.getLogger(__name__)

SHORTEST_WAIT_S = 2.0
CALL_CONNECTIONS = 64
"""Beside those of polls, so that calls do not wait for them."""
LEAST_PACE_S, MOST_PACE_S = 0.5, 4.0
FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 15.0
LARGEST_ANSWER = 8 * 1024 * 1024
"""The status of 10,000 nodes is 3.4 MiB."""
MOST_DIGITS = 18
"""Of a whole number: the API server takes 64 bits."""
_WHOLE = ("controller", "version", "phase", "reason", "outcome", "attempt", "restarts", "workers", "unplaced")
_NODE = ("node", "domain", "seat", "state", "keeper", "reason")

Answered = Callable[[str], None]
"""Told of each question's result: ``ok``, ``failed``."""


@dataclass(frozen=True)
class Target:
    """The head Pod in force, where it is and the job's token."""

    pod: str
    uid: str
    ip: str
    token: str

    def url(self, port: int, path: str) -> str:
        """The controller's address for ``path``."""
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"http://{host}:{port}{path}"


@dataclass(frozen=True)
class PollSettings:
    """``connections``: at most so many at a time; ``wait_s``: of one long poll, while that suffices for all jobs."""

    port: int = CONTROLLER_PORT
    connections: int = 1000
    wait_s: float = 25.0
    connect_s: float = 3.0
    call_s: float = 5.0


class CallFailed(TransferError):
    """The controller did not do what it was asked to, or did not say so in time (not ``answered``). ``objection``: its
    own words, when it understood and will not."""

    def __init__(self, text: str, objection: str = "", answered: bool = False) -> None:
        super().__init__(text)
        self.objection, self.answered = objection, answered


class _Objection(ValueError):
    """A request that the controller understood and will not do (400)."""


def matters(status: Mapping[str, Any]) -> object:
    """What of a controller's status a plan may act on; the rest is progress. Compared for equality."""
    nodes = status.get("nodes") or {}
    return (
        *(status.get(name) for name in _WHOLE),
        {name: [node.get(field) for field in _NODE] for name, node in nodes.items()},
        status.get("weights_digest"),
        len(status.get("failures") or ()),
        (status.get("checkpoint") or {}).get("last_error"),
        bool(status.get("store_trouble")),
    )


@dataclass
class _Line:
    """``point``: what mattered in the last answer."""

    target: Target
    controller: Controller
    point: object = None
    following: Future[None] | None = None


class Poller:
    """``changed``: a pass is needed now; ``progressed``: one is needed when progress is written next."""

    def __init__(
        self,
        settings: PollSettings,
        changed: Callable[[Key], None],
        progressed: Callable[[Key], None],
        clock: Clock,
        chance: Random,
        answered: Answered,
    ) -> None:
        self._settings, self._clock, self._chance = settings, clock, chance
        self._changed, self._progressed, self._answered = changed, progressed, answered
        self._lines: dict[Key, _Line] = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._polls = asyncio.Semaphore()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)

    def start(self) -> None:
        """Returns when questions can be asked."""
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Ends all questions and the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def aim(self, key: Key, target: Target | None) -> None:
        """Ask this Pod about the job from now on (None: nobody); what another one said is forgotten."""
        with self._lock:
            line = self._lines.get(key)
            if target == (line.target if line else None):
                return
            if line is not None and line.following is not None:
                line.following.cancel()
            self._lines.pop(key, None)
            if target is not None:
                line = self._lines[key] = _Line(target, Controller(pod=target.pod))
                line.following = asyncio.run_coroutine_threadsafe(self._follow(key, line), self._loop)

    def heard(self, key: Key) -> Controller:
        """What the controller in force said last."""
        with self._lock:
            line = self._lines.get(key)
            return Controller() if line is None else line.controller

    def call(self, key: Key, call: Call) -> Any:
        """Ask the job's controller for something, from any other thread. Raises CallFailed."""
        with self._lock:
            line = self._lines.get(key)
        if line is None:
            raise CallFailed(f"{call.method} {call.path}: the job has no head Pod that could be asked")
        asked = asyncio.run_coroutine_threadsafe(self._send(line.target, call), self._loop)
        try:
            return asked.result(self._settings.call_s + 1.0)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            asked.cancel()
            why = str(error) or type(error).__name__
            objection = str(error) if isinstance(error, _Objection) else ""
            text = f"{call.method} {call.path} at {line.target.pod}: {why}"
            raise CallFailed(text, objection, answered=isinstance(error, ValueError)) from error

    @property
    def following(self) -> int:
        """Jobs whose controllers are asked."""
        return len(self._lines)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        session = self._loop.run_until_complete(self._open())
        self._ready.set()
        try:
            self._loop.run_forever()
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(session.close())
            self._loop.close()

    async def _open(self) -> aiohttp.ClientSession:
        self._polls = asyncio.Semaphore(self._settings.connections)  # made on the loop that uses it
        connector = aiohttp.TCPConnector(limit=self._settings.connections + CALL_CONNECTIONS)
        self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    async def _follow(self, key: Key, line: _Line) -> None:
        """One job's questions, until it is aimed elsewhere."""
        after, failures, pace_s = 0, 0, LEAST_PACE_S
        while True:
            began = self._clock.monotonic()
            try:
                status = await self._ask(line.target, after)
                after, news = int(status.get("seq") or 0), self._heard(key, line, status)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                why = str(error) or type(error).__name__
            except Exception as error:  # a Pod may answer anything: it must not end the questions for good
                log.exception("answer-not-understood job=%s pod=%s", key, line.target.pod)
                why = f"its answer is not understood: {error!r}"
            else:
                failures, pace_s = 0, LEAST_PACE_S if news else min(MOST_PACE_S, pace_s * 2)
                await asyncio.sleep(max(0.0, began + pace_s - self._clock.monotonic()))
                continue
            failures, after = failures + 1, 0
            self._failed(key, line, why)
            most = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2 ** min(failures - 1, 10))
            await asyncio.sleep(most * self._chance.uniform(0.5, 1.0))

    async def _ask(self, target: Target, after: int) -> dict[str, Any]:
        crowd = max(1.0, len(self._lines) / self._settings.connections)
        wait_s = max(SHORTEST_WAIT_S, self._settings.wait_s / crowd)
        query = {"after": str(after), "wait": f"{wait_s:.1f}"}
        async with self._polls:
            status = await self._request(target, "GET", "/status", None, query, wait_s + self._settings.call_s)
        if not isinstance(status, dict):
            raise ValueError("/status is no JSON object")
        return status

    async def _send(self, target: Target, call: Call) -> Any:
        body = dict(call.body) if call.method != "DELETE" else None
        return await self._request(target, call.method, call.path, body, {}, self._settings.call_s)

    async def _request(
        self,
        target: Target,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        query: Mapping[str, str],
        answer_s: float,
    ) -> Any:
        assert self._session is not None
        connect_s = self._settings.connect_s
        timeout = aiohttp.ClientTimeout(answer_s + connect_s, sock_connect=connect_s, sock_read=answer_s)
        async with self._session.request(
            method,
            target.url(self._settings.port, path),
            params=query,
            json=body,
            headers={"Authorization": f"Bearer {target.token}"},
            timeout=timeout,
            allow_redirects=False,
        ) as answer:
            text = await answer.content.read(LARGEST_ANSWER)
            while chunk := await answer.content.read(LARGEST_ANSWER):
                text += chunk
                if len(text) > LARGEST_ANSWER:
                    raise ValueError(f"{path}: the answer is larger than {LARGEST_ANSWER} bytes")
            if answer.status == 404 and method == "DELETE":
                return {}
            if answer.status == 400:
                raise _Objection(f"{path}: {_said(text)}")
            if answer.status >= 300:
                raise ValueError(f"{path}: {answer.status} {text[:200].decode(errors='replace')}")
            return read_answer(text)

    def _heard(self, key: Key, line: _Line, status: dict[str, Any]) -> bool:
        """Keep an answer; whether it needs a pass now."""
        before, point = line.controller, matters(status)
        news = before.status is None or before.failing_since is not None or line.point != point
        line.controller = Controller(line.target.pod, status, heard_at=self._clock.wall())
        line.point = point
        self._answered("ok")
        if news:
            self._changed(key)
        else:
            self._progressed(key)
        return news

    def _failed(self, key: Key, line: _Line, why: str) -> None:
        before = line.controller
        since = self._clock.wall() if before.failing_since is None else before.failing_since
        line.controller = replace(before, failing_since=since, trouble=why)
        self._answered("failed")
        if before.failing_since is None:
            log.info("controller-silent job=%s pod=%s cause=%s", key, line.target.pod, why[:200])
            self._changed(key)


def read_answer(text: bytes) -> Any:
    """A controller's JSON; numbers that no status can say, such as a loss that is NaN, are null. Raises ValueError."""
    try:
        return json.loads(text, parse_float=_finite, parse_int=_whole, parse_constant=lambda _: None)
    except RecursionError as error:
        raise ValueError("the answer is nested too deeply") from error


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _whole(text: str) -> int | None:
    return int(text) if len(text) <= MOST_DIGITS else None


def _said(text: bytes) -> str:
    """Why a request was refused: the answer's ``error``, or all of it."""
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:200].decode(errors="replace")
