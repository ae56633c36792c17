"""The image file: one snapshot of one rank (or the parity of several) in memory that outlives the process.

An ``ImageFile`` is a mapping of one file on tmpfs. Its life: ``create`` allocates it once, faulted in; for every
generation ``begin`` breaks the seal, the entries are filled, ``seal`` writes the checksums and, last, the footer. An
image without a valid footer is as good as absent, at whatever moment its writer was killed.

Layout of the file: ``outlast.snapshot.layout``. Trailer: XXH64 (seed 0) of every ``BLOCK`` bytes of
[0, trailer_offset) as u64, then the footer of 64 bytes: magic, number of blocks, bytes covered, XXH64 of the checksums,
XXH64 of the header's generation field, zeros, XXH64 of the 56 bytes before. All little-endian.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import pathlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt
import xxhash

from outlast.errors import CapacityError, ImageError
from outlast.snapshot.identity import Generation
from outlast.snapshot.kernel import BLOCK, BytesLike, Checksums, block_count, byte_view, xxh64_blocks
from outlast.snapshot.layout import (
    FOOTER_BYTES,
    GENERATION_OFFSET,
    GENERATION_WIDTH,
    Entry,
    Layout,
    PlacedEntry,
    generation_field,
    header_bytes,
    plan_layout,
)

__all__ = [
    "BLOCK",
    "Checksums",
    "Entry",
    "ImageFile",
    "Layout",
    "PlacedEntry",
    "allocate",
    "block_checksums",
    "plan_layout",
    "read_layout",
]

MAGIC = b"OLSEAL01"
_FOOTER = struct.Struct("<8sQQQQ16x")
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14 (madvise(2)): fault pages in for writing, all at once."""


def block_checksums(buffer: BytesLike) -> Checksums:
    """The XXH64 of each ``BLOCK`` bytes of ``buffer`` (C-contiguous; the last block may be short). Frees the GIL."""
    data = np.frombuffer(byte_view(buffer), np.uint8)
    sums = np.zeros(block_count(data.size), np.uint64)
    xxh64_blocks(data.ctypes.data, data.size, sums)
    return sums


def allocate(path: str | os.PathLike[str], nbytes: int) -> mmap.mmap:
    """Make a new file of ``nbytes`` zeros at ``path``, replacing what is there, and map it with its pages faulted in.

    Raises CapacityError that names what is missing when the file system is full; nothing is left behind then.
    """
    file = pathlib.Path(path)
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        mapping = mmap.mmap(descriptor, nbytes)
    except OSError as error:
        file.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            raise
        raise CapacityError(_missing(file, nbytes)) from error
    finally:
        os.close(descriptor)
    _populate(mapping)
    return mapping


def read_layout(path: str | os.PathLike[str]) -> Layout:
    """The layout of the image at ``path``, from its header alone. Raises ImageError, FileNotFoundError."""
    with pathlib.Path(path).open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        start = file.read(8)
        with _naming(path):
            return Layout.parse(start + file.read(header_bytes(start, total) - 8), total)


@dataclass(frozen=True)
class _Footer:
    """What a valid footer says."""

    checksums_digest: int
    generation_digest: int


