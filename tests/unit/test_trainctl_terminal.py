"""Which view is chosen: one that is drawn anew in its place needs a terminal that can do so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trainctl import transfers
from trainctl.live import LiveView, PlainView
from trainctl.live import choose_view as choose_run_view
from trainctl.terminal import is_drawable
from trainctl.watching import LiveJobView, PlainJobView, choose_view


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is one."""
    for name in ("TTY_INTERACTIVE", "TTY_COMPATIBLE", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_is_drawn_on(tmp_path: Path) -> None:
    assert is_drawable()
    assert isinstance(choose_view(None), LiveJobView)
    assert isinstance(choose_run_view(False, tmp_path), LiveView)
    assert isinstance(transfers._choose_bar(False, "verifying"), transfers._Drawn)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TERM", "unknown"), ("TTY_INTERACTIVE", "0")])
def test_a_terminal_that_cannot_be_drawn_on_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert not is_drawable()
    assert isinstance(choose_view(None), PlainJobView)
    assert isinstance(choose_run_view(False, tmp_path), PlainView)
    with transfers._choose_bar(False, "verifying") as bar:
        assert isinstance(bar, transfers._Lines)


def test_a_pipe_is_not_drawn_on_whatever_colours_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert not is_drawable()
