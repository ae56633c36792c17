"""Failure domains: told machine by machine, waited for no longer than is bearable, and not forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from outlast.config import NodeConfig
from outlast.controller import domains as module
from outlast.controller.domains import PATIENCE_S, Domains, labelled
from outlast.errors import RequestError
from support.controller_world import node_config, until, world

ZONES = {"spec": {"workers": {"failureDomain": "topology.kubernetes.io/zone"}}}


def node(tmp_path: Path, name: str, machine: str = "", domain: str = "") -> NodeConfig:
    return node_config(tmp_path, name).model_copy(update={"machine": machine, "domain": domain})


@pytest.mark.parametrize(
    ("labels", "machine", "domain", "placed"),
    [
        (False, "", "", "node-0"),
        (False, "m1", "", "m1"),
        (False, "m1", "d1", "d1"),
        (True, "m1", "d1", "d1"),
        (True, "", "", "node-0"),
        (True, "known", "", "zone-k"),
        (True, "m1", "", None),
    ],
)
def test_a_node_is_placed_by_what_is_known(
    tmp_path: Path, labels: bool, machine: str, domain: str, placed: str | None
) -> None:
    domains = Domains(tmp_path / "domains.json", labels)
    domains.tell({"known": "zone-k"})
    found = domains.place(node(tmp_path, "node-0", machine, domain), 0.0)
    assert (found and found.domain) == placed
    assert domains.unplaced == ([] if placed else ["m1"])


def test_who_waits_is_told_or_takes_its_machine(tmp_path: Path) -> None:
    path = tmp_path / "domains.json"
    domains = Domains(path, labelled=True)
    for name, machine in [("node-0", "m1"), ("node-1", "m1"), ("node-2", "m2")]:
        assert domains.place(node(tmp_path, name, machine), 0.0) is None
    assert domains.unplaced == ["m1", "m2"]
    assert [(c.node, c.domain) for c in domains.tell({"m1": "a", "m9": "b"})] == [("node-0", "a"), ("node-1", "a")]
    assert domains.overdue(PATIENCE_S - 0.1) == []
    assert [(c.node, c.domain) for c in domains.overdue(PATIENCE_S)] == [("node-2", "m2")]
    assert domains.overdue(PATIENCE_S) == []
    assert domains.unplaced == []
    domains.tell({"m2": "c"})

    after = Domains(path, labelled=True)
    placed = {name: after.place(node(tmp_path, name, machine), 0.0) for name, machine in
              [("node-0", "m1"), ("node-2", "m2"), ("node-3", "m2"), ("node-4", "m9")]}  # fmt: skip
    assert {name: found and found.domain for name, found in placed.items()} == {
        "node-0": "a",
        "node-2": "m2",
        "node-3": "c",
        "node-4": "b",
    }
    assert path.stat().st_mode & 0o777 == 0o600


def test_who_is_gone_waits_no_longer(tmp_path: Path) -> None:
    domains = Domains(tmp_path / "domains.json", labelled=True)
    domains.place(node(tmp_path, "node-0", "m1"), 0.0)
    domains.forget("node-0")
    assert domains.unplaced == []
    assert domains.tell({"m1": "a"}) == []


def test_a_file_that_holds_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "domains.json"
    path.write_text("[]")
    with pytest.raises(RequestError, match=r"domains\.json"):
        Domains(path, labelled=True)


@pytest.mark.parametrize(("job", "found"), [({}, False), (ZONES, True), ({"spec": {"workers": {}}}, False)])
def test_whether_the_job_names_a_label(job: Any, found: bool) -> None:
    assert labelled(job) is found


def test_the_driver_connects_a_node_once_it_is_placed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.3)

    async def scenario() -> None:
        async with world(tmp_path, nodes=0, job=ZONES) as w:
            for name, machine in [("node-0", "m1"), ("node-1", "m2")]:
                w.driver.add_node(node(tmp_path, name, machine))
            assert w.driver.status()["unplaced"] == ["m1", "m2"]
            assert w.kinds().count("unplaced") == 2
            assert w.driver.place({"m1": "zone-a"}) == ["node-0"]
            await until(lambda: w.agents.domains == {"node-0": "zone-a"})
            await until(lambda: w.agents.domains.get("node-1") == "m2")
            assert w.driver.status()["unplaced"] == []
            assert "domain-assumed" in w.kinds()
            w.driver.add_node(node(tmp_path, "node-1", "m2"))
        async with world(tmp_path, nodes=0, job=ZONES) as w:
            await until(lambda: w.agents.domains == {"node-0": "zone-a", "node-1": "m2"})

    asyncio.run(scenario())
