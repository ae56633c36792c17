"""What a cluster does about nodes that are gone: an empty one takes a lost or drained one's place after a while.

A node that a fault has paused is left alone, to come back as a zombie would; it goes on once it was given up and the
job has done a later step without it. A node that was told to leave is not lost: it ends by itself within its grace
period, or is killed after it.
"""

from __future__ import annotations

import asyncio
import time

from outlast.config import NodeConfig
from outlast.errors import TransferError
from outlast.hosting.client import ControllerClient
from outlast.local.board import Board, Replacements
from outlast.local.nodes import LocalNodes
from outlast.local.output import Output

LEAVING_EVERY_S = 0.1


class NodeCare:
    """``tend`` after every status; it raises TransferError when the controller is gone, and is then called again.

    ``watch_leaving`` beside it, until it is cancelled.
    """

    def __init__(self, client: ControllerClient, output: Output, nodes: LocalNodes, replacements: Replacements) -> None:
        self._client = client
        self._output = output
        self._nodes = nodes
        self._replacements = replacements
        self._unregistered: NodeConfig | None = None
        self._joining: list[NodeConfig] = []
        self._added: set[str] = set()

    async def tend(self, board: Board) -> None:
        """Replace what has been gone for long enough, and let paused nodes go on."""
        await self._register_joining()
        lost = (board.lost() - self._nodes.leaving()) | self._nodes.lost()
        if board.asked is not None:  # who has left since was too many, or is made up for below
            await self._forget(self._replacements.open(lost & board.left()))
        for node in self._replacements.due(lost, time.monotonic()):
            if board.asked is None or self._count(board, lost) < board.asked:
                await self._replace(node)
            else:
                await self._forget({node})
        await self._add_asked(board, lost)
        for node, paused_at in self._nodes.paused().items():
            if node in lost and board.running and board.step > paused_at:
                self._output.progress(f"{node}, paused and given up, goes on")
                self._nodes.resume(node)

    async def _add_asked(self, board: Board, lost: set[str]) -> None:
        """As many nodes as somebody has asked for since the start, as whoever runs a cluster would give them."""
        if board.asked is None:
            return
        for _ in range(board.asked - self._count(board, lost) - self._replacements.coming(lost)):
            config = await self._nodes.create()
            self._added.add(config.node)
            await self.introduce(config)

    def _count(self, board: Board, lost: set[str]) -> int:
        """The nodes that are there and stay, or are on their way."""
        here = board.here()
        return len(here) + len(self._added - here - lost)

    async def introduce(self, config: NodeConfig) -> None:
        """Register one more node: now, or with a later ``tend`` when no controller answers."""
        self._joining.append(config)
        try:
            await self._register_joining()
        except TransferError:
            return

    async def watch_leaving(self) -> None:
        """See off the nodes that were told to leave."""
        while True:
            for node, ended in (await self._nodes.see_off()).items():
                self._output.progress(f"{node} has left" if ended else f"{node} had no time left: it is taken away")
            await asyncio.sleep(LEAVING_EVERY_S)

    async def _register_joining(self) -> None:
        while self._joining:
            config = self._joining.pop(0)
            try:
                await self._client.add_node(config)
            except TransferError:
                self._joining.insert(0, config)
                raise
            self._output.progress(f"{config.node} joins")

    async def _remove(self, node: str) -> None:
        if node not in self._nodes.paused():
            await self._nodes.lose(node)
            await self._client.remove_node(node)

    async def _forget(self, nodes: set[str]) -> None:
        """Nodes that need no replacement."""
        for node in sorted(nodes):
            await self._remove(node)
            self._replacements.done(node)

    async def _replace(self, node: str) -> None:
        await self._remove(node)
        if self._unregistered is None:
            self._unregistered = await self._nodes.create()
        await self._client.add_node(self._unregistered)
        self._added.add(self._unregistered.node)
        self._output.progress(f"{self._unregistered.node} replaces {node}")
        self._unregistered = None
        self._replacements.done(node)
