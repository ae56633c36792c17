"""What the controller must find again after its own death, as small private files in DIR/control.

``NodeRegistry`` keeps the configuration of every node, so that a new controller finds or makes the agents of the old
one. What those agents do, the new one asks them: nothing is decided from a file, but for the job's end, which is final.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from outlast.config import NodeConfig
from outlast.errors import RequestError


def write_private_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file in one step by one that only its owner reads. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(value, file, indent=1)
    draft.replace(path)


def parse_node(body: str | bytes) -> NodeConfig:
    """Read a NodeConfig from JSON. Raises RequestError naming the fields that are wrong."""
    try:
        return NodeConfig.model_validate_json(body)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise RequestError(f"not a node's configuration: {problems}") from error


class NodeRegistry:
    """The registered nodes, in DIR/control/nodes.json. Raises RequestError when that file holds something else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nodes = {config.node: config for config in self._load()}

    def _load(self) -> list[NodeConfig]:
        if not self._path.exists():
            return []
        try:
            found = json.loads(self._path.read_text())["nodes"]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{self._path} holds no nodes ({error}): remove it, then register them anew") from error
        return [parse_node(json.dumps(item)) for item in found]

    def all(self) -> list[NodeConfig]:
        """Every node's configuration, in the order of registration."""
        return list(self._nodes.values())

    def __contains__(self, node: object) -> bool:
        return node in self._nodes

    def add(self, config: NodeConfig) -> bool:
        """Keep ``config``; False when it is known already. Raises RequestError when the id is another node's."""
        known = self._nodes.get(config.node)
        if known is not None and known != config:
            raise RequestError(f"{config.node} is registered with another configuration: a new node needs a new id")
        if known is None:
            self._nodes[config.node] = config
            self._save()
        return known is None

    def remove(self, node: str) -> bool:
        """Forget a node; False when it is unknown."""
        if self._nodes.pop(node, None) is None:
            return False
        self._save()
        return True

    def _save(self) -> None:
        write_private_json(self._path, {"nodes": [config.model_dump(mode="json") for config in self._nodes.values()]})
