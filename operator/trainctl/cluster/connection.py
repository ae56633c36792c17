"""A connection to one API server. Requests go out as JSON and come back as dicts: the generated models are not loaded.

Every refusal is one of ``trainctl.cluster.refusals``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import urllib3
from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3 import HTTPHeaderDict
from urllib3.exceptions import HTTPError, MaxRetryError

from trainctl.cluster.kubeconfig import find_cluster
from trainctl.cluster.refusals import Asked, Unreachable, refusal, unreachable
from trainctl.cluster.where import Where

CONNECT_S, READ_S = 5.0, 30.0
"""How long to wait for a connection, and for an answer or its next part."""
JSON, MERGE = "application/json", "application/merge-patch+json"
THREADS = 16
"""Connections that are kept: a stream occupies one."""

_ERRNO = re.compile(r"^\[Errno -?\d+\] ")

Query = Mapping[str, object]
Json = dict[str, Any]


class Lines:
    """An answer of unknown length, line by line, as text. It ends when the server ends it, when the connection is lost
    and when it is closed, which another thread may do: ask again to go on."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response

    def __iter__(self) -> Iterator[str]:
        rest = b""
        try:
            for chunk in self._response.stream(amt=None, decode_content=False):
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield line.decode(errors="replace")
        except (HTTPError, OSError, ValueError):
            pass  # the connection is gone, or was let go
        finally:
            self._response.close()
        if rest:
            yield rest.decode(errors="replace")

    def close(self) -> None:
        """Wake whoever reads: there is nothing more."""
        try:
            self._response.shutdown()
        except (ValueError, RuntimeError, OSError):
            pass  # it has ended already


class Cluster:
    """One API server, asked as one context of a kubeconfig says. Threads may share it.

    ``patience_s``: each request is made once, and connecting and the answer's beginning take no longer together.
    """

    def __init__(self, where: Where, *, patience_s: float | None = None) -> None:
        found = find_cluster(where)
        self.context, self.namespace = found.context, found.namespace
        self._impersonated = found.impersonated
        self.configuration = found.configuration
        self._patience_s = patience_s
        retries = 1 if patience_s is None else 0
        self.configuration.retries = urllib3.Retry(total=retries, redirect=2, backoff_factor=0.1)
        self.configuration.connection_pool_maxsize = THREADS
        self._client = ApiClient(self.configuration)
        self.has_answered = False
        """Whether anything that was asked of it has gone well: it was there, and may be away for a while."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._client.close()

    @property
    def server(self) -> str:
        """The API server's URL."""
        return str(self.configuration.host)

    def get(self, path: str, query: Query | None = None, *, verb: str = "", read_s: float = READ_S) -> Json:
        """The object or list at ``path``."""
        return self._json(self._send("GET", path, query, verb=verb, read_s=read_s))

    def post(self, path: str, body: Mapping[str, Any], query: Query | None = None) -> Json:
        """Make an object; what it has become."""
        return self._json(self._send("POST", path, query, body))

    def merge(self, path: str, change: Mapping[str, Any], query: Query | None = None) -> Json:
        """Change the fields that ``change`` names and no others (RFC 7386); what the object has become."""
        return self._json(self._send("PATCH", path, query, change, content=MERGE))

    def delete(self, path: str, options: Mapping[str, Any] | None = None) -> Json:
        """Delete an object: ``options`` as in meta/v1 DeleteOptions."""
        return self._json(self._send("DELETE", path, None, options or {}))

    def lines(self, path: str, query: Query | None = None, *, verb: str = "", quiet_s: float | None = None) -> Lines:
        """A stream; ``quiet_s``: how long it may say nothing before it counts as lost (None: forever)."""
        return Lines(self._send("GET", path, query, verb=verb, read_s=quiet_s))

    def signed(self, path: str) -> tuple[str, HTTPHeaderDict]:
        """The URL of ``path`` and the headers that say who asks, for what speaks no plain HTTP."""
        _, url, given, _, _ = self._client.param_serialize("GET", path, auth_settings=["BearerToken"])
        headers = HTTPHeaderDict(given)
        for name, value in self._impersonated:
            headers.add(name, value)
        return str(url), headers

    def _send(
        self,
        method: str,
        path: str,
        query: Query | None,
        body: Mapping[str, Any] | None = None,
        *,
        content: str = JSON,
        verb: str = "",
        read_s: float | None = READ_S,
    ) -> urllib3.BaseHTTPResponse:
        """Ask; the response once its head is there and good. Raises what ``refusals`` names."""
        url, headers = self.signed(path)
        headers.update({"Accept": "application/json, */*", "Content-Type": content})
        given = {name: value for name, value in (query or {}).items() if value is not None}
        address = f"{url}?{urlencode(given)}" if given else url
        limit_s = (CONNECT_S, read_s) if self._patience_s is None else self._patience_s
        try:
            answer: urllib3.BaseHTTPResponse = self._client.rest_client.request(
                method, address, headers=headers, body=body, _request_timeout=limit_s
            ).response
            if answer.status >= 400:
                raise refusal(answer.status, answer.read(), Asked(method, path, self.context, verb))
        except HTTPError as error:
            raise self._unreachable(error) from error
        except ApiException as error:
            raise unreachable(self.server, self.context, _one_line(error.reason)) from error
        except (OSError, UnicodeError) as error:  # a certificate's file that is not there, a host that is no name
            raise unreachable(self.server, self.context, _one_line(error)) from error
        self.has_answered = True
        return answer

    def _json(self, answer: urllib3.BaseHTTPResponse) -> Json:
        try:
            value = json.loads(answer.read())
        except HTTPError as error:
            raise self._unreachable(error) from error
        except ValueError as error:
            raise unreachable(self.server, self.context, "its answer is no JSON; is it an API server?") from error
        finally:
            answer.release_conn()
        return dict(value)

    def _unreachable(self, error: HTTPError) -> Unreachable:
        cause: object = error
        while isinstance(cause, MaxRetryError) and cause.reason is not None:
            cause = cause.reason
        return unreachable(self.server, self.context, _one_line(cause))


def _one_line(error: object) -> str:
    """An error's own words, without what urllib3 puts before them."""
    text = " ".join(str(error).split())
    for mark in ("Failed to establish a new connection: ", "): "):
        text = text.rpartition(mark)[2] or text
    return _ERRNO.sub("", text) or type(error).__name__
