"""What the processes behind ``trainctl checkpoints`` say: JSON lines on standard output.

``{"type": "progress", "bytes", "total"}`` now and then, and last ``{"type": "end", "exit", "text", ...}``. Exit status:
0 it is done, 1 it could not be done (for verify: something is wrong), 2 the request was wrong.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from outlast.errors import OutlastError, RequestError, StoreDenied

EVERY_S = 0.1


class Progress:
    """Counts bytes towards ``total`` and says so, ten times a second at most. Not for two threads at a time."""

    def __init__(self, total: int) -> None:
        self._total, self._bytes, self._said = total, 0, 0.0

    def add(self, nbytes: int) -> None:
        """So many more are done."""
        self._bytes += nbytes
        now = time.monotonic()
        if now - self._said >= EVERY_S or self._bytes == self._total:
            self._said = now
            _write({"type": "progress", "bytes": self._bytes, "total": self._total})


def carry_out(work: Callable[[], Mapping[str, Any]]) -> int:
    """Do ``work``, whose result is the last line's fields (``exit`` and ``text`` among them), and return the exit
    status. Errors that are for people become that line."""
    try:
        end = {"exit": 0, **work()}
    except (RequestError, StoreDenied) as error:
        end = {"exit": 2, "text": str(error)}
    except (OutlastError, OSError) as error:
        end = {"exit": 1, "text": str(error)}
    _write({"type": "end", **end})
    return int(end["exit"])


def _write(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), file=sys.stdout, flush=True)
