"""Reed-Solomon over GF(2^8) with Intel's ISA-L, on the caller's own buffers: no copies, no I/O.

ISA-L is called through ctypes, which releases the GIL, out of the library that the pyeclib wheel carries (pyeclib's own
interface copies every fragment several times). The code is systematic with a Cauchy matrix, so that every k of the
k + m chunks decode (Bloemer et al., An XOR-based erasure-resilient coding scheme, 1995). With k = 1 parity is a copy.

Encoding is decoding: both apply a matrix that takes k known codeword indices to wanted ones. Buffers known to be zeros
are passed as None and cost nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from outlast.errors import RequestError, UnrecoverableError

Bytes = npt.NDArray[np.uint8]
Buffer = Bytes | memoryview | bytearray | bytes

PIECE = 256 * 1024
"""Bytes of each chunk that one call works on: the fastest of 32 to 256 KiB (benchmarks/erasure.py)."""

_MAX_CHUNKS = 256
_SYSTEM_LIBRARY = "libisal.so.2"


class Codec:
    """``k`` data and ``m`` parity chunks (k, m >= 1, k + m <= 256), worked on in pieces of ``piece`` bytes each.

    Holds no state beside these numbers: threads may share it. Raises RequestError when ISA-L is not installed.
    """

    def __init__(self, k: int, m: int, piece: int = PIECE) -> None:
        if k < 1 or m < 1 or k + m > _MAX_CHUNKS:
            raise ValueError(f"{k} data and {m} parity chunks: at least one of each and {_MAX_CHUNKS} together at most")
        if piece < 1:
            raise ValueError(f"a piece of {piece} bytes")
        self.k, self.m, self.piece = k, m, piece
        isal()

    def encode(self, data: Sequence[Buffer | None], parity: Sequence[Buffer]) -> None:
        """Compute the m parity chunks of k data chunks.

        All buffers are contiguous and of equal size in bytes, ``parity`` writable and apart from ``data``; None is a
        chunk of zeros. Raises ValueError when they are not so.
        """
        if len(data) != self.k or len(parity) != self.m:
            raise ValueError(f"{self.k} data and {self.m} parity buffers are needed: got {len(data)} and {len(parity)}")
        self.decode(dict(enumerate(data)), range(self.k, self.k + self.m), parity)

    def decode(self, present: Mapping[int, Buffer | None], wanted: Sequence[int], out: Sequence[Buffer]) -> None:
        """Compute the chunks of codeword indices ``wanted`` (data 0..k-1, parity k..k+m-1) out of any k ``present``.

        Buffers as in ``encode``. Raises UnrecoverableError when fewer than k are present, ValueError when indices or
        sizes do not fit.
        """
        used = sorted(present, key=lambda index: (present[index] is not None, index))[: self.k]
        self._check(used, wanted, out)
        live = tuple(sorted(index for index in used if present[index] is not None))
        sources = [_array(buffer) for index in live if (buffer := present[index]) is not None]
        targets = [_array(buffer, writable=True) for buffer in out]
        if len({array.size for array in sources + targets}) > 1:
            raise ValueError(f"buffers differ in size: {[array.size for array in sources + targets]} bytes")
        if not live:
            for target in targets:
                target.fill(0)
        elif self.k == 1:
            for target in targets:
                np.copyto(target, sources[0])
        elif targets:
            tables = _tables(self.k, self.m, tuple(sorted(used)), live, tuple(wanted))
            _apply(tables, sources, targets, self.piece)

    def _check(self, used: Sequence[int], wanted: Sequence[int], out: Sequence[Buffer]) -> None:
        if len(used) < self.k:
            raise UnrecoverableError(f"{self.k} chunks are needed to decode, only {sorted(used)} are present")
        if len(wanted) != len(out):
            raise ValueError(f"{len(wanted)} chunks are wanted but {len(out)} buffers given")
        if not all(0 <= index < self.k + self.m for index in (*used, *wanted)):
            raise ValueError(f"codeword indices {sorted(used)}, {list(wanted)}: 0..{self.k + self.m - 1} exist")


@cache
def isal() -> ctypes.CDLL:
    """The ISA-L library. Raises RequestError when there is none."""
    candidates = [*_bundled(), _SYSTEM_LIBRARY]
    for name in candidates:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        number, pointer = ctypes.c_int, ctypes.c_void_p
        library.gf_gen_cauchy1_matrix.argtypes = [pointer, number, number]
        library.gf_invert_matrix.argtypes = [pointer, pointer, number]
        library.ec_init_tables.argtypes = [number, number, pointer, pointer]
        library.ec_encode_data.argtypes = [number, number, number, pointer, pointer, pointer]
        for function in (library.gf_gen_cauchy1_matrix, library.ec_init_tables, library.ec_encode_data):
            function.restype = None
        return library
    raise RequestError(
        f"ISA-L, which computes parity, could not be loaded (tried {', '.join(candidates)}): "
        "install it with `pip install 'outlast[train]'` (pyeclib carries it), or as the system package libisal2"
    )


def _bundled() -> list[str]:
    """Paths of the ISA-L libraries in the pyeclib wheel, without importing it."""
    spec = importlib.util.find_spec("pyeclib")
    if spec is None or spec.origin is None:
        return []
    return [str(path) for path in sorted(Path(spec.origin).parent.parent.glob("pyeclib.libs/libisal*.so*"))]


def _array(buffer: Buffer, *, writable: bool = False) -> Bytes:
    """The buffer's bytes as a flat array on the same memory. Raises ValueError when that is not possible."""
    array = np.asarray(buffer) if isinstance(buffer, np.ndarray | memoryview) else np.frombuffer(buffer, np.uint8)
    if not array.flags.c_contiguous or (writable and not array.flags.writeable):
        raise ValueError(f"a {'writable, ' if writable else ''}contiguous buffer is needed")
    return array.reshape(-1).view(np.uint8)


