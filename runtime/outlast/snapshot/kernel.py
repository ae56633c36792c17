"""Copy and hash at memory speed: the native kernel ``_kernel.c`` through ctypes, or a slower one without a compiler.

Both do the same: copy a list of segments into one contiguous destination and give the XXH64 (seed 0) of each block of
it. The native kernel does it in one call that holds no GIL, with non-temporal stores, hashing what is in cache anyway.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK = 256 * 1024
"""Bytes of a file that one checksum covers, and the unit in which damage is found, decoded around and repaired."""

KERNEL_VERSION = 1
"""The interface of ``_kernel.c`` that this module speaks; a library left over from another version is not used."""

SEGMENT = np.dtype([("offset", "<u8"), ("source", "<u8"), ("nbytes", "<u8")])
"""A segment: offset in the destination, address of the source, length. Source 0 means zeros; a source that is the
destination itself means that the bytes are there already and are only hashed."""

Checksums: TypeAlias = npt.NDArray[np.uint64]
Segments: TypeAlias = np.ndarray[tuple[int], np.dtype[np.void]]

BytesLike: TypeAlias = "Buffer | npt.NDArray[Any]"
"""C-contiguous memory. (To type checkers an array is a buffer from Python 3.12 on only.)"""

_LIBRARY = pathlib.Path(__file__).with_name("_kernel.so")


class Kernel(Protocol):
    """What both kernels offer. Addresses are trusted: the caller keeps their memory alive during the call."""

    def copy_and_hash(
        self, segments: Segments, out_base: int, block: int, checksums: Checksums, progress: Checksums
    ) -> None: ...

    def hash_blocks(self, address: int, nbytes: int, block: int, checksums: Checksums) -> None: ...


class NativeKernel:
    """``_kernel.so``: one call without the GIL for a whole image."""

    def __init__(self, library: ctypes.CDLL) -> None:
        size, pointer = ctypes.c_uint64, ctypes.c_void_p
        self._copy = library.outlast_copy_and_hash
        self._copy.argtypes = [pointer, ctypes.c_size_t, pointer, size, pointer, pointer]
        self._copy.restype = ctypes.c_size_t
        self._hash = library.outlast_hash_blocks
        self._hash.argtypes = [pointer, size, size, pointer]
        self._hash.restype = None

    def copy_and_hash(
        self, segments: Segments, out_base: int, block: int, checksums: Checksums, progress: Checksums
    ) -> None:
        self._copy(segments.ctypes.data, len(segments), out_base, block, checksums.ctypes.data, progress.ctypes.data)

    def hash_blocks(self, address: int, nbytes: int, block: int, checksums: Checksums) -> None:
        self._hash(address, nbytes, block, checksums.ctypes.data)


class PortableKernel:
    """The same with memmove and the xxhash package: a pass over all segments, then one over all blocks."""

    def copy_and_hash(
        self, segments: Segments, out_base: int, block: int, checksums: Checksums, progress: Checksums
    ) -> None:
        for offset, source, nbytes in segments.tolist():
            if not source:
                ctypes.memset(out_base + offset, 0, nbytes)
            elif source != out_base + offset:
                ctypes.memmove(out_base + offset, source, nbytes)
            progress[0] = offset + nbytes
        self.hash_blocks(out_base, int(progress[0]), block, checksums)

    def hash_blocks(self, address: int, nbytes: int, block: int, checksums: Checksums) -> None:
        for index, start in enumerate(range(0, nbytes, block)):
            data = (ctypes.c_char * min(block, nbytes - start)).from_address(address + start)
            checksums[index] = xxhash.xxh64_intdigest(data)


@functools.cache
def default_kernel() -> Kernel:
    """The native kernel if it was built (see ``hatch_build.py``), else the portable one."""
    if not _LIBRARY.exists():
        return PortableKernel()
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError:  # built for another machine
        return PortableKernel()
    version = getattr(library, "outlast_kernel_version", lambda: 0)()
    return NativeKernel(library) if version == KERNEL_VERSION else PortableKernel()


def byte_view(data: BytesLike) -> memoryview:
    """The bytes of ``data``, shared. Raises TypeError when they are not contiguous."""
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def block_count(nbytes: int, block: int = BLOCK) -> int:
    """How many blocks (the last may be short) ``nbytes`` bytes have."""
    return -(-nbytes // block)


def make_segments(rows: Sequence[tuple[int, int, int]]) -> Segments:
    """An array of ``SEGMENT`` from (offset, source address, bytes) triples."""
    return np.array(list(rows), dtype=SEGMENT)


def copy_and_hash(
    segments: Segments | Sequence[tuple[int, int, int]],
    out_base: int,
    *,
    checksums: Checksums,
    block: int = BLOCK,
    progress: Checksums | None = None,
    kernel: Kernel | None = None,
) -> None:
    """Copy ``segments``, which cover [0, total) in order and without a hole, to the address ``out_base`` and on.

    ``checksums`` receives the XXH64 of each ``block`` bytes of the destination and has exactly that many elements.
    ``progress[0]`` is the number of bytes done, readable by other threads meanwhile. The GIL is free during the native
    call. The caller keeps all memory alive. Raises ValueError before anything is copied.
    """
    table = segments if isinstance(segments, np.ndarray) else make_segments(segments)
    table = np.ascontiguousarray(table, dtype=SEGMENT)
    ends = np.cumsum(table["nbytes"], dtype=np.uint64)
    if len(table) and (table["offset"][0] != 0 or not np.array_equal(table["offset"][1:], ends[:-1])):
        raise ValueError("segments must start at 0 and follow one another without holes")
    total = int(ends[-1]) if len(table) else 0
    _check_sums(checksums, total, block)
    counter = np.zeros(1, dtype=np.uint64) if progress is None else progress
    (kernel or default_kernel()).copy_and_hash(table, out_base, block, checksums, counter)


def xxh64_blocks(
    address: int, nbytes: int, out: Checksums, *, block: int = BLOCK, kernel: Kernel | None = None
) -> None:
    """Write the XXH64 of each ``block`` bytes at ``address`` to ``out``, without the GIL. Raises ValueError."""
    _check_sums(out, nbytes, block)
    (kernel or default_kernel()).hash_blocks(address, nbytes, block, out)


def _check_sums(checksums: Checksums, nbytes: int, block: int) -> None:
    wanted = block_count(nbytes, block)
    if checksums.dtype != np.uint64 or checksums.shape != (wanted,) or not checksums.flags.c_contiguous:
        raise ValueError(f"checksums must be a contiguous uint64 array of {wanted} elements, not {checksums.shape}")
