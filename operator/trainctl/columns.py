"""Text in columns, for terminals and pipes alike (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

GAP = "   "
NOTHING = "-"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows below their columns' names, each as wide as its longest cell; nothing is cut off. No end of line at the
    end."""
    lines = [list(columns), *([cell or NOTHING for cell in row] for row in rows)]
    return "\n".join(_aligned(lines))


def facts(rows: Iterable[tuple[str, str]], indent: str = "") -> str:
    """``name   value`` lines; a value of several lines goes on below itself."""
    found = list(rows)
    width = max((len(name) for name, _ in found), default=0)
    lines = []
    for name, value in found:
        first, *more = (value or NOTHING).split("\n")
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
