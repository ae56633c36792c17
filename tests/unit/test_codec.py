"""ISA-L's codec against arithmetic in GF(2^8) written out, on every kind of buffer."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.errors import RequestError, UnrecoverableError
from outlast.snapshot import codec as codec_module
from outlast.snapshot.codec import Codec, isal

Bytes = npt.NDArray[np.uint8]


def multiply(a: int, b: int) -> int:
    """In GF(2^8) modulo x^8 + x^4 + x^3 + x^2 + 1, as ISA-L has it."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a, b = (a << 1) ^ (0x11D if a & 0x80 else 0), b >> 1
    return product


def reference_parity(data: list[Bytes], m: int) -> list[Bytes]:
    """Row r of the Cauchy matrix has 1 / ((k + r) xor c) in column c."""
    k = len(data)
    inverse = {a: b for a in range(1, 256) for b in range(1, 256) if multiply(a, b) == 1}
    rows = []
    for row in range(k, k + m):
        total = np.zeros_like(data[0])
        for column, chunk in enumerate(data):
            table = np.array([multiply(value, inverse[row ^ column]) for value in range(256)], np.uint8)
            total ^= table[chunk]
        rows.append(total)
    return rows


def made(k: int, m: int, size: int, seed: int = 0) -> list[Bytes]:
    """A codeword: k random data chunks and their parity."""
    chunks = [*np.random.default_rng(seed).integers(0, 256, (k, size), np.uint8), *np.full((m, size), 7, np.uint8)]
    Codec(k, m).encode(chunks[:k], chunks[k:])
    return chunks


@pytest.mark.parametrize(("k", "m"), [(2, 1), (4, 2), (3, 5)])
def test_parity_is_what_the_field_says(k: int, m: int) -> None:
    chunks = made(k, m, 1000)
    for found, expected in zip(chunks[k:], reference_parity(chunks[:k], m), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_one_data_chunk_is_mirrored() -> None:
    chunks = made(1, 2, 300)
    assert (chunks[1] == chunks[0]).all()
    assert (chunks[2] == chunks[0]).all()


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 2), (4, 2), (3, 3)])
def test_any_k_chunks_give_all(k: int, m: int) -> None:
    chunks = made(k, m, 513)
    for present in combinations(range(k + m), k):
        out = [np.empty(513, np.uint8) for _ in chunks]
        Codec(k, m).decode({index: chunks[index] for index in present}, range(k + m), out)
        for found, expected in zip(out, chunks, strict=True):
            np.testing.assert_array_equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 9), st.integers(1, 5), st.integers(0, 5000), st.sampled_from([64, 1000, 1 << 17]))
def test_pieces_sizes_and_zeros(data: st.DataObject, k: int, m: int, size: int, piece: int) -> None:
    """Whatever the size and the piece; None means zeros."""
    codec = Codec(k, m, piece)
    zeros = data.draw(st.sets(st.integers(0, k - 1)))
    chunks = [np.random.default_rng(index).integers(0, 256, size, np.uint8) for index in range(k)]
    for index in zeros:
        chunks[index][:] = 0
    sources = [None if index in zeros else chunk for index, chunk in enumerate(chunks)]
    parity = [np.full(size, 9, np.uint8) for _ in range(m)]
    codec.encode(sources, parity)
    plain = [np.full(size, 8, np.uint8) for _ in range(m)]
    Codec(k, m).encode(chunks, plain)
    word = chunks + parity
    for found, expected in zip(parity, plain, strict=True):
        np.testing.assert_array_equal(found, expected)
    lost = sorted(data.draw(st.sets(st.integers(0, k + m - 1), min_size=1, max_size=m)))
    present = {i: None if i in zeros else word[i] for i in range(k + m) if i not in lost}
    out = [np.full(size, 6, np.uint8) for _ in lost]
    codec.decode(present, lost, out)
    for index, found in zip(lost, out, strict=True):
        np.testing.assert_array_equal(found, word[index])


def test_any_contiguous_buffer_serves() -> None:
    chunks = made(2, 1, 4096)
    parity = bytearray(4096)
    Codec(2, 1).encode([chunks[0].tobytes(), chunks[1].data.cast("I")], [memoryview(parity)])
    assert bytes(parity) == chunks[2].tobytes()


def test_what_does_not_fit_is_refused() -> None:
    a, b, c = (np.zeros(8, np.uint8) for _ in range(3))
    codec = Codec(2, 1)
    with pytest.raises(ValueError, match="differ in size"):
        codec.encode([a, b[:4]], [c])
    with pytest.raises(ValueError, match="2 data and 1 parity"):
        codec.encode([a], [c])
    with pytest.raises(ValueError, match="writable"):
        codec.encode([a, b], [bytes(8)])
    with pytest.raises(ValueError, match="contiguous"):
        codec.encode([a, np.zeros(16, np.uint8)[::2]], [c])
    with pytest.raises(ValueError, match=r"0\.\.2 exist"):
        codec.decode({0: a, 3: b}, [1], [c])
    with pytest.raises(ValueError, match="buffers given"):
        codec.decode({0: a, 1: b}, [2], [])
    with pytest.raises(UnrecoverableError, match="only \\[2\\] are present"):
        codec.decode({2: a}, [0], [c])
    for k, m in ((0, 1), (1, 0), (200, 57)):
        with pytest.raises(ValueError, match="at least one"):
            Codec(k, m)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    isal.cache_clear()
    monkeypatch.setattr(codec_module, "_bundled", lambda: ["/nowhere/libisal.so"])
    monkeypatch.setattr(codec_module, "_SYSTEM_LIBRARY", "libisal-of-nobody.so.2")
    try:
        with pytest.raises(RequestError, match=r"outlast\[train\]"):
            Codec(2, 1)
    finally:
        isal.cache_clear()
