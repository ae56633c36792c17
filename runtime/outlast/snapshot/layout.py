"""Where everything lies in an image file: pure arithmetic, both ways (plan a layout, read one back from a header).

An image is a valid safetensors file (format: https://github.com/huggingface/safetensors#format), so that any tool opens
it::

    0               u64 length of the JSON, then the JSON, padded with spaces so that data starts on a page
    data            entries in order, each starting on a multiple of 64; pads in between are entries too, so no holes
    trailer_offset  entry ``__outlast__.trailer``: checksums of all blocks before it (u64 each), a footer of 64 bytes

The header starts with a constant prefix, so that the generation, the only part that changes between two snapshots of
one layout, is at a constant place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from outlast.errors import ImageError
from outlast.snapshot.identity import Generation
from outlast.snapshot.kernel import block_count

FORMAT = "outlast-image-1"
PAGE = 4096
ALIGNMENT = 64
FOOTER_BYTES = 64
GENERATION_WIDTH = 64
MAX_HEADER = 100_000_000
"""The longest header that the safetensors library reads."""

TRAILER = "__outlast__.trailer"
PAD_PREFIX = "__pad__."
METADATA = "__metadata__"
PREFIX = f'{{"{METADATA}":{{"format":"{FORMAT}","generation":"'.encode()
GENERATION_OFFSET = 8 + len(PREFIX)
OWN_KEYS = frozenset({"format", "generation", "entries"})
"""Keys of the metadata that the layout itself writes."""

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

JsonObject: TypeAlias = Mapping[str, Any]
_Row: TypeAlias = tuple[str, str, tuple[int, ...], int, int]


@dataclass(frozen=True)
class Entry:
    """One tensor of an image: its safetensors dtype and shape, its bytes, and what the writer wants to know of it.

    ``info`` is JSON and comes back verbatim.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    info: JsonObject = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PlacedEntry(Entry):
    """An entry and where it starts, in bytes from the beginning of the file."""

    offset: int = field(kw_only=True)

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Layout:
    """The plan of an image file. Two layouts are equal when their headers are.

    entries: without pads and trailer, by offset. meta: the metadata without ``OWN_KEYS``. header: the first bytes of
    the file, up to where data starts, with a blank generation. trailer_offset: what is before it is checksummed.
    """

    header: bytes = field(repr=False)
    entries: tuple[PlacedEntry, ...] = field(compare=False, repr=False)
    pads: tuple[tuple[int, int], ...] = field(compare=False, repr=False)
    meta: Mapping[str, str] = field(compare=False)
    trailer_offset: int = field(compare=False)
    total_bytes: int = field(compare=False)

    @property
    def n_blocks(self) -> int:
        """How many blocks of ``BLOCK`` bytes are checksummed; the last may be short."""
        return block_count(self.trailer_offset)

    @property
    def data_offset(self) -> int:
        """Where the first entry starts."""
        return len(self.header)

    def entry(self, name: str) -> PlacedEntry:
        """The entry of that name. Raises KeyError."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, PlacedEntry]:
        return {entry.name: entry for entry in self.entries}

    def header_of(self, generation: Generation) -> bytes:
        """The header of an image of ``generation``."""
        stop = GENERATION_OFFSET + GENERATION_WIDTH
        return self.header[:GENERATION_OFFSET] + generation_field(generation) + self.header[stop:]

    def segments(self) -> Iterator[tuple[int, int, str | None]]:
        """(offset, bytes, entry name or None) of header, entries and pads: all of [0, trailer_offset), in order."""
        yield 0, len(self.header), None
        places = [(entry.offset, entry.nbytes, entry.name) for entry in self.entries]
        yield from sorted([*places, *((offset, nbytes, None) for offset, nbytes in self.pads)], key=lambda p: p[:2])

    @classmethod
    def parse(cls, header: bytes, total_bytes: int | None = None) -> Layout:
        """Read a layout back from the header (``header_bytes`` tells how long it is) of a file of ``total_bytes``.

        Without ``total_bytes`` the file is taken to be as long as its header says.
        Raises ImageError that says what is wrong with it.
        """
        if not header.startswith(PREFIX, 8):
            raise ImageError(f"the header is not that of an image of format {FORMAT}")
        try:
            table = json.loads(header[8:])
            meta = table.pop(METADATA)
            infos = json.loads(meta["entries"])
            rows = [_read_row(name, row, len(header)) for name, row in table.items()]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ImageError(f"the header cannot be read: {error!r}") from error
        return _assemble(header, total_bytes, rows, infos, meta)


def header_bytes(start: bytes, total_bytes: int) -> int:
    """How long the header of a file of ``total_bytes`` is that starts with ``start`` (its first 8 bytes).

    Raises ImageError.
    """
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < 8 or length % PAGE or not PAGE <= length <= min(total_bytes, 8 + MAX_HEADER):
        raise ImageError(f"not an image: its header would be {length} bytes of {total_bytes}")
    return length


def generation_field(generation: Generation) -> bytes:
    """The generation as it stands in a header: ``GENERATION_WIDTH`` bytes. Raises ValueError when it has no room."""
    text = str(generation).encode("ascii")
    if len(text) > GENERATION_WIDTH or b'"' in text or b"\\" in text:
        raise ValueError(f"generation {generation} does not fit into {GENERATION_WIDTH} characters")
    return text.ljust(GENERATION_WIDTH)


def plan_layout(entries: Sequence[Entry], meta: Mapping[str, str]) -> Layout:
    """Lay out an image of ``entries`` in that order, with ``meta`` (all strings) in its header.

    The keys ``OWN_KEYS`` of ``meta`` are the layout's own and are ignored. Raises ValueError for an entry that cannot
    be: a name used twice or reserved, an unknown dtype, a number of bytes that dtype and shape do not give.
    """
    _check_entries(entries)
    rows, end = _place(entries)
    header = _write_header(entries, rows, meta, end, FOOTER_BYTES)
    covered, n_blocks = end + len(header), 0
    # The trailer's length depends on the header's and its digits are in the header: settle in a few rounds.
    while n_blocks != block_count(covered):
        n_blocks = block_count(covered)
        header = _write_header(entries, rows, meta, end, 8 * n_blocks + FOOTER_BYTES)
        covered = end + len(header)
    return Layout.parse(header, covered + 8 * n_blocks + FOOTER_BYTES)


def _check_entries(entries: Sequence[Entry]) -> None:
    names: set[str] = set()
    for entry in entries:
        reserved = entry.name.startswith((PAD_PREFIX, "__outlast__.")) or entry.name == METADATA
        if reserved or entry.name in names:
            raise ValueError(f"entry {entry.name!r}: the name is {'reserved' if reserved else 'used twice'}")
        entry.name.encode()
        names.add(entry.name)
        if entry.dtype not in DTYPE_BYTES:
            raise ValueError(f"entry {entry.name!r}: dtype {entry.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        wanted = math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]
        if wanted != entry.nbytes:
            raise ValueError(
                f"entry {entry.name!r}: {entry.dtype}{list(entry.shape)} has {wanted} bytes, not {entry.nbytes}"
            )


def _place(entries: Sequence[Entry]) -> tuple[list[_Row], int]:
    """Rows (name, dtype, shape, start, stop), counted from where data starts, pads among them; and where they end."""
    rows: list[_Row] = []
    end = 0
    for entry in entries:
        rows.append((entry.name, entry.dtype, entry.shape, end, end + entry.nbytes))
        end += entry.nbytes
        if pad := -end % ALIGNMENT:
            rows.append((f"{PAD_PREFIX}{len(rows)}", "U8", (pad,), end, end + pad))
            end += pad
    return rows, end


def _write_header(
    entries: Sequence[Entry], rows: Sequence[_Row], meta: Mapping[str, str], end: int, trailer_bytes: int
) -> bytes:
    metadata = {"format": FORMAT, "generation": " " * GENERATION_WIDTH}
    metadata.update((key, value) for key, value in meta.items() if key not in OWN_KEYS)
    metadata["entries"] = _dump([entry.info for entry in entries])
    table: dict[str, Any] = {METADATA: metadata}
    for name, dtype, shape, start, stop in [*rows, (TRAILER, "U8", (trailer_bytes,), end, end + trailer_bytes)]:
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
    text = _dump(table).encode("ascii")
    text += b" " * (-(8 + len(text)) % PAGE)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header of {len(entries)} entries has {len(text)} bytes, more than {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _read_row(name: str, row: Mapping[str, Any], base: int) -> _Row:
    dtype, shape, (start, stop) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"entry {name!r} has a shape or offsets that are no numbers")
    if math.prod(shape) * DTYPE_BYTES[dtype] != stop - start:
        raise ValueError(f"entry {name!r}: {dtype}{list(shape)} does not have {stop - start} bytes")
    return name, dtype, shape, base + start, base + stop


def _assemble(header: bytes, total_bytes: int | None, rows: Sequence[_Row], infos: Any, meta: Any) -> Layout:
    at = len(header)
    for name, _, _, start, stop in rows:
        if start != at or (start % ALIGNMENT and not name.startswith(PAD_PREFIX)):
            raise ImageError(f"entry {name!r} starts at {start}, not at {at} on a multiple of {ALIGNMENT}")
        at = stop
    total = at if total_bytes is None else total_bytes
    trailer_offset = rows[-1][3] if rows and rows[-1][0] == TRAILER else -1
    if at != total or total - trailer_offset != 8 * block_count(trailer_offset) + FOOTER_BYTES:
        raise ImageError(f"the entries end at {at} in a file of {total} bytes, or not with a trailer")
    named = [row for row in rows[:-1] if not row[0].startswith(PAD_PREFIX)]
    well_formed = isinstance(infos, list) and all(isinstance(info, dict) for info in infos) and len(infos) == len(named)
    if not well_formed or not all(isinstance(value, str) for value in meta.values()):
        raise ImageError("the header's metadata does not match its entries")
    return Layout(
        header=header[:GENERATION_OFFSET] + b" " * GENERATION_WIDTH + header[GENERATION_OFFSET + GENERATION_WIDTH :],
        entries=tuple(
            PlacedEntry(name, dtype, shape, stop - start, info, offset=start)
            for (name, dtype, shape, start, stop), info in zip(named, infos, strict=True)
        ),
        pads=tuple((start, stop - start) for name, _, _, start, stop in rows if name.startswith(PAD_PREFIX)),
        meta={key: value for key, value in meta.items() if key not in OWN_KEYS},
        trailer_offset=trailer_offset,
        total_bytes=total,
    )
