"""The lines to all nodes' agents: made and ended with the nodes, each a task of its own (see ``link``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from outlast import messages as m
from outlast.config import NodeConfig
from outlast.controller.link import AgentLink, Agents

Report = Callable[[str, str, str], None]
"""Called with a node, a kind and a text, as for ``link.Report``."""


class Lines:
    """``open`` gives it the task group that the lines live in; before that nothing is connected."""

    def __init__(self, agents: Agents, report: Report) -> None:
        self._agents, self._report = agents, report
        self._links: dict[str, AgentLink] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    def open(self, group: asyncio.TaskGroup) -> None:
        """Lines may be made from now on."""
        self._group = group

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._links))

    def __contains__(self, node: object) -> bool:
        return node in self._links

    def __len__(self) -> int:
        return len(self._links)

    def connect(self, config: NodeConfig) -> None:
        """Find or make the node's agent and have it join; again, if it is connected already."""
        node = config.node
        task = self._tasks.get(node)
        if task is not None and not task.done():
            self._links[node].join()
        elif self._group is not None:
            link = AgentLink(config, self._agents, lambda kind, text: self._report(node, kind, text))
            self._links[node] = link
            self._tasks[node] = self._group.create_task(link.run())

    def send(self, node: str, instruction: m.Instruction) -> None:
        """Queue an instruction; for a node without a line it is lost."""
        link = self._links.get(node)
        if link is not None:
            link.put(m.to_json(instruction))

    def drop_pending(self, node: str) -> None:
        """Forget what was queued for a node that is given up."""
        link = self._links.get(node)
        if link is not None:
            link.drop_pending()

    def hang_up(self, node: str) -> None:
        """End a node's line."""
        self._links.pop(node, None)
        task = self._tasks.pop(node, None)
        if task is not None:
            task.cancel()
