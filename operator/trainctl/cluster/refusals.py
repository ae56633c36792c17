"""What an API server refuses, told to people: one line with what, why and what to do (pure).

::

    OutlastError
    ├── ClusterError            the cluster cannot or will not: exit status 1
    │   ├── Unreachable         no answer: it is down, away, or not who it should be
    │   │   └── Unwell          an answer that says so, to a list or a watch
    │   ├── Unauthorized        it does not know the caller
    │   ├── Forbidden           it knows, and does not allow
    │   ├── NotInstalled        it knows no TrainingJobs
    │   ├── Absent              there is no such object
    │   ├── Gone                a watch came too late: list anew
    │   ├── Unreadable          a Pod's output cannot be had: its machine does not answer
    │   └── ControllerAway      a job's controller cannot be asked: says why
    └── RequestError
        ├── Invalid             what was sent is wrong: the server's own words
        └── Conflict            it exists already, or was changed meanwhile
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outlast.errors import OutlastError, RequestError

GROUP_PATH = "/apis/outlast.dev/"
_VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}
_NOT_RUNNING = re.compile(rb"pod not found|is not running", re.IGNORECASE)
"""What kubelets and container runtimes say of a Pod that they do not run, or not yet."""
_FOLLOWED = ("list", "watch")
"""The verbs of what is followed: a 500 to other requests may be the trouble of a kubelet or a webhook."""


class ClusterError(OutlastError):
    """The cluster cannot do what was asked, or will not."""


class Unreachable(ClusterError):
    """There was no answer."""


class Unwell(Unreachable):
    """There was an answer, and none that helps: the API server is overloaded, or something behind it is away."""


class Unauthorized(ClusterError):
    """The credentials are none, or have expired."""


class Forbidden(ClusterError):
    """The caller may not do this."""


class NotInstalled(ClusterError):
    """The CustomResourceDefinition is missing."""


class Absent(ClusterError):
    """There is no such object."""


class Gone(ClusterError):
    """The version that a watch should begin at is no longer kept."""


class Unreadable(ClusterError):
    """The output of a Pod cannot be had."""


class ControllerAway(ClusterError):
    """A job's controller cannot be asked."""


class Invalid(RequestError):
    """The server refused what was sent."""


class Conflict(RequestError):
    """The object exists already, or is another than expected."""


@dataclass(frozen=True)
class Asked:
    """A request, as far as a refusal speaks of it. ``verb`` as in RBAC; ``path`` without its query."""

    method: str
    path: str
    context: str
    verb: str = ""

    @property
    def action(self) -> str:
        """What was to be done: "create trainingjobs.outlast.dev in namespace x"."""
        return f"{self.verb or _VERBS.get(self.method, self.method)} {_resource(self.path)}"


def refusal(status: int, body: bytes, asked: Asked) -> OutlastError:
    """The error for an answer of 400 or more."""
    told = _status_object(body)
    message = str(told.get("message") or body.decode(errors="replace").strip() or "no reason given")
    match status:
        case 401:
            return Unauthorized(
                f'context "{asked.context}": the API server does not accept your credentials ({message}): log in '
                "again, or choose another context with --context"
            )
        case 403:
            return _forbidden(message, asked)
        case 404:
            return _not_found(told, message, asked)
        case 409:
            return Conflict(message)
        case 410:
            return Gone(message)
        case 400 | 422 | 405 | 413 | 415:
            return Invalid(message)
        case _:
            kind = Unwell if is_unwell(status) and asked.verb in _FOLLOWED else ClusterError
            return kind(
                f'the API server of context "{asked.context}" answers {status} ({message}) when asked to '
                f"{asked.action}: try again; if it goes on, ask who runs the cluster"
            )


def forward_refusal(status: int, body: bytes, asked: Asked, what: str) -> OutlastError:
    """The error for a port that is not forwarded. A kubelet that does not run the Pod, yet or any more, answers 500: no
    trouble of the API server."""
    if is_unwell(status) and _NOT_RUNNING.search(body):
        return ControllerAway(_not_running(what))
    return refusal(status, body, asked)


def port_error(told: bytes, what: str, pod: str) -> ControllerAway:
    """The error for what a kubelet says of a port that it forwards."""
    if _NOT_RUNNING.search(told):
        return ControllerAway(_not_running(what))
    if b"refused" in told.lower():
        return ControllerAway(f"the head Pod {pod} runs, but its controller does not listen yet")
    return ControllerAway(f"{what}: {told.decode(errors='replace').strip()}")


def _not_running(what: str) -> str:
    return f"{what} cannot be reached: the Pod has no container that runs now"


def is_unwell(status: int) -> bool:
    """Whether an answer tells of the API server's own trouble, which passes."""
    return status == 429 or status >= 500


def unreachable(server: str, context: str, reason: str) -> Unreachable:
    """The error for no answer at all."""
    return Unreachable(
        f'the API server of context "{context}" ({server}) does not answer: {reason}: is the cluster up, and reachable '
        "from here?"
    )


def _forbidden(message: str, asked: Asked) -> Forbidden:
    """RBAC's refusals name verb and resource; those of quotas and admission have a reason of their own."""
    if "cannot " not in message:
        return Forbidden(f"the cluster refuses to {asked.action}: {message}")
    reason = message.partition(" is forbidden: ")[2] or message
    return Forbidden(f"you may not {asked.action}: {reason}: ask who runs the cluster for a role that allows it")


def _not_found(told: Mapping[str, Any], message: str, asked: Asked) -> OutlastError:
    details = told.get("details") or {}
    name, kind = details.get("name"), details.get("kind")
    if asked.path.startswith(GROUP_PATH) and not name:
        return NotInstalled(
            f'the cluster of context "{asked.context}" knows no TrainingJobs: install Outlast there first '
            "(helm install outlast charts/outlast, or kubectl apply -f manifests/install.yaml)"
        )
    if kind == "trainingjobs":
        return Absent(
            f'there is no TrainingJob "{name}" in namespace "{_namespace(asked.path)}" (context "{asked.context}"): '
            "`trainctl status -A` lists all there are"
        )
    if kind == "namespaces":
        return Absent(
            f'there is no namespace "{name}" in the cluster of context "{asked.context}": make it (kubectl create '
            f"namespace {name}), or choose another with -n"
        )
    return Absent(message)


def _status_object(body: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) and value.get("kind") == "Status" else {}


def _resource(path: str) -> str:
    """The resource that an API path names, as RBAC and people write it."""
    parts = path.strip("/").split("/")
    group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1] if len(parts) > 1 else "", parts[3:])
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = rest[1], rest[2:]
    resource = rest[0] if rest else path
    if len(rest) > 2:
        resource = f"{resource}/{rest[2]}"
    where = f' in namespace "{namespace}"' if namespace else ""
    return f"{resource}{'.' + group if group else ''}{where}"


def _namespace(path: str) -> str:
    before, found, after = path.partition("/namespaces/")
    return after.partition("/")[0] if found else before
