"""Which failure domain each node is in, as far as that is known. What was told survives the controller.

A node may come without its domain: Pods see no labels of their machine, so whoever reads the cluster tells them,
machine by machine. Until then a node waits, ``PATIENCE_S`` at most, after which its machine counts as a domain of its
own. A job that names no ``failureDomain`` waits for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.config import NodeConfig
from outlast.controller.registry import write_private_json
from outlast.errors import RequestError

PATIENCE_S = 15.0
"""Seconds that a node waits for the domain of its machine."""


@dataclass(frozen=True)
class Waiting:
    """A node whose domain is not known; ``until``: monotonic seconds."""

    config: NodeConfig
    until: float


def labelled(job: Mapping[str, Any]) -> bool:
    """Whether a TrainingJob (as JSON) names a node label as its failure domain."""
    return bool((job.get("spec") or {}).get("workers", {}).get("failureDomain"))


class Domains:
    """Kept in ``path``. ``labelled``: the job names a label, so that domains are told.

    Raises RequestError when the file holds something else.
    """

    def __init__(self, path: Path, labelled: bool) -> None:
        self._path, self._labelled = path, labelled
        self._machines, self._nodes = _read(path)
        self._waiting: dict[str, Waiting] = {}

    @property
    def unplaced(self) -> list[str]:
        """The machines whose domain is waited for."""
        return sorted({waiting.config.machine for waiting in self._waiting.values()})

    def place(self, config: NodeConfig, now: float) -> NodeConfig | None:
        """The node with its domain; None: it waits from now on."""
        domain = config.domain or self._nodes.get(config.node) or self._machines.get(config.machine, "")
        if not domain and not (self._labelled and config.machine):
            domain = config.machine or config.node
        if domain:
            return self._settle(config, domain)
        self._waiting.setdefault(config.node, Waiting(config, now + PATIENCE_S))
        return None

    def tell(self, domains: Mapping[str, str]) -> list[NodeConfig]:
        """The domains of machines; returns the nodes that waited for that, with theirs."""
        if any(self._machines.get(machine) != domain for machine, domain in domains.items()):
            self._machines.update(domains)
            self._save()
        return [
            self._settle(waiting.config, domains[waiting.config.machine])
            for waiting in list(self._waiting.values())
            if waiting.config.machine in domains
        ]

    def overdue(self, now: float) -> list[NodeConfig]:
        """The nodes that have waited long enough, with their machine as domain."""
        late = [waiting.config for waiting in self._waiting.values() if now >= waiting.until]
        return [self._settle(config, config.machine) for config in late]

    def forget(self, node: str) -> None:
        """A node is no more."""
        self._waiting.pop(node, None)
        if self._nodes.pop(node, None) is not None:
            self._save()

    def _settle(self, config: NodeConfig, domain: str) -> NodeConfig:
        """A node keeps the domain that its parity was placed by, whatever is told later."""
        self._waiting.pop(config.node, None)
        if self._nodes.get(config.node) != domain and not config.domain:
            self._nodes[config.node] = domain
            self._save()
        return config.model_copy(update={"domain": domain})

    def _save(self) -> None:
        write_private_json(self._path, {"machines": self._machines, "nodes": self._nodes})


def _read(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    if not path.exists():
        return {}, {}
    try:
        found = json.loads(path.read_text())
        return dict(found["machines"]), dict(found["nodes"])
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path} holds no failure domains ({error}): remove it, they are told again") from error
