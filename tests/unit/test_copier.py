"""The copier: what is sealed is what the tensors held, nobody spins, and what does not fit is refused by name."""

from __future__ import annotations

import gc
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.errors import SnapshotError, StateError
from outlast.snapshot import copier as copier_module
from outlast.snapshot.copier import Copier, Piece
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import Entry, ImageFile, plan_layout
from outlast.snapshot.kernel import copy_and_hash

GENERATION = Generation(1, 10, "a" * 16)


@pytest.fixture(scope="module")
def copier() -> Iterator[Copier]:
    copier = Copier()
    yield copier
    copier.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds every background pass until it is set."""
    gate = threading.Event()

    def wait_then_copy(*args: object, **kwargs: object) -> None:
        assert gate.wait(30)
        copy_and_hash(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(copier_module, "copy_and_hash", wait_then_copy)
    yield gate
    gate.set()


def image_of(path: pathlib.Path, tensor: torch.Tensor, state: int = 16) -> ImageFile:
    entries = [Entry("state", "U8", (state,), state), Entry("w", "U8", (tensor.nbytes,), tensor.nbytes)]
    return ImageFile.create(path, plan_layout(entries, {"kind": "shard"}))


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 100_000), min_size=1, max_size=6),
    eager_sizes=st.lists(st.integers(0, 5000), max_size=3),
    seed=st.integers(0, 99),
)
def test_the_image_holds_what_the_tensors_held(
    copier: Copier, tmp_path_factory: pytest.TempPathFactory, sizes: list[int], eager_sizes: list[int], seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=rng) for size in sizes]
    cuts = [(size // 3 // 64 * 64, size - size // 5) for size in sizes]
    pieces = [Piece(f"t{i}", tensor, *cut) for i, (tensor, cut) in enumerate(zip(tensors, cuts, strict=True))]
    eager = {f"e{i}": bytes([i + 1]) * size for i, size in enumerate(eager_sizes)}
    entries = [Entry(name, "U8", (len(data),), len(data)) for name, data in eager.items()]
    entries += [Entry(piece.entry, "U8", (piece.nbytes,), piece.nbytes) for piece in pieces]
    path = tmp_path_factory.mktemp("copier") / "slot-0-0.img"
    image = ImageFile.create(path, plan_layout(entries, {"kind": "shard"}))
    for step in (1, 2):
        generation = Generation(1, step, "b" * 16)
        ticket = copier.start(image, generation, eager, pieces)
        ticket.wait(30)
        assert ticket.done()
        assert ticket.copied_bytes == image.layout.trailer_offset
        assert ticket.seconds > 0
    reader = ImageFile.open(path)
    assert reader.generation == generation
    assert all(reader.verify())
    for piece in pieces:
        assert bytes(reader.entry_view(piece.entry)) == bytes_of(piece.tensor)[piece.byte_start : piece.byte_stop]
    for name, data in eager.items():
        assert bytes(reader.entry_view(name)) == data
    for offset, nbytes in reader.layout.pads:
        assert bytes(reader.view(offset, nbytes)) == bytes(nbytes)
    reader.close()
    image.close()


def test_eager_is_copied_before_start_returns(copier: Copier, tmp_path: pathlib.Path, held: threading.Event) -> None:
    tensor, state = torch.arange(1000.0), np.full(16, 7, np.uint8)
    image = image_of(tmp_path / "a.img", tensor)
    ticket = copier.start(image, GENERATION, {"state": state}, [Piece("w", tensor, 0, tensor.nbytes)])
    state[:] = 9
    assert not image.sealed
    held.set()
    ticket.wait(30)
    assert bytes(image.entry_view("state")) == bytes([7]) * 16


def test_waiting_sleeps_and_says_for_what(copier: Copier, tmp_path: pathlib.Path, held: threading.Event) -> None:
    tensor = torch.arange(1000.0)
    image = image_of(tmp_path / "a.img", tensor)
    ticket = copier.start(image, GENERATION, {"state": bytes(16)}, [Piece("w", tensor, 0, tensor.nbytes)])
    cpu = time.process_time()
    with pytest.raises(TimeoutError, match=rf"generation {GENERATION} to .*a\.img .* 0\.3 s: 0 of \d+ bytes"):
        ticket.wait(0.3)
    assert time.process_time() - cpu < 0.1
    assert not ticket.done()
    with pytest.raises(SnapshotError, match="still being filled"):
        copier.start(image, GENERATION, {"state": bytes(16)}, [Piece("w", tensor, 0, tensor.nbytes)])
    held.set()
    ticket.wait(30)
    assert image.generation == GENERATION


def test_storages_and_mapping_live_until_done(copier: Copier, tmp_path: pathlib.Path, held: threading.Event) -> None:
    tensor = torch.full((100_000,), 3.0)
    image = image_of(tmp_path / "a.img", tensor)
    ticket = copier.start(image, GENERATION, {"state": bytes(16)}, [Piece("w", tensor, 0, tensor.nbytes)])
    image.close()
    tensor.data = torch.zeros(1)
    gc.collect()
    filler = [torch.full((100_000,), 5.0) for _ in range(20)]
    held.set()
    ticket.wait(30)
    reader = ImageFile.open(tmp_path / "a.img")
    assert all(reader.verify())
    assert bytes(reader.entry_view("w")) == bytes_of(torch.full((100_000,), 3.0))
    assert len(filler) == 20


def test_the_copys_error_reaches_the_waiter(
    copier: Copier, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no such luck")

    monkeypatch.setattr(copier_module, "copy_and_hash", fail)
    tensor = torch.arange(1000.0)
    image = image_of(tmp_path / "a.img", tensor)
    ticket = copier.start(image, GENERATION, {"state": bytes(16)}, [Piece("w", tensor, 0, tensor.nbytes)])
    with pytest.raises(OSError, match="no such luck"):
        ticket.wait(30)
    assert ticket.done()
    assert not image.sealed


def test_what_does_not_fit_is_refused_and_the_seal_kept(copier: Copier, tmp_path: pathlib.Path) -> None:
    tensor = torch.arange(1000.0)
    image = image_of(tmp_path / "a.img", tensor)
    whole = Piece("w", tensor, 0, tensor.nbytes)
    copier.start(image, GENERATION, {"state": bytes(16)}, [whole]).wait(30)
    newer = Generation(1, 11, "a" * 16)
    cases = [
        ({"state": bytes(15)}, [whole], "'state' has 16 bytes in the layout, 15 are given"),
        ({"state": bytes(16)}, [Piece("w", tensor, 4, tensor.nbytes)], "'w' has 4000 bytes"),
        ({"state": bytes(16)}, [], "nothing is given for w"),
        ({"state": bytes(16)}, [whole, whole], "more than once"),
        ({"state": bytes(16), "x": b""}, [whole], "'x' has no bytes"),
        ({"state": bytes(16)}, [Piece("w", tensor, 4, 4004)], "has 4000"),
        ({"state": bytes(16)}, [Piece("w", torch.zeros(20, 50).t(), 0, 4000)], "contiguous"),
    ]
    for eager, lazy, text in cases:
        with pytest.raises(StateError, match=text):
            copier.start(image, newer, eager, lazy)
    assert image.generation == GENERATION


class FakeDevice:
    """A device that is the meta device, with content of its own."""

    def __init__(self) -> None:
        self.marked = False

    def begin(self, pieces: Sequence[Piece]) -> None:
        self.marked = bool(pieces)

    def run(self, image: ImageFile, pieces: Sequence[Piece]) -> None:
        assert self.marked
        for piece in pieces:
            image.entry_view(piece.entry)[:] = b"d" * piece.nbytes

    def close(self) -> None:
        self.marked = False


def test_device_pieces_are_brought_first_and_hashed_in_place(tmp_path: pathlib.Path) -> None:
    device = FakeDevice()
    copier = Copier(device=device)
    tensor, remote = torch.arange(1000.0), torch.zeros(5000, dtype=torch.uint8, device="meta")
    entries = [Entry("r", "U8", (5000,), 5000), Entry("w", "F32", (1000,), 4000)]
    image = ImageFile.create(tmp_path / "a.img", plan_layout(entries, {"kind": "shard"}))
    copier.start(image, GENERATION, {}, [Piece("w", tensor, 0, 4000), Piece("r", remote, 0, 5000)]).wait(30)
    assert bytes(image.entry_view("r")) == b"d" * 5000
    assert bytes(image.entry_view("w")) == bytes_of(tensor)
    assert all(image.verify())
    copier.close()
    assert not device.marked


def test_thread_counts_of_later_threads_stay(copier: Copier, tmp_path: pathlib.Path) -> None:
    tensor = torch.arange(1000.0)
    image = image_of(tmp_path / "a.img", tensor)
    before = torch.get_num_threads()
    copier.start(image, GENERATION, {"state": bytes(16)}, [Piece("w", tensor, 0, tensor.nbytes)]).wait(30)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]
