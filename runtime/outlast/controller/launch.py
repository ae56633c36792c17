"""``python -m outlast.controller.launch --address HOST:PORT --config FILE``: bring a controller to life and leave.

Makes the detached controller actor in a Ray that runs already, or finds it there, and waits until its HTTP answers.
Exit status 0: it does; 1: it does not, with the reason in one line; 2: the configuration or the request is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from outlast.config import CONTROLLER_ACTOR, ControllerConfig
from outlast.controller.job_settings import settings_of
from outlast.errors import RequestError, TransferError

POLL_S = 0.05
HEAD_RESOURCE = "node:__internal_head__"
"""What the head's raylet offers and no other: the controller and its folder are there."""
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The controller is on this machine, whatever proxies the environment names; its token is for nobody else."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    watchdog = threading.Timer(arguments.timeout, _give_up, args=(arguments.address, arguments.timeout))
    watchdog.daemon = True
    watchdog.start()
    try:
        config = _read_config(arguments.config)
        settings_of(config.job)
        _check_port(arguments.address)
        _launch(arguments.address, config, time.monotonic() + arguments.timeout)
    except RequestError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
    except TransferError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 1
    finally:
        watchdog.cancel()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m outlast.controller.launch", description=__doc__)
    parser.add_argument("--address", required=True, help="HOST:PORT of the Ray head's GCS")
    parser.add_argument("--config", required=True, type=Path, help="file with a ControllerConfig as JSON")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for all of it (default 60)")
    return parser


def _give_up(address: str, seconds: float) -> None:
    """End the process from a thread: a connection to a Ray that hangs is not interrupted by anything less."""
    print(f"launch: no controller within {seconds:g} s: Ray at {address} does not answer", file=sys.stderr, flush=True)
    os._exit(1)


def _read_config(path: Path) -> ControllerConfig:
    try:
        return ControllerConfig.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise RequestError(f"{path}: {error}") from error


def _check_port(address: str) -> None:
    """Raise TransferError unless something listens: with nobody there, Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise RequestError(f"--address {address}: HOST:PORT is needed")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
    except OSError as error:
        raise TransferError(f"nothing listens at {address} ({error}): is Ray's head running?") from error


def _launch(address: str, config: ControllerConfig, deadline: float) -> None:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        ray.init(address=address, namespace=config.namespace, log_to_driver=False, logging_level=logging.ERROR)
        actor = _make_actor(ray, config)
        identity = ray.get(actor.identity.remote(), timeout=max(0.1, deadline - time.monotonic()))
        _await_http(config, deadline, str(identity))
    except (RayError, GetTimeoutError, ConnectionError, RuntimeError, ValueError) as error:
        last_line = (str(error).strip() or "no reason given").splitlines()[-1]
        raise TransferError(f"Ray at {address} made no controller: {type(error).__name__}: {last_line}") from error
    finally:
        ray.shutdown()


def _make_actor(ray: Any, config: ControllerConfig) -> Any:
    from outlast.controller.controller_actor import ControllerActor

    return (
        ray.remote(ControllerActor)
        .options(
            name=CONTROLLER_ACTOR,
            namespace=config.namespace,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            get_if_exists=True,
            resources={HEAD_RESOURCE: 0.001},
        )
        .remote(config.model_dump_json())
    )


def _await_http(config: ControllerConfig, deadline: float, identity: str) -> None:
    """Wait until a controller answers: ``identity``, or one that took its place since."""
    while True:
        try:
            if _ask(config):
                return
        except (OSError, ValueError, KeyError) as error:
            if time.monotonic() > deadline:
                raise TransferError(f"controller {identity} does not answer over HTTP: {error}") from error
        time.sleep(POLL_S)


def _ask(config: ControllerConfig) -> bool:
    """Whether the controller that http.json names is the one that answers there."""
    where = json.loads(config.http_file.read_text())
    token = Path(config.token_file).read_text().strip()
    request = urllib.request.Request(f"http://{where['host']}:{where['port']}/status")
    request.add_header("Authorization", f"Bearer {token}")
    with _DIRECTLY.open(request, timeout=5.0) as answer:
        return bool(json.load(answer)["controller"] == where["controller"])


if __name__ == "__main__":
    raise SystemExit(main())
