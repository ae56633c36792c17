"""Whether the memory of fewer nodes holds a job's snapshots: reckoned before it is made smaller, not after. Pure.

What is not known before ranks have planned anew is estimated: the images of a generation hold all ranks' state once, so
that each of r ranks gets an r-th of their bytes, and a header of its own. Parity is what the redundancy groups of the
new size need. Images of the old world that nodes make for others to read while ranks restore come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from outlast.snapshot.erasure import BLOCK, GroupLayout
from outlast.snapshot.layout import FOOTER_BYTES, PAGE
from outlast.snapshot.placement import groups

UNEVENNESS = 0.01
"""How much larger than the average an image is taken to be: shards are cut at rows."""

OWN_STATE = 1 << 20
"""Bytes that every image has whatever the world is: header, RNG, the user's own small state."""


def resize_need(
    lengths: Mapping[int, int],
    nodes: int,
    procs: int,
    group_size: int | None,
    parity: int | None,
    slots: int,
    domains: Sequence[str] = (),
) -> int:
    """Bytes that the node with most to hold needs for its images when ``nodes`` of ``procs`` ranks train.

    ``lengths``: bytes of the present images, by rank; ``group_size`` and ``parity``: as for ``placement.groups``, None
    where they are chosen; ``slots``: generations that a node has room for; ``domains``: the failure domain of each
    node, if known. Raises ValueError when ``nodes`` or ``procs`` is not positive.
    """
    if nodes < 1 or procs < 1:
        raise ValueError(f"{nodes} nodes of {procs} ranks: both must be at least 1")
    if not lengths:
        return 0
    image = new_image(lengths, nodes * procs)
    placed = groups([(seat, domains[seat] if domains else str(seat)) for seat in range(nodes)], group_size, parity)
    share = max(parity_share(len(group.seats), group.parity, image) for group in placed)
    return slots * procs * (image + share) + _guests(lengths, nodes, procs)


def new_image(lengths: Mapping[int, int], ranks: int) -> int:
    """Bytes of one image when ``ranks`` share what the images of ``lengths`` hold: an estimate from above."""
    average = -(-sum(lengths.values()) // ranks)
    return average + int(average * UNEVENNESS) + OWN_STATE


def parity_share(members: int, parity: int, image: int) -> int:
    """Bytes of the parity image that each of ``members`` holds for images of ``image`` bytes, trailer included."""
    if parity == 0:
        return 0
    rows = parity * GroupLayout(members, parity, image).chunk
    header = PAGE * (1 + (parity + members) // 16)
    return rows + header + 8 * (rows // BLOCK + header // BLOCK + 1) + FOOTER_BYTES


def _guests(lengths: Mapping[int, int], nodes: int, procs: int) -> int:
    """Old images without a node of their own, spread over the new nodes, as large as the largest."""
    homeless = max(len(lengths) - nodes * procs, 0)
    return -(-homeless // nodes) * max(lengths.values())


@dataclass(frozen=True)
class Fit:
    """Whether ``need`` bytes fit on every node: true when nothing is ``missing``, which is bytes by node."""

    need: int
    missing: Mapping[str, int]

    def __bool__(self) -> bool:
        return not self.missing

    def __str__(self) -> str:
        if self:
            return f"every node has the {_mib(self.need)} that snapshots need"
        lacking = ", ".join(f"{node} lacks {_mib(count)}" for node, count in self.missing.items())
        return f"snapshots need {_mib(self.need)} a node: {lacking}"


def fits(need: int, memory: Mapping[str, int | None]) -> Fit:
    """Which nodes lack how much of ``need`` bytes.

    ``memory``: the bytes that the images of each node may take in all; a node that does not say (None) counts as large
    enough: what turns out too small ends in a ``Capacity`` event, not in a loss.
    """
    missing = {node: need - room for node, room in sorted(memory.items()) if room is not None and room < need}
    return Fit(need, missing)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
