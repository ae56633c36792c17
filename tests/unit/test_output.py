"""What the supervisor says reaches whoever reads it, and holds nothing up where nobody does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outlast.local import output
from outlast.local.output import Output
from trainctl import run

BIG = {"nodes": "x" * 4000}


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            continue


def read(end: int) -> list[dict[str, Any]]:
    """All lines until the last one that an output may write."""
    found: list[dict[str, Any]] = []
    with os.fdopen(os.dup(end), "rb") as file:
        for line in file:
            found.append(json.loads(line))
            if found[-1]["type"] == "end":
                break
    return found


def fill(out: Output) -> threading.Thread:
    """Far more than a pipe takes, said by a thread, as nobody reads."""

    def say() -> None:
        for number in range(100):
            out.event({"seq": number, **BIG})
            out.status({"number": number, **BIG})
        out.progress("the last word")

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    return thread


def test_a_reader_that_pauses_holds_nothing_up_and_gets_what_counts(pipe: tuple[int, int]) -> None:
    out = Output(pipe[1])
    saying = fill(out)
    saying.join(10)
    assert not saying.is_alive(), "the output waits for its reader"
    ending = threading.Thread(target=out.end, args=(0, "succeeded", "done", ""), daemon=True)
    ending.start()
    ending.join(0.1)
    assert ending.is_alive(), "the end has not been read"
    lines = read(pipe[0])
    ending.join(10)
    assert not ending.is_alive()
    assert [line["event"]["seq"] for line in lines if line["type"] == "event"] == list(range(100))
    statuses = [line["status"]["number"] for line in lines if line["type"] == "status"]
    assert statuses == sorted(statuses)
    assert statuses[-1] == 99
    assert len(statuses) < 50, "of the others only those that the pipe took"
    assert [line["type"] for line in lines[-3:]] == ["status", "progress", "end"]


def test_of_too_many_lines_the_oldest_go(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "WAITING", 10)
    out = Output(pipe[1])
    for number in range(500):
        out.event({"seq": number, **BIG})
    threading.Thread(target=out.end, args=(1, "failed", "done", ""), daemon=True).start()
    *lines, last = read(pipe[0])
    assert last["type"] == "end"
    assert [line["event"]["seq"] for line in lines[-8:]] == list(range(492, 500))
    assert len(lines) < 100


def test_a_reader_that_goes_is_no_error(pipe: tuple[int, int]) -> None:
    out = Output(pipe[1])
    fill(out).join(10)
    ending = threading.Thread(target=out.end, args=(0, "succeeded", "done", ""), daemon=True)
    ending.start()
    os.close(pipe[0])
    ending.join(10)
    assert not ending.is_alive()
    out.progress("to nobody")


def test_what_was_said_is_written_though_the_process_ends() -> None:
    code = "from outlast.local.output import Output\nfor n in range(300): Output.progress(o, 'x' * 999) if n else (o := Output(1))\nraise KeyError"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    time.sleep(1.0)
    assert len(process.communicate(timeout=20)[0].splitlines()) == 299
    assert process.returncode == 1


def test_the_supervisor_cleans_up_when_its_reader_goes_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that waits for its lines to be read."""
    monkeypatch.setattr(run, "_END_LIMIT_S", 5.0)
    mark = tmp_path / "cleaned"
    code = f"""
import os, pathlib, sys
try:
    while True: os.write(1, b"x" * 4096)
except BrokenPipeError:
    assert not os.read(0, 1)
    pathlib.Path({str(mark)!r}).touch()
"""
    process = run._start([sys.executable, "-c", code], tmp_path, tmp_path)
    assert process.stdout is not None
    process.stdout.read(10)
    run._end(process)
    assert process.returncode == 0
    assert mark.exists()
