"""Flips bytes in a node's newest committed images, as bad memory would.

Reads no more of the format than where its parts are: the safetensors header, and the trailer, which is the last entry.
The file is changed through the page cache, so whoever maps it sees the flipped bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outlast.local.faults import Part
from outlast.snapshot.identity import Generation

FLIPPED_BYTES = 16
_TRAILER = "__outlast__.trailer"


@dataclass(frozen=True)
class ImageParts:
    """Where the parts of an image file begin: [8, data) header, [data, trailer) data, [trailer, end) trailer."""

    path: Path
    generation: Generation
    data: int
    trailer: int
    end: int


def corrupt(memory_dir: Path, part: Part) -> list[str]:
    """Flip bytes in the middle of ``part`` of each newest image of the folder; return what was done, file by file.

    For Part.PARITY the data of the parity images is meant, for all others the ranks' own images. The newest are those
    of the generation that the keeper was told is committed, or the greatest there is before any commit.
    """
    pattern = "parity-*.img" if part is Part.PARITY else "slot-*.img"
    images = [image for path in sorted(memory_dir.glob(pattern)) for image in _read(path)]
    wanted = _committed(memory_dir) or max((image.generation for image in images), default=None)
    done: list[str] = []
    for image in images:
        if image.generation == wanted:
            offset = _middle(image, part)
            _flip(image.path, offset)
            done.append(f"{image.path.name}: {FLIPPED_BYTES} bytes at {offset} of generation {wanted}")
    return done


def _committed(memory_dir: Path) -> Generation | None:
    try:
        value = json.loads((memory_dir / "commit.json").read_text())
        return Generation.parse(value["generation"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> Iterator[ImageParts]:
    """The file's parts; nothing when it is no image (not yet written, or its header corrupted already)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        generation = Generation.parse(header["__metadata__"]["generation"])
        start, stop = header[_TRAILER]["data_offsets"]
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return
    yield ImageParts(path, generation, data=8 + length, trailer=8 + length + start, end=8 + length + stop)


def _middle(image: ImageParts, part: Part) -> int:
    first, last = {
        Part.HEADER: (8, min(image.data, 8 + 512)),
        Part.TRAILER: (image.trailer, image.end),
    }.get(part, (image.data, image.trailer))
    return max(first, (first + last - FLIPPED_BYTES) // 2)


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        there = file.read(FLIPPED_BYTES)
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in there))
