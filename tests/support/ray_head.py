"""A Ray head of a test's own, found and ended by its session, never by name."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
START_S = 60.0


@dataclass(frozen=True)
class Head:
    """A head that runs: ``env`` lets a process join it, ``session`` holds all of its processes."""

    address: str
    env: Mapping[str, str]
    session: int

    def pids(self) -> list[int]:
        return session_pids(self.session)


def session_pids(session: int) -> list[int]:
    """The living processes of one session."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def kill_session(session: int, seconds: float = 10.0) -> None:
    """SIGKILL a whole session and return when nothing of it runs."""
    deadline = time.monotonic() + seconds
    while left := session_pids(session):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        assert time.monotonic() < deadline, f"{left} do not end"
        time.sleep(0.05)


@contextmanager
def ray_head(token_file: Path) -> Iterator[Head]:
    """Start a head with token authentication and end it, whatever happens. ``token_file`` is made."""
    folder = Path(tempfile.mkdtemp(prefix="outlast-"))
    token_file.write_text(secrets.token_hex(32))
    token_file.chmod(0o600)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("runtime", "operator", "tests")),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen(_command(folder), env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        assert process.wait(START_S) == 0
        yield Head((folder / "ray_current_cluster").read_text().strip(), env, process.pid)
    finally:
        process.kill()
        process.wait()
        kill_session(process.pid)
        shutil.rmtree(folder, ignore_errors=True)


def _command(folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0", "--node-ip-address=127.0.0.1"),
        *("--num-cpus=0", "--num-gpus=0", "--no-monitor", "--include-log-monitor=False", "--disable-usage-stats"),
        *("--include-dashboard=false", "--dashboard-port=0", "--object-store-memory=80000000", f"--temp-dir={folder}"),
    ]
