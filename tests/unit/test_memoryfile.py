"""Memory as a file: what http.client reads of it, and what awscrt does, is what is there, whatever they ask for."""

from __future__ import annotations

import io

import pytest

from outlast.checkpoint.memoryfile import SEND_PIECE, MemoryFile

DATA = memoryview(bytes(range(256)) * (3 * SEND_PIECE // 256) + b"end")


@pytest.mark.parametrize("asked", [1, 16384, SEND_PIECE, 2 * SEND_PIECE, -1, None])
def test_reading_gives_all_of_it_and_no_copy(asked: int | None) -> None:
    view, pieces = MemoryFile(DATA), []
    while piece := view.read(asked):
        pieces.append(piece)
    assert b"".join(pieces) == DATA
    assert all(piece.obj is DATA.obj for piece in pieces)
    assert view.tell() == len(view) == len(DATA)
    assert view.read(asked) == b""


def test_reading_into_and_rewinding() -> None:
    view, buffer = MemoryFile(DATA), bytearray(1000)
    assert (view.readinto(buffer), bytes(buffer)) == (1000, bytes(DATA[:1000]))
    assert view.read(0) == b""
    assert view.seek(-3, io.SEEK_END) == len(DATA) - 3
    assert (view.readinto(buffer), bytes(buffer[:3])) == (3, b"end")
    assert view.seek(10) == 10
    assert view.seek(5, io.SEEK_CUR) == 15
    assert view.read(-1) == DATA[15:]
