"""What a cluster does about lost nodes: an empty one takes a lost one's place after a while.

A node that a fault has paused is left alone, to come back as a zombie would; it goes on once it was given up and the
job has done a later step without it.
"""

from __future__ import annotations

import time

from outlast.config import NodeConfig
from outlast.local.board import Board, Replacements
from outlast.local.client import ControllerClient
from outlast.local.nodes import LocalNodes
from outlast.local.output import Output


class NodeCare:
    """``tend`` after every status; it raises TransferError when the controller is gone, and is then called again."""

    def __init__(self, client: ControllerClient, output: Output, nodes: LocalNodes, replacements: Replacements) -> None:
        self._client = client
        self._output = output
        self._nodes = nodes
        self._replacements = replacements
        self._unregistered: NodeConfig | None = None

    async def tend(self, board: Board) -> None:
        """Replace what has been lost for long enough, and let paused nodes go on."""
        lost = board.lost() | self._nodes.lost()
        for node in self._replacements.due(lost, time.monotonic()):
            await self._replace(node)
        for node, paused_at in self._nodes.paused().items():
            if node in lost and board.running and board.step > paused_at:
                self._output.progress(f"{node}, paused and given up, goes on")
                self._nodes.resume(node)

    async def _replace(self, node: str) -> None:
        if node not in self._nodes.paused():
            await self._nodes.lose(node)
            await self._client.remove_node(node)
        if self._unregistered is None:
            self._unregistered = await self._nodes.create()
        await self._client.add_node(self._unregistered)
        self._output.progress(f"{self._unregistered.node} replaces {node}")
        self._unregistered = None
        self._replacements.done(node)
