"""Small file systems for tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_file_system(place: Path, mebibytes: int) -> Iterator[Path]:
    """A tmpfs of that size at a folder that is there; a skip, with the reason, where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
