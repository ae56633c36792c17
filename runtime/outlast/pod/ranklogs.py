"""Ranks' output, followed from their files onto the container's output, each line with its rank and attempt.

Ranks write to files and so never wait for a reader; what is followed is bounded instead: of a file that grows faster
than it can be passed on, the older part is left out, and that is said. Files of long past attempts are removed.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from outlast.joblogs import outdated, parse_log_file

MOST_BEHIND = 1 << 20
"""Bytes that the follower may be behind a file before it leaves out what is older."""
RESUME = 64 << 10
"""Bytes before the end at which it then goes on."""
PIECE = 256 << 10
"""Bytes of one file in one pass."""
EVERY_S = 0.2
LONGEST_LINE = 16 << 10
"""Bytes after which a line is cut."""
_CLOSE_S = 5.0


class Lines:
    """Pieces of one rank's output in, whole lines with their prefix out. No input or output of its own."""

    def __init__(self, rank: int, attempt: int) -> None:
        self._prefix = f"[rank {rank} attempt {attempt}] ".encode()
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The lines that ``data`` completes."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > LONGEST_LINE:
            cut = _character_end(self._rest, LONGEST_LINE)
            whole.append(self._rest[:cut])
            self._rest = self._rest[cut:]
        return b"".join(self._prefix + line + b"\n" for line in whole)

    def left_out(self, count: int, path: str) -> bytes:
        """``count`` bytes are not passed on: what there was of a line, and a line that says so."""
        return self.end() + self.feed(f"({count} bytes were left out here: all is in {path})\n".encode())

    def end(self) -> bytes:
        """What there is of a line that has no end."""
        rest, self._rest = self._rest, b""
        return self._prefix + rest + b"\n" if rest else b""


def _character_end(text: bytes, most: int) -> int:
    """How many bytes of ``text``, ``most`` at most, are whole characters; ``most`` where it is no UTF-8."""
    for cut in range(most, most - 4, -1):
        if text[cut] & 0xC0 != 0x80:
            return cut
    return most


class FollowedFile:
    """One rank's file. Raises OSError when it is gone."""

    def __init__(self, path: Path, rank: int, attempt: int, from_end: bool) -> None:
        self.rank, self.attempt = rank, attempt
        self._path, self._lines = path, Lines(rank, attempt)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._at = os.fstat(self._file).st_size if from_end else 0

    def advance(self) -> bytes:
        """The next lines, at most ``PIECE`` bytes of the file."""
        size, told = os.fstat(self._file).st_size, b""
        if size < self._at:
            self._at = 0
        if size - self._at > MOST_BEHIND:
            told = self._lines.left_out(size - RESUME - self._at, str(self._path))
            self._at = size - RESUME
        data = os.pread(self._file, PIECE, self._at)
        self._at += len(data)
        return told + self._lines.feed(data)

    def close(self) -> bytes:
        """Let it go; what is left of its last line."""
        os.close(self._file)
        return self._lines.end()


class RankLogs:
    """Follows all ranks' files in ``folder`` on a thread of its own. What was there before is taken as told already.

    Call order: ``start``, ``close``.
    """

    def __init__(self, folder: Path, write: Callable[[bytes], None]) -> None:
        self._folder, self._write = folder, write
        self._open: dict[str, FollowedFile] = {}
        self._seen: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="outlast-rank-logs", daemon=True)

    def start(self) -> None:
        self._look(from_end=True)
        self._thread.start()

    def close(self) -> None:
        """Pass on what is left, for five seconds at most."""
        self._closing.set()
        self._thread.join(_CLOSE_S)

    def _follow(self) -> None:
        while not self._closing.wait(EVERY_S):
            self._pass()
        for _ in range(MOST_BEHIND // PIECE + 1):
            self._pass()
        for file in self._open.values():
            self._tell(file.close())

    def _pass(self) -> None:
        self._look(from_end=False)
        newest = max((file.attempt for file in self._open.values()), default=0)
        for name, file in list(self._open.items()):
            try:
                told = file.advance()
                over = not told and file.attempt < newest
            except OSError:  # what other files have is told all the same
                told, over = b"", True
            self._tell(self._open.pop(name).close() if over else told)

    def _look(self, from_end: bool) -> None:
        named = ((path, parse_log_file(path.name)) for path in self._folder.glob("rank-*.log"))
        found = {path: parsed for path, parsed in named if parsed is not None}
        for path, (attempt, rank) in sorted(found.items()):
            if path.name in self._seen:
                continue
            with contextlib.suppress(OSError):  # somebody removed it meanwhile
                self._open[path.name] = FollowedFile(path, rank, attempt, from_end)
                self._seen.add(path.name)
        old = outdated(attempt for attempt, _ in found.values())
        for path, (attempt, _) in found.items():
            if attempt in old:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def _tell(self, lines: bytes) -> None:
        if lines:
            self._write(lines)
