"""Real stores for tests: moto's server, the lab's S3 server, and a connection to either that misbehaves when told."""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[2]
START_S = 10.0
AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION")


def lab() -> str | None:
    """The lab's command, None where there is no lab."""
    beside = ROOT.parent / "shared" / "kubelab" / "kubelab"
    return shutil.which("kubelab") or (str(beside) if beside.exists() else None)


def lab_assets() -> pathlib.Path | None:
    """The folder of the lab's binaries, None where there is no lab."""
    command = lab()
    if command is None:
        return None
    asked = subprocess.run([command, "assets"], capture_output=True, text=True, timeout=300, check=False)
    return pathlib.Path(asked.stdout.strip().splitlines()[-1]) if asked.returncode == 0 else None


@contextmanager
def lab_s3(buckets: pathlib.Path | None = None) -> Iterator[dict[str, str]]:
    """The variables that lead to a real S3 server (the lab's versitygw) of the caller's own, on loopback; skips where
    there is none. ``buckets``: the folder in which its buckets are folders; a new one by default."""
    assets = lab_assets()
    server = assets / "versitygw" if assets is not None else None
    if server is None or not server.exists():
        pytest.skip("no S3 server here: the lab (kubelab) is needed")
    with tempfile.TemporaryDirectory(prefix="outlast-test-s3-") as own, socket.create_server(("127.0.0.1", 0)) as taken:
        place = buckets or pathlib.Path(own) / "buckets"
        place.mkdir(exist_ok=True)
        port = taken.getsockname()[1]
        taken.close()
        variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": uuid.uuid4().hex[:16],
            "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        process = _versitygw(server, port, variables, place, pathlib.Path(own) / "log")
        try:
            yield variables
        finally:
            process.kill()  # it waits for its clients' connections otherwise
            process.wait(10)


def _versitygw(
    server: pathlib.Path, port: int, variables: Mapping[str, str], buckets: pathlib.Path, log: pathlib.Path
) -> subprocess.Popen[bytes]:
    """Start it, and wait until it listens."""
    access = ["--access", variables["AWS_ACCESS_KEY_ID"], "--secret", variables["AWS_SECRET_ACCESS_KEY"]]
    where = ["--region", variables["AWS_REGION"], "--quiet", "--keep-alive", "--port", f"127.0.0.1:{port}"]
    with log.open("w") as output:
        process = subprocess.Popen([server, *access, *where, "posix", buckets], stdout=output, stderr=output)
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.skip(f"the lab's S3 server does not start: {log.read_text().strip()[-200:]}")
            time.sleep(0.02)


@contextmanager
def moto_s3() -> Iterator[dict[str, str]]:
    """The variables that lead to moto's server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextmanager
def s3(buckets: pathlib.Path | None = None) -> Iterator[dict[str, str]]:
    """The lab's server where there is one, else moto's, which has no folder for ``buckets``: then it skips."""
    assets = lab_assets()
    if assets is None and buckets is not None:
        pytest.skip("moto's server keeps its buckets in memory: the lab (kubelab) is needed")
    with lab_s3(buckets) if assets is not None else moto_s3() as variables:
        yield variables


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for as long as the block lasts."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def new_bucket() -> str:
    """A bucket of its own at the server that the environment leads to."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    client = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket=name)
    client.close()
    return name


class Proxy:
    """A connection to a server that can refuse, cut and stall: real sockets between the two.

    ``mode``: "pass"; "503" answers each request so; "cut" ends connections after ``after`` bytes of requests; "stall"
    takes requests and never answers; "slow" lets ``rate`` bytes of requests a second through a connection. Changing it
    ends the connections there are.
    """

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.refused = 0
        self.after = 0
        self.rate = 1 << 20
        self._mode = "pass"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._mode = mode
        with self._lock:
            for connection in self._open:
                _end(connection)
            self._open.clear()

    def close(self) -> None:
        """Accept nothing any more, and end what there is."""
        self._listener.close()
        self.mode = "pass"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(client)
            threading.Thread(target=self._serve, args=(client, self._mode), daemon=True).start()

    def _serve(self, client: socket.socket, mode: str) -> None:
        try:
            if mode == "503":
                self._refuse(client)
            elif mode == "stall":
                while client.recv(65536):
                    pass
            else:
                self._forward(client, self.after if mode == "cut" else None, self.rate if mode == "slow" else None)
        except OSError:
            pass
        finally:
            _end(client)

    def _refuse(self, client: socket.socket) -> None:
        client.recv(65536)
        self.refused += 1
        body = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"
        head = f"HTTP/1.1 503 Slow Down\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        client.sendall(head + body)
        client.shutdown(socket.SHUT_WR)
        client.settimeout(1.0)
        while client.recv(65536):  # or its unread request would reset the answer
            pass

    def _forward(self, client: socket.socket, limit: int | None, rate: int | None) -> None:
        server = socket.create_connection(self._target, timeout=30)
        with self._lock:
            self._open.add(server)
        back = threading.Thread(target=_pump, args=(server, client, None), daemon=True)
        back.start()
        if _pump(client, server, limit, rate):
            self.refused += 1
        _end(server)
        back.join(5)


def _pump(source: socket.socket, target: socket.socket, limit: int | None, rate: int | None = None) -> bool:
    """Move bytes until one side ends, at most ``rate`` a second; True when the limit ended it."""
    moved = 0
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
            moved += len(data)
            if rate is not None:
                time.sleep(len(data) / rate)
            if limit is not None and moved > limit:
                return True
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    return False


def _end(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
