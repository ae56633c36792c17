"""Whether standard output is a terminal on which a view can be drawn anew in its place."""

from __future__ import annotations

import sys


def is_drawable() -> bool:
    """Whether it is one that moves its cursor and has not been told to be plain (TERM=dumb, TTY_INTERACTIVE=0)."""
    if not sys.stdout.isatty():
        return False
    from rich.console import Console

    console = Console()
    return console.is_terminal and console.is_interactive and not console.is_dumb_terminal
