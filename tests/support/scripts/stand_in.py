"""What stands in for a job's Pods where no operator is: HTTP as the controller speaks it, and lines said when told to.

``/status``, ``/events`` and ``/fault`` want the token in TOKEN, as the controller does; ``/state``, ``/say`` and ``/exit``
are the test's own.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

state: dict[str, object] = {"status": {}, "events": [], "faults": []}
changed = threading.Condition()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query))
        if self.headers.get("Authorization") != f"Bearer {os.environ['TOKEN']}":
            return self.answer(401, {"error": "the job's bearer token is missing or another"})
        if address.path == "/status":
            return self.answer(200, self.status(int(query.get("after", -1)), float(query.get("wait", 0))))
        if address.path == "/events":
            return self.answer(200, {"events": self.events(int(query.get("after", 0)), float(query.get("wait", 0)))})
        return self.answer(404, {"error": "no such path"})

    def status(self, after: int, wait_s: float) -> object:
        with changed:
            if after >= 0:
                changed.wait_for(lambda: state["status"].get("seq", 0) > after, wait_s)  # type: ignore[attr-defined]
            return state["status"]

    def events(self, after: int, wait_s: float) -> list[object]:
        def newer() -> list[object]:
            return [event for event in state["events"] if event["seq"] > after]  # type: ignore[attr-defined,index]

        with changed:
            changed.wait_for(newer, wait_s)
            return newer()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/fault":
            if body["fault"].startswith("hang"):
                return self.answer(400, {"error": f"{body['fault']}: not here"})
            state["faults"].append(body["fault"])  # type: ignore[attr-defined]
            return self.answer(200, {"fault": body["fault"]})
        if self.path == "/state":
            with changed:
                state.update(body)
                changed.notify_all()
            return self.answer(200, state)
        if self.path == "/say":
            print("\n".join(body["lines"]), flush=True)
            return self.answer(200, {})
        self.answer(200, {})
        time.sleep(0.1)  # the answer is on its way
        os._exit(int(body["status"]))

    def answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("", 8470), Handler)
    print(f"time=now event=began pod={os.environ['OUTLAST_POD']}", flush=True)
    sys.stdout.flush()
    server.serve_forever()
