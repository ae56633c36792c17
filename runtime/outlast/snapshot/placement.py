"""Which seats protect each other: the division of a job's nodes into redundancy groups. Pure and deterministic.

Groups are as equal in size as possible, and each failure domain is spread over as many groups as possible: the nodes,
ordered by domain, are dealt to the groups like cards, so that of a domain with c nodes a group gets at most
ceil(c / groups). Domains come in the order of their lowest seat, not of their names: a node replaced by one of another
domain of its own changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

MAX_DEFAULT_SIZE = 8
"""Members of a group unless asked otherwise: parity 2 then costs a third of the data."""

_MIN_SPREAD_SIZE = 4
"""Groups are not made smaller than this for the sake of domains: parity 2 would cost more than the data itself."""

_DEFAULT_PARITY = 2


@dataclass(frozen=True)
class Group:
    """Seats that protect each other, ascending, and how many of them may be lost at once."""

    seats: tuple[int, ...]
    parity: int


def groups(nodes: Sequence[tuple[int, str]], group_size: int | None, parity: int | None) -> list[Group]:
    """Divide ``nodes``, pairs of (seat, failure domain), into redundancy groups, ordered by their first seat.

    ``group_size`` >= 2 is the most members a group should have; it is exceeded only where a single node would be left
    over. By default it is up to 8, and smaller, down to 4, where that brings all members of a group into distinct
    domains, or else makes the loss of a whole domain survivable. ``parity`` >= 0 is by default 2; a group of n has at
    most n - 1. A single node makes a group without parity. Raises ValueError for a size or parity out of range or a
    seat that comes twice.
    """
    _check(nodes, group_size, parity)
    if not nodes:
        return []
    wish = _DEFAULT_PARITY if parity is None else parity
    order = _by_domain(nodes)
    count = _group_count([len(seats) for seats in order], group_size, wish)
    cards = [seat for seats in order for seat in seats]
    hands = sorted(tuple(sorted(cards[i::count])) for i in range(count))
    return [Group(seats, min(wish, len(seats) - 1)) for seats in hands]


def _check(nodes: Sequence[tuple[int, str]], group_size: int | None, parity: int | None) -> None:
    if group_size is not None and group_size < 2:
        raise ValueError(f"groups of {group_size}: a group needs 2 members at least to protect each other")
    if parity is not None and parity < 0:
        raise ValueError(f"parity {parity}: it cannot be negative")
    if len({seat for seat, _ in nodes}) != len(nodes):
        raise ValueError(f"seats come twice: {sorted(seat for seat, _ in nodes)}")


def _by_domain(nodes: Sequence[tuple[int, str]]) -> list[list[int]]:
    """The seats of each domain, ascending: largest domains first, then those with the lowest seat."""
    domains: dict[str, list[int]] = defaultdict(list)
    for seat, domain in sorted(nodes):
        domains[domain].append(seat)
    return sorted(domains.values(), key=lambda seats: (-len(seats), seats))


def _group_count(domain_sizes: Sequence[int], group_size: int | None, parity: int) -> int:
    """How many groups to make."""
    total = sum(domain_sizes)
    fewest = max(1, min(-(-total // (group_size or MAX_DEFAULT_SIZE)), total // 2))
    if group_size is not None:
        return fewest
    candidates = range(fewest, max(fewest, total // _MIN_SPREAD_SIZE) + 1)
    for most_of_a_domain in (1, parity):
        for count in candidates:
            if max(domain_sizes) <= most_of_a_domain * count:
                return count
    return fewest
