"""What a smaller job needs in memory, and which nodes lack it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.controller.capacity import OWN_STATE, Fit, fits, new_image, parity_share, resize_need
from outlast.snapshot.inventory import GroupInfo
from outlast.snapshot.parity_build import parity_layout

MIB = 1 << 20


def lengths(ranks: int, each: int = 100 * MIB) -> dict[int, int]:
    return dict.fromkeys(range(ranks), each)


@pytest.mark.parametrize(
    ("ranks", "nodes", "procs", "group_size", "parity", "mib"),
    [
        # images of 400 MiB in all, and one MiB each; parity rounded up to blocks; guests of 100 MiB
        pytest.param(4, 4, 1, None, 0, 102, id="the same size, no parity"),
        pytest.param(4, 2, 1, None, 0, 203 + 100, id="half, no parity: two guests on two nodes"),
        pytest.param(4, 2, 1, None, None, 203 + 203 + 100, id="half: parity is a mirror"),
        pytest.param(4, 1, 1, None, None, 405 + 300, id="one node: no parity, all others are its guests"),
        pytest.param(4, 3, 1, None, None, 135.7 + 2 * 135.7 + 100, id="three: two parities of one chunk each"),
        pytest.param(4, 3, 1, None, 1, 135.7 + 67.8 + 100, id="three, parity of one"),
        pytest.param(8, 3, 2, None, 1, 2 * (135.7 + 67.8) + 100, id="two ranks a node"),
        pytest.param(6, 5, 1, 3, None, 122.2 + 2 * 122.2 + 100, id="groups of three and two: three hold most"),
        pytest.param(8, 7, 1, 4, None, 116.4 + 2 * 116.4 + 100, id="groups of four and three: three hold most"),
        pytest.param(2, 4, 1, None, 0, 51.5, id="larger: no guests"),
    ],
)
def test_what_the_fullest_node_needs(
    ranks: int, nodes: int, procs: int, group_size: int | None, parity: int | None, mib: float
) -> None:
    need = resize_need(lengths(ranks), nodes, procs, group_size, parity, slots=1)
    assert need / MIB == pytest.approx(mib, rel=0.01)


def test_each_slot_has_images_and_parity_but_guests_come_once() -> None:
    one, three = (resize_need(lengths(4), 2, 1, None, None, slots) for slots in (1, 3))
    image = new_image(lengths(4), 2)
    assert three - one == 2 * (image + parity_share(2, 1, image))


def test_domains_decide_the_groups() -> None:
    """Eight nodes in four racks make two groups of four, with more parity each than one of eight."""
    apart = resize_need(lengths(9), 8, 1, None, None, 2)
    racks = resize_need(lengths(9), 8, 1, None, None, 2, domains=[f"rack-{seat // 2}" for seat in range(8)])
    assert racks > apart


def test_nothing_held_needs_nothing_and_nobody_is_refused() -> None:
    assert resize_need({}, 2, 1, None, None, 3) == 0
    for nodes, procs in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            resize_need(lengths(4), nodes, procs, None, None, 2)


@given(st.integers(2, 20), st.integers(1, 19), st.integers(1, 300 * MIB))
def test_the_parity_share_is_what_keepers_allocate(members: int, parity: int, image: int) -> None:
    parity = min(parity, members - 1)
    group = GroupInfo(tuple(range(members)), parity, (image,) * members, 0)
    true = parity_layout(group, 0).total_bytes
    assert true <= parity_share(members, parity, image) <= true + 64 * 1024


@given(st.dictionaries(st.integers(0, 40), st.integers(1, 1 << 40), min_size=1), st.integers(1, 40))
def test_new_images_hold_all_that_the_old_ones_held(old: dict[int, int], ranks: int) -> None:
    image = new_image(old, ranks)
    assert ranks * image >= sum(old.values()) + ranks * OWN_STATE
    assert ranks * (image - OWN_STATE) <= sum(old.values()) * 1.01 + 2 * ranks


def test_nodes_that_lack_memory_are_named() -> None:
    fit = fits(300 * MIB, {"node-2": 100 * MIB, "node-0": 300 * MIB, "node-1": 298 * MIB, "node-3": None})
    assert not fit
    assert fit.missing == {"node-1": 2 * MIB, "node-2": 200 * MIB}
    assert str(fit) == "snapshots need 300.0 MiB a node: node-1 lacks 2.0 MiB, node-2 lacks 200.0 MiB"
    enough = fits(300 * MIB, {"node-0": 300 * MIB, "node-3": None})
    assert enough == Fit(300 * MIB, {})
    assert enough
    assert str(enough) == "every node has the 300.0 MiB that snapshots need"
