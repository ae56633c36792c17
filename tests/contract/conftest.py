"""One API server for all contract tests that need one: started by the first, ended after the last."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from outlast_operator.crd import to_yaml
from support.apiserver import ApiServer, api_server, eventually
from support.controllers import Controllers, serving
from support.operators import World, world


@pytest.fixture(scope="session")
def api() -> Iterator[ApiServer]:
    """A real API server that knows TrainingJobs; skips where there is none."""
    with api_server() as server:
        server.kubectl("apply", "-f", "-", stdin=to_yaml())
        eventually("TrainingJobs are served", lambda: server.kubectl("get", "tj", check=False).returncode == 0)
        yield server


@pytest.fixture
def place(api: ApiServer, tmp_path: pathlib.Path) -> Iterator[World]:
    """A namespace of its own."""
    with world(api, tmp_path) as made:
        yield made


@pytest.fixture
def controllers() -> Iterator[Controllers]:
    """Controllers of jobs, which say what they are told to."""
    with serving() as served:
        yield served
