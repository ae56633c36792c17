"""The container's control group, as the kernel shows it in files: v2's, or v1's."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def read(path: Path) -> str:
    """A file's text without the space around it; "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
