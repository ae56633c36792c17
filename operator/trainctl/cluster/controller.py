"""A job's controller, asked over HTTP in its head Pod (``outlast.controller.http``), through a port-forward.

The token comes from the job's Secret, so that whoever may not read it is told, and shown what the resource says alone.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlencode

from outlast.errors import OutlastError, RequestError
from outlast.kube import CONTROLLER_PORT
from trainctl.cluster.forward import ForwardedSocket
from trainctl.cluster.refusals import Absent, ClusterError, ControllerAway, Forbidden
from trainctl.cluster.resources import JobRef, Object, core_path
from trainctl.jobview import ENDED, phase_of, pod_state

CONNECT_S = 8.0
"""How long reaching the head Pod may take."""
ANSWER_S = 10.0
"""How long an answer may take, beyond what was asked to be waited for."""
WAIT_S = 25.0
"""How long the controller is asked to wait for news."""


class ControllerClient:
    """Asks the controller in one head Pod. Not for several threads."""

    def __init__(self, job: JobRef, pod: str, token: str) -> None:
        self._job, self.pod, self._token = job, pod, token
        self._connection: http.client.HTTPConnection | None = None

    def status(self, after: int = -1, wait_s: float = 0.0) -> dict[str, Any]:
        """What /status says; ``after``: at once when there are events beyond that number, else after ``wait_s``."""
        query = {"after": after, "wait": wait_s} if after >= 0 else {}
        return self._get("/status", query, wait_s)

    def events(self, after: int = 0, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Lines of the event log beyond ``after``, the oldest first; as many as one answer holds."""
        return list(self._get("/events", {"after": after, "wait": wait_s}, wait_s)["events"])

    def fault(self, fault: str) -> dict[str, Any]:
        """Break something in the running job. Raises RequestError with the controller's reason."""
        return self._ask("POST", "/fault", {"fault": fault}, 0.0)

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _get(self, path: str, query: Mapping[str, object], wait_s: float) -> dict[str, Any]:
        """A GET, once more over a new connection where the old one is found dead."""
        address = f"{path}?{urlencode(query)}" if query else path
        reused = self._connection is not None
        try:
            return self._ask("GET", address, None, wait_s)
        except ControllerAway:
            if not reused:
                raise
            return self._ask("GET", address, None, wait_s)

    def _ask(self, method: str, address: str, body: Mapping[str, Any] | None, wait_s: float) -> dict[str, Any]:
        connection = self._connected()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            connection.sock.settimeout(ANSWER_S + wait_s)
            connection.request(method, address, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            told = json.loads(answer.read() or b"{}")
        except (http.client.HTTPException, OSError, ValueError, ControllerAway) as error:
            self.close()
            if isinstance(error, ControllerAway):
                raise
            raise ControllerAway(f"the controller in Pod {self.pod} did not answer as one: {error!r}") from error
        if answer.status >= 400:
            raise _refused(answer.status, str(told.get("error", answer.reason)), self.pod)
        return dict(told)

    def _connected(self) -> http.client.HTTPConnection:
        if self._connection is None:
            connection = http.client.HTTPConnection("controller")
            forwarded: Any = ForwardedSocket(
                self._job.cluster, self._job.namespace, self.pod, CONTROLLER_PORT, CONNECT_S
            )
            connection.sock = forwarded
            self._connection = connection
        return self._connection


def _refused(status: int, reason: str, pod: str) -> OutlastError:
    if status in (400, 403, 404, 409):
        return RequestError(reason)
    return ControllerAway(f"the controller in Pod {pod} answers {status}: {reason}")


def controller_of(job: JobRef, resource: Object) -> ControllerClient:
    """The controller in the head Pod in force. Raises ControllerAway with the reason; asks nothing of it yet."""
    status = resource.get("status") or {}
    pod = status.get("head")
    if over := why_over(resource):
        raise ControllerAway(over)
    if not pod:
        raise ControllerAway(f"the job has no head Pod ({status.get('phase') or 'the operator has not seen it yet'})")
    try:
        _check_head(job, pod)
        return ControllerClient(job, pod, job.token())
    except ControllerAway:
        raise
    except Absent as error:
        raise ControllerAway("the job's Secret with the controller's token is not there") from error
    except ClusterError as error:
        raise ControllerAway(str(error)) from error


def why_over(resource: Object) -> str:
    """Why a job has no controller any more; nothing when it has, or may have, one (pure)."""
    name, phase = resource["metadata"]["name"], phase_of(resource)
    if phase in ENDED:
        return (
            f"the job has ended ({phase}), and its controller with it: `trainctl logs {name} --head` shows what it "
            "wrote, as long as its Pod is there"
        )
    return "the job is suspended, and has no controller until it is resumed" if phase == "Suspended" else ""


def why_no_port(pod: Object) -> str:
    """Why nothing can listen in a head Pod; nothing when it runs (pure)."""
    name, phase = pod["metadata"]["name"], (pod.get("status") or {}).get("phase")
    if phase in ("Succeeded", "Failed"):
        return f"the head Pod {name} has ended ({pod_state(pod)})"
    if phase != "Running":
        return f"the head Pod {name} is still starting ({pod_state(pod)})"
    return "" if _has_running_container(pod) else f"the head Pod {name} has no container that runs ({pod_state(pod)})"


def _has_running_container(pod: Object) -> bool:
    """Whether one runs; also where nothing is said of them."""
    states = (pod.get("status") or {}).get("containerStatuses") or ()
    return not states or any("running" in (state.get("state") or {}) for state in states)


def _check_head(job: JobRef, name: str) -> None:
    """Raises ControllerAway unless the head Pod runs; who may not look at it may still ask what is in it."""
    try:
        pod = job.cluster.get(core_path(job.namespace, "pods", name))
    except Absent as error:
        raise ControllerAway(f"the head Pod {name} is gone, and another one not in its place yet") from error
    except Forbidden:
        return
    if trouble := why_no_port(pod):
        raise ControllerAway(trouble)


def ask_status(job: JobRef, resource: Object) -> tuple[dict[str, Any] | None, str]:
    """The controller's status, or None and why it cannot be had."""
    try:
        client = controller_of(job, resource)
        try:
            return client.status(), ""
        finally:
            client.close()
    except (ClusterError, RequestError) as error:
        return None, str(error)


def all_events(client: ControllerClient, after: int = 0) -> Iterator[dict[str, Any]]:
    """The event log beyond ``after``, as far as it goes now."""
    while found := client.events(after):
        yield from found
        after = int(found[-1]["seq"])