@lru_cache(maxsize=1024)
def _tables(k: int, m: int, used: tuple[int, ...], live: tuple[int, ...], wanted: tuple[int, ...]) -> Bytes:
    """ISA-L's tables for the matrix that takes the ``live`` ones of the ``used`` chunks to the ``wanted``."""
    generator = _generator(k, m)
    inverse = np.empty((k, k), np.uint8)
    known = generator[list(used)].copy()
    if isal().gf_invert_matrix(known.ctypes.data, inverse.ctypes.data, k) != 0:
        raise ArithmeticError(f"chunks {used} of a {k}+{m} code do not determine the others")
    matrix = np.empty((len(wanted), k), np.uint8)
    _apply(_init_tables(generator[list(wanted)]), list(inverse), list(matrix), k)
    return _init_tables(matrix[:, [used.index(index) for index in live]])


def _generator(k: int, m: int) -> Bytes:
    """The code's matrix, [k + m, k]: the identity above a Cauchy matrix."""
    matrix = np.zeros((k + m, k), np.uint8)
    isal().gf_gen_cauchy1_matrix(matrix.ctypes.data, k + m, k)
    return matrix


def _init_tables(matrix: Bytes) -> Bytes:
    """ISA-L's tables for a coefficient matrix [rows, columns]: 32 bytes for each coefficient."""
    rows, columns = matrix.shape
    coefficients = np.ascontiguousarray(matrix)
    tables = np.zeros(32 * rows * columns, np.uint8)
    isal().ec_init_tables(columns, rows, coefficients.ctypes.data, tables.ctypes.data)
    return tables


def _apply(tables: Bytes, sources: Sequence[Bytes], targets: Sequence[Bytes], piece: int) -> None:
    """targets = matrix x sources, piece by piece, on flat arrays of one size."""
    k, rows, size = len(sources), len(targets), targets[0].size
    bases = np.array([array.ctypes.data for array in (*sources, *targets)], np.uint64)
    pointers = bases + np.arange(0, size, piece, dtype=np.uint64)[:, np.newaxis]
    encode, table, row = isal().ec_encode_data, tables.ctypes.data, pointers.ctypes.data
    for start in range(0, size, piece):
        encode(min(piece, size - start), k, rows, table, row, row + 8 * k)
        row += 8 * (k + rows)
