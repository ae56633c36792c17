"""Nodes with a real forkserver, for whichever test of agents asks: a forkserver for each file, a site for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from outlast.agent.forkclient import ForkClient
from support.sites import Site, open_site, open_zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[ForkClient]:
    with open_zygote() as client:
        yield client


@pytest.fixture
def site(zygote: ForkClient) -> Iterator[Site]:
    with open_site(zygote) as site:
        yield site
