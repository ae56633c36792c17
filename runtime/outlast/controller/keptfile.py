"""What a controller leaves to the next one, as a file in the control folder."""

from __future__ import annotations

import json
from pathlib import Path

from outlast.controller.registry import write_private_json
from outlast.errors import RequestError
from outlast.messages import codec
from outlast.messages.kept import Kept


def write_kept(path: Path, kept: Kept) -> None:
    """Replace it in one step. Raises OSError."""
    write_private_json(path, codec.encode(kept))


def read_kept(path: Path) -> Kept:
    """What is there; nothing, if no controller was there before. Raises RequestError when it is something else."""
    if not path.exists():
        return Kept()
    try:
        kept: Kept = codec.decode(Kept, json.loads(path.read_text()))
    except ValueError as error:
        raise RequestError(f"{path} cannot be read ({error}): remove it, the job's restarts count anew then") from error
    return kept
