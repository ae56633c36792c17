"""Puts ranks' logs of one attempt into the job's store: a process of its own, which nobody waits for.

The agent has it forked from the node's forkserver when the attempt has ended there. It tries for a minute, and says on
its standard error why it could not; that is a note in the job's story and changes nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from outlast.checkpoint.store import Store, StoreOptions, open_store
from outlast.errors import StoreError
from outlast.joblogs import STORED, log_key, outdated, parse_log_key

MOST_BYTES = 16 << 20
"""Of a log: its end."""
NICENESS = 10
"""The next attempt is starting meanwhile."""
_PATIENCE_S = 60.0


def main(url: str, attempt: int, logs: Sequence[Sequence[object]], prune: bool) -> None:
    """``url``: the job's; ``logs``: (rank, path) of each; ``prune``: also remove those of long past attempts.

    Ends the process with 1 when the store does not take them.
    """
    os.nice(NICENESS)
    try:
        store = open_store(url, StoreOptions(patience_s=_PATIENCE_S))
        try:
            ship(store, attempt, {int(str(rank)): Path(str(path)) for rank, path in logs})
            if prune:
                prune_logs(store)
        finally:
            store.close()
    except StoreError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(1)


def ship(store: Store, attempt: int, logs: dict[int, Path]) -> None:
    """Put them; a rank that never wrote has no file, and is passed over. Raises StoreError."""
    for rank, path in logs.items():
        if path.exists():
            store.put(log_key(attempt, rank), tail(path))


def tail(path: Path, most: int = MOST_BYTES) -> bytes:
    """The end of a file, from the beginning of a line on; what is left out is said in its first line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= most:
            return file.read(most)
        file.seek(size - most)
        data = file.read(most)
    cut = data.find(b"\n") + 1
    return f"({size - most + cut} bytes before this were left out)\n".encode() + data[cut:]


def prune_logs(store: Store) -> None:
    """Remove the logs of attempts that are not kept any more. Raises StoreError."""
    found = {info.key: parsed[0] for info in store.list(STORED) if (parsed := parse_log_key(info.key)) is not None}
    old = outdated(found.values())
    store.delete([key for key, attempt in found.items() if attempt in old])
