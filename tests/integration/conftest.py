"""What the tests of several files share: the undisturbed run of each job, made once for all of them, and nodes with a
real forkserver (a forkserver for each file, a site for each test)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outlast.agent.forkclient import ForkClient
from support.runs import Outcome, trainctl_run, undisturbed_spec
from support.sites import Site, open_site, open_zygote


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Outcome]:
    """The run without faults and without a store of a spec's script: what every other run of it must end with."""
    made: dict[str, Outcome] = {}

    def run(spec: dict[str, Any]) -> Outcome:
        plain = undisturbed_spec(spec)
        key = repr(plain)
        if key not in made:
            made[key] = trainctl_run(plain, tmp_path_factory.mktemp("undisturbed"))
            assert made[key].status == 0, made[key].output
            assert made[key].recoveries == []
        return made[key]

    return run


@pytest.fixture(scope="module")
def zygote() -> Iterator[ForkClient]:
    with open_zygote() as client:
        yield client


@pytest.fixture
def site(zygote: ForkClient) -> Iterator[Site]:
    with open_site(zygote) as site:
        yield site
