"""A node's image files from outside: which snapshot is being written, and flipping bytes as bad memory would.

Files are changed through the page cache, so whoever maps them sees it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from outlast.errors import ImageError
from outlast.faults import Part
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import MAGIC, read_layout
from outlast.snapshot.layout import FOOTER_BYTES, GENERATION_OFFSET, GENERATION_WIDTH, Layout

SHARDS = "slot-*.img"
PARITIES = "parity-*.img"
FLIPPED_BYTES = 16


def being_written(memory_dirs: Iterable[Path], pattern: str) -> Generation | None:
    """The greatest generation among the images that are begun and not sealed; two short reads a file."""
    paths = (path for folder in memory_dirs for path in folder.glob(pattern))
    return max((found for path in paths for found in _unsealed(path)), default=None)


def corrupt(memory_dir: Path, part: Part) -> list[str]:
    """Flip bytes in the middle of ``part`` of each newest image of the folder; return what was done, file by file.

    For Part.PARITY the data of the parity images is meant, for all others the ranks' own images. The newest are those
    of the generation that the keeper was told is committed, or the greatest there is before any commit.
    """
    paths = sorted(memory_dir.glob(PARITIES if part is Part.PARITY else SHARDS))
    images = {path: generation for path in paths for generation in _generation(path)}
    wanted = _committed(memory_dir) or max(images.values(), default=None)
    done: list[str] = []
    for path in (path for path, generation in images.items() if generation == wanted):
        for layout in _layout(path):
            offset = _middle(layout, part)
            _flip(path, offset)
            done.append(f"{path.name}: {FLIPPED_BYTES} bytes at {offset} of generation {wanted}")
    return done


def _committed(memory_dir: Path) -> Generation | None:
    try:
        value = json.loads((memory_dir / "commit.json").read_text())
        return Generation.parse(value["generation"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _generation(path: Path) -> Iterator[Generation]:
    """What the header says; nothing when it says nothing that can be read (not written yet, or corrupted)."""
    try:
        with path.open("rb") as file:
            file.seek(GENERATION_OFFSET)
            yield Generation.parse(file.read(GENERATION_WIDTH).decode("ascii"))
    except (OSError, ValueError):
        return


def _unsealed(path: Path) -> Iterator[Generation]:
    try:
        with path.open("rb") as file:
            file.seek(-FOOTER_BYTES, 2)
            sealed = file.read(len(MAGIC)) == MAGIC
    except OSError:
        return
    if not sealed:
        yield from _generation(path)


def _layout(path: Path) -> Iterator[Layout]:
    try:
        yield read_layout(path)
    except (OSError, ImageError):
        return


def _middle(layout: Layout, part: Part) -> int:
    first, last = {
        Part.HEADER: (GENERATION_OFFSET + GENERATION_WIDTH, len(layout.header.rstrip())),
        Part.TRAILER: (layout.trailer_offset, layout.total_bytes),
    }.get(part, (layout.data_offset, layout.trailer_offset))
    return max(first, (first + last - FLIPPED_BYTES) // 2)


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        there = file.read(FLIPPED_BYTES)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in there))