class ImageFile:
    """A mapped image; see the module's docstring. Not for two writers at a time; readers may look on.

    Views handed out keep the mapping alive after ``close``.
    """

    def __init__(self, path: pathlib.Path, mapping: mmap.mmap, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self._mapping = mapping
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(mapping, np.uint8)
        self.address: int = self._bytes.ctypes.data

    @classmethod
    def create(cls, path: str | os.PathLike[str], layout: Layout, *, fresh: bool = False) -> Self:
        """Open the file at ``path`` for writing, in place when its layout is ``layout`` already, else made anew.

        In place, a sealed image stays sealed until ``begin``. fresh: make a new file in any case, since someone may
        still write to the old one through a mapping. Raises CapacityError that names the path and the bytes missing.
        """
        file = pathlib.Path(path)
        if not fresh and _has_layout(file, layout):
            return cls(file, _map(file, writable=True), layout)
        mapping = allocate(file, layout.total_bytes)
        mapping[: len(layout.header)] = layout.header
        return cls(file, mapping, layout)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False) -> Self:
        """Map an image that is there, sealed or not. Raises ImageError when it is nonsense, FileNotFoundError."""
        file = pathlib.Path(path)
        mapping = _map(file, writable=writable)
        image = cls(file, mapping, _parse(file, mapping))
        footer = image._footer()
        if footer is not None and footer.generation_digest != xxhash.xxh64_intdigest(image._generation_field()):
            raise ImageError(f"{file}: the generation in its header is not the one it was sealed with")
        return image

    @property
    def sealed(self) -> bool:
        """Whether it is complete, as of now: the file may be in another process's hands."""
        return self.generation is not None

    @property
    def generation(self) -> Generation | None:
        """Which snapshot it holds; None while it is not sealed."""
        footer, text = self._footer(), self._generation_field()
        if footer is None or footer.generation_digest != xxhash.xxh64_intdigest(text):
            return None
        return Generation.parse(text.decode("ascii"))

    @property
    def digest(self) -> str | None:
        """XXH64 of the checksums that it was sealed with, as 16 hexadecimal digits; None while it is not sealed."""
        footer = self._footer()
        return None if footer is None else f"{footer.checksums_digest:016x}"

    def view(self, offset: int, length: int) -> memoryview:
        """Bytes [offset, offset + length) of the file, shared. Raises ValueError when it has no such bytes."""
        if offset < 0 or length < 0 or offset + length > self.layout.total_bytes:
            raise ValueError(
                f"{self.path} has no bytes [{offset}, {offset + length}): {self.layout.total_bytes} in all"
            )
        return memoryview(self._mapping)[offset : offset + length]

    def entry_view(self, name: str) -> memoryview:
        """The bytes of one entry, shared. Raises KeyError."""
        entry = self.layout.entry(name)
        return self.view(entry.offset, entry.nbytes)

    def begin(self, generation: Generation) -> None:
        """Break the seal and write the header of ``generation``; the entries keep what they hold."""
        field = generation_field(generation)
        self.unseal()
        self._mapping[GENERATION_OFFSET : GENERATION_OFFSET + GENERATION_WIDTH] = field

    def unseal(self) -> None:
        """Make it as good as absent."""
        self._mapping[self.layout.total_bytes - FOOTER_BYTES : self.layout.total_bytes] = bytes(FOOTER_BYTES)

    def seal(self, checksums: Checksums) -> None:
        """Declare it complete: ``checksums`` are those of all blocks before the trailer, ``layout.n_blocks`` of them.

        Raises ValueError when their number is another.
        """
        layout, packed = self.layout, np.ascontiguousarray(checksums, "<u8").tobytes()
        if len(packed) != 8 * layout.n_blocks:
            raise ValueError(f"{self.path} has {layout.n_blocks} blocks, not {len(checksums)}")
        self._mapping[layout.trailer_offset : layout.trailer_offset + len(packed)] = packed
        body = _FOOTER.pack(
            MAGIC,
            layout.n_blocks,
            layout.trailer_offset,
            xxhash.xxh64_intdigest(packed),
            xxhash.xxh64_intdigest(self._generation_field()),
        )
        footer = body + xxhash.xxh64_intdigest(body).to_bytes(8, "little")
        self._mapping[layout.total_bytes - FOOTER_BYTES : layout.total_bytes] = footer

    def checksums(self) -> Checksums:
        """The checksums that it was sealed with. Raises ImageError when it is not sealed or they are damaged."""
        footer, layout = self._footer(), self.layout
        packed = self._mapping[layout.trailer_offset : layout.total_bytes - FOOTER_BYTES]
        if footer is None:
            raise ImageError(f"{self.path} is not sealed, or its footer is damaged")
        if footer.checksums_digest != xxhash.xxh64_intdigest(packed):
            raise ImageError(f"{self.path}: the checksums in its trailer are damaged")
        return np.frombuffer(packed, "<u8").astype(np.uint64)

    def verify(self) -> list[bool]:
        """Whether each block is what was sealed. Reads all of the file, without the GIL. Raises ImageError like
        ``checksums``."""
        expected = self.checksums()
        found: list[bool] = (block_checksums(self.view(0, self.layout.trailer_offset)) == expected).tolist()
        return found

    def close(self) -> None:
        """Give the mapping up. Views still held stay valid and keep it until they are gone."""
        self._bytes = np.empty(0, np.uint8)
        try:
            self._mapping.close()
        except BufferError:  # views are held: the mapping goes with the last of them
            pass

    def _generation_field(self) -> bytes:
        return self._mapping[GENERATION_OFFSET : GENERATION_OFFSET + GENERATION_WIDTH]

    def _footer(self) -> _Footer | None:
        raw = self._mapping[self.layout.total_bytes - FOOTER_BYTES : self.layout.total_bytes]
        body, own_digest = raw[:-8], int.from_bytes(raw[-8:], "little")
        magic, n_blocks, covered, checksums_digest, generation_digest = _FOOTER.unpack(body)
        if magic != MAGIC or own_digest != xxhash.xxh64_intdigest(body):
            return None
        if (n_blocks, covered) != (self.layout.n_blocks, self.layout.trailer_offset):
            return None
        return _Footer(checksums_digest, generation_digest)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the path before what an ImageError says."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{os.fspath(path)}: {error}") from error


def _parse(path: pathlib.Path, mapping: mmap.mmap) -> Layout:
    with _naming(path):
        return _layout(mapping[: header_bytes(mapping[:8], len(mapping))], len(mapping))


@lru_cache(maxsize=4)
def _layout(header: bytes, total_bytes: int) -> Layout:
    """As ``Layout.parse``; a keeper that many ranks read from opens the same image at each of their requests."""
    return Layout.parse(header, total_bytes)


def _has_layout(path: pathlib.Path, layout: Layout) -> bool:
    try:
        return path.stat().st_size == layout.total_bytes and read_layout(path) == layout
    except (ImageError, FileNotFoundError):
        return False


def _map(path: pathlib.Path, *, writable: bool) -> mmap.mmap:
    with path.open("r+b" if writable else "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ImageError(f"{path} is empty")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    if writable:
        _populate(mapping)
    return mapping


def _populate(mapping: mmap.mmap) -> None:
    """Fault the whole mapping in for writing, without the GIL. A kernel that cannot leaves it to the first copy."""
    libc = ctypes.CDLL(None, use_errno=True)
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), _POPULATE_WRITE):
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            raise OSError(code, os.strerror(code))


def _missing(path: pathlib.Path, nbytes: int) -> str:
    stat = os.statvfs(path.parent)
    free = stat.f_bavail * stat.f_frsize
    return (
        f"{path} needs {nbytes} bytes of memory, but {path.parent} has {free} free: {max(nbytes - free, 1)} bytes are "
        "missing. Give the file system more memory, or the job fewer ranks a node or less parity"
    )
