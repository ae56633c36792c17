"""Groups: sizes, domains, and that they stay as they are."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.snapshot.placement import Group, groups


def apart(count: int) -> list[tuple[int, str]]:
    return [(seat, f"host-{seat}") for seat in range(count)]


@pytest.mark.parametrize(
    ("count", "group_size", "parity", "sizes"),
    [
        (0, None, None, []),
        (1, None, None, [(1, 0)]),
        (2, None, None, [(2, 1)]),
        (3, None, None, [(3, 2)]),
        (4, None, None, [(4, 2)]),
        (8, None, None, [(8, 2)]),
        (9, None, None, [(5, 2), (4, 2)]),
        (17, None, None, [(6, 2), (6, 2), (5, 2)]),
        (4, 2, None, [(2, 1), (2, 1)]),
        (3, 2, None, [(3, 2)]),
        (5, 2, 2, [(3, 2), (2, 1)]),
        (5, 4, 1, [(3, 1), (2, 1)]),
        (6, 6, 0, [(6, 0)]),
        (4, 100, 3, [(4, 3)]),
    ],
)
def test_sizes(count: int, group_size: int | None, parity: int | None, sizes: list[tuple[int, int]]) -> None:
    found = groups(apart(count), group_size, parity)
    assert sorted(((len(group.seats), group.parity) for group in found), reverse=True) == sizes


@pytest.mark.parametrize(
    ("domains", "group_size", "expected"),
    [
        ("abcd", None, [(0, 1, 2, 3)]),
        ("aabb", 2, [(0, 2), (1, 3)]),
        ("aabbccdd", None, [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("aabbccdd", 8, [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("aaaabbbb", None, [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("aaaa", None, [(0, 1, 2, 3)]),
        ("abbbcccd", 4, [(0, 1, 3, 5), (2, 4, 6, 7)]),
    ],
)
def test_domains(domains: str, group_size: int | None, expected: list[tuple[int, ...]]) -> None:
    assert [group.seats for group in groups(list(enumerate(domains)), group_size, None)] == expected


def test_a_replacement_in_a_domain_of_its_own_changes_nothing() -> None:
    nodes = apart(20)
    assert groups([*nodes[:5], (5, "another"), *nodes[6:]], None, None) == groups(nodes, None, None)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="groups of 1"):
        groups(apart(3), 1, None)
    with pytest.raises(ValueError, match="parity -1"):
        groups(apart(3), None, -1)
    with pytest.raises(ValueError, match="twice"):
        groups([(0, "a"), (0, "b")], None, None)


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=60),
    st.one_of(st.none(), st.integers(2, 12)),
    st.one_of(st.none(), st.integers(0, 5)),
)
def test_every_seat_has_one_group_and_domains_are_spread(
    domains: list[int], group_size: int | None, parity: int | None
) -> None:
    nodes = [(seat, f"d{domain}") for seat, domain in enumerate(domains)]
    found = groups(nodes, group_size, parity)
    assert sorted(seat for group in found for seat in group.seats) == list(range(len(nodes)))
    sizes = [len(group.seats) for group in found]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= max(group_size or 8, 3)
    totals = Counter(domains)
    for group in found:
        assert group.parity == min(2 if parity is None else parity, len(group.seats) - 1)
        for domain, members in Counter(domains[seat] for seat in group.seats).items():
            assert members <= -(-totals[domain] // len(found))
    assert groups(nodes[::-1], group_size, parity) == found
    assert isinstance(found[0], Group)
