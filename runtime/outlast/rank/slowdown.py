"""Slow a process down for real: let it run only a part of the time (``python -m outlast.rank.slowdown PID FACTOR``).

What a ``straggler`` fault starts beside a rank: SIGSTOP and SIGCONT in turn, so that everything the rank does takes
FACTOR times as long. Ends with the process, and never leaves it stopped.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import time

RUN_S = 0.02


def slow_down(pid: int, factor: float) -> None:
    """Until ``pid`` is gone: ``RUN_S`` seconds running, then (factor - 1) times as long stopped."""
    with contextlib.suppress(ProcessLookupError):
        try:
            while _alive(pid):
                time.sleep(RUN_S)
                os.kill(pid, signal.SIGSTOP)
                time.sleep(RUN_S * (factor - 1))
                os.kill(pid, signal.SIGCONT)
        finally:
            os.kill(pid, signal.SIGCONT)


def _alive(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


if __name__ == "__main__":
    slow_down(int(sys.argv[1]), float(sys.argv[2]))
