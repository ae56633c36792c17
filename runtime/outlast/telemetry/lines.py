"""An append-only file of JSON lines that outlives its writer.

A line reaches the operating system whole, in one write, before ``append`` returns, so a killed process loses nothing
that it had said. A machine that dies may leave a torn last line: the next writer ends it, and readers skip what is no
JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

TAIL = 64 * 1024
"""Bytes read backwards at a time in search of the last whole line."""


def exact(value: Any) -> Any:
    """``value`` as JSON that loses nothing: floats stay (written by repr) but for "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): exact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(item) for item in value]
    return value


def parse(line: bytes) -> dict[str, Any] | None:
    """One line's object, or None where it is torn or no object."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole object of the file, oldest first; nothing when there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            value = parse(line)
            if value is not None:
                yield value


def last_object(path: Path) -> dict[str, Any] | None:
    """The newest whole object of the file, found from its end; None when there is none."""
    size = path.stat().st_size if path.exists() else 0
    reach = 0
    while reach < size:
        reach = min(size, reach + TAIL if reach == 0 else reach * 4)
        with path.open("rb") as file:
            file.seek(size - reach)
            lines = file.read(reach).split(b"\n")
        for line in reversed(lines if reach == size else lines[1:]):
            value = parse(line)
            if value is not None:
                return value
    return None


class LineFile:
    """The writing end. One writer at a time; safe to open again after a crash."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end_torn_line()

    def _end_torn_line(self) -> None:
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def append(self, value: Mapping[str, Any]) -> None:
        """Write one object. Raises OSError, and ValueError for what JSON cannot hold."""
        line = json.dumps(exact(value), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        written = os.write(self._fd, line)
        if written != len(line):
            os.write(self._fd, b"\n")
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written: is the disk full?")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
