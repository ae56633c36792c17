"""Text in columns, for terminals and pipes alike (pure)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

GAP = "   "
NOTHING = "-"
_SPACES = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, turns the direction of what follows, or cannot be written."""


def printable(text: str) -> str:
    """Other people's text as one line that a terminal shows and does not obey: ends of line become spaces, control
    characters their escapes ("\\x1b")."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], _SPACES.sub(" ", text))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows below their columns' names, each as wide as its longest cell; nothing is cut off, and cells are made
    ``printable``. No end of line at the end."""
    lines = [list(columns), *([printable(cell) or NOTHING for cell in row] for row in rows)]
    return "\n".join(_aligned(lines))


def facts(rows: Iterable[tuple[str, str]], indent: str = "") -> str:
    """``name   value`` lines, made ``printable``; a value of several lines goes on below itself."""
    found = list(rows)
    width = max((len(name) for name, _ in found), default=0)
    lines = []
    for name, value in found:
        first, *more = map(printable, (value or NOTHING).split("\n"))
        lines.append(f"{indent}{name:<{width}}{GAP}{first}".rstrip())
        lines += [f"{indent}{'':<{width}}{GAP}{line}".rstrip() for line in more]
    return "\n".join(lines)


def counted(count: int, noun: str) -> str:
    """A number of things: "1 spare", "2 spares"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def section(title: str, body: str) -> str:
    """A titled part of a page; nothing when it has nothing to say."""
    return f"{title}\n" + "\n".join(f"  {line}".rstrip() for line in body.split("\n")) if body else ""


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return [GAP.join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
