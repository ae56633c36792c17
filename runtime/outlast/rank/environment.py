"""What decides bits besides code, data and state: recorded in reports, compared when a snapshot is restored."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch


def environment(backend: str) -> dict[str, Any]:
    """Versions, thread counts, processor and switches of this process."""
    import numpy

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "hash_seed": os.environ.get("PYTHONHASHSEED", "random"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }


def processor() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, for people; empty when nothing does."""
    changed = [f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
    return ", ".join(changed)
