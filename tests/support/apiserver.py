"""A real API server for contract tests: etcd and kube-apiserver, without controllers and without nodes."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from support.stores import lab

T = TypeVar("T")

ADMIN_TOKEN = "admin-token"


def assets() -> pathlib.Path:
    """The folder of etcd, kube-apiserver and kubectl; skips where there is none."""
    named = os.environ.get("KUBEBUILDER_ASSETS")
    command = lab()
    if named is None and command is not None:
        asked = subprocess.run([command, "assets"], capture_output=True, text=True, timeout=120, check=False)
        named = asked.stdout.strip() if asked.returncode == 0 else None
    if named is None or not (pathlib.Path(named) / "kube-apiserver").exists():
        pytest.skip("no API server here: set KUBEBUILDER_ASSETS to a folder with etcd, kube-apiserver and kubectl")
    return pathlib.Path(named)


def eventually(what: str, check: Callable[[], T], within_s: float = 20.0, every_s: float = 0.1) -> T:
    """What ``check`` returns once that is true; an AssertionError that says ``what`` was waited for."""
    until = time.monotonic() + within_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until, f"not within {within_s:g} s: {what}; last seen: {found!r}"
        time.sleep(every_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ApiServer:
    """One of its own, with an empty etcd; ``stop_server`` and ``start_server`` restart the API server alone."""

    def __init__(self, folder: pathlib.Path, flags: Sequence[str] = ()) -> None:
        self._bin, self._folder, self._flags = assets(), folder, list(flags)
        self.port, self._etcd_port, peer = free_port(), free_port(), free_port()
        self.url = f"https://127.0.0.1:{self.port}"
        self._etcd_command = [
            str(self._bin / "etcd"),
            f"--data-dir={folder}/etcd",
            f"--listen-client-urls=http://127.0.0.1:{self._etcd_port}",
            f"--advertise-client-urls=http://127.0.0.1:{self._etcd_port}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}",
            "--unsafe-no-fsync",
            "--log-level=error",
        ]
        self._etcd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self.kubeconfig = self.write_kubeconfig("admin", ADMIN_TOKEN)

    def start(self) -> None:
        self._write_keys()
        self._etcd = self._run("etcd", self._etcd_command)
        self.start_server()

    def start_server(self) -> None:
        """Returns when it is ready."""
        folder = self._folder
        self._server = self._run(
            "kube-apiserver",
            [
                str(self._bin / "kube-apiserver"),
                f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
                f"--secure-port={self.port}",
                "--bind-address=127.0.0.1",
                f"--cert-dir={folder}/certificates",
                f"--token-auth-file={folder}/tokens.csv",
                "--authorization-mode=RBAC",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={folder}/key.pem",
                f"--service-account-signing-key-file={folder}/key.pem",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--disable-admission-plugins=ServiceAccount",
                "--endpoint-reconciler-type=none",
                "--v=0",
                *self._flags,
            ],
        )
        eventually("the API server is ready", self._is_ready, within_s=60)

    def stop_server(self, hard: bool = False) -> None:
        """End the API server; ``hard``: without telling anybody."""
        server, self._server = self._server, None
        if server is not None:
            server.kill() if hard else server.terminate()
            server.wait(60)

    def stop(self) -> None:
        self.stop_server(hard=True)
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait(10)

    def compact(self) -> None:
        """Have etcd forget all but the newest revision."""
        status = self._etcd_call("/v3/maintenance/status", {})
        self._etcd_call("/v3/kv/compaction", {"revision": status["header"]["revision"], "physical": True})

    def write_kubeconfig(self, name: str, token: str, url: str = "") -> str:
        """A kubeconfig for whoever has ``token``; ``url``: through something in between."""
        path = self._folder / f"{name}.kubeconfig"
        cluster = {"server": url or self.url, "certificate-authority": f"{self._folder}/certificates/apiserver.crt"}
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "it",
                    "clusters": [{"name": "it", "cluster": cluster}],
                    "users": [{"name": "it", "user": {"token": token}}],
                    "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
                }
            )
        )
        return str(path)

    def kubectl(
        self, *arguments: str, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """kubectl as the administrator."""
        command = [str(self._bin / "kubectl"), "--kubeconfig", self.kubeconfig, *arguments]
        ran = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
        assert not check or ran.returncode == 0, f"kubectl {' '.join(arguments)}: {ran.stderr}"
        return ran

    def _write_keys(self) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._folder.joinpath("key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
            )
        )
        self._folder.joinpath("tokens.csv").write_text(f'{ADMIN_TOKEN},admin,admin,"system:masters"\n')

    def _run(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def _is_ready(self) -> bool:
        server = self._server
        assert server is not None
        assert server.poll() is None, (
            f"kube-apiserver ended: {(self._folder / 'kube-apiserver.log').read_text()[-2000:]}"
        )
        request = urllib.request.Request(f"{self.url}/readyz", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
        try:
            with urllib.request.urlopen(request, timeout=2, context=ssl._create_unverified_context()) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _etcd_call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"http://127.0.0.1:{self._etcd_port}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


@contextmanager
def api_server(*flags: str) -> Iterator[ApiServer]:
    """A started one, with ``flags`` beside its own; skips where there is none to start."""
    assets()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="outlast-api-"))
    server = ApiServer(folder, flags)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)
