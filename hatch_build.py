"""Build hook: compiles the native copy kernel when a C compiler is there; without one, outlast falls back to NumPy.

The kernel is loaded with ctypes and knows nothing of Python, so the wheel fits every Python 3 of the platform.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = pathlib.Path("runtime/outlast/snapshot/_kernel.c")
TARGET = SOURCE.with_suffix(".so")
FLAGS = ["-O3", "-std=c11", "-shared", "-fPIC", "-pthread"]


def compile_kernel(root: pathlib.Path) -> bool:
    """Build the kernel beside its source, replacing an older one at once (others may have it mapped)."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not compiler[0] or not (root / SOURCE).exists():
        print("outlast: no native copy kernel: no C compiler", file=sys.stderr)
        return False
    partial = root / TARGET.with_suffix(".so.partial")
    done = subprocess.run(
        [*compiler, *FLAGS, "-o", str(partial), str(root / SOURCE)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"outlast: no native copy kernel: {done.stderr.strip()}", file=sys.stderr)
        return False
    partial.replace(root / TARGET)
    return True


class KernelBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``outlast/snapshot/_kernel.so`` to the wheel (and builds it in place for an editable install)."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (hatchling calls it so)
        if self.target_name != "wheel" or not compile_kernel(pathlib.Path(self.root)):
            return
        build_data["artifacts"].append(str(TARGET))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
