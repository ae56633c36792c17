"""An interpreter that has what is installed here, but for outlast: what those who are given an export have."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import sysconfig
from typing import Any

SCRIPTS = pathlib.Path(__file__).resolve().parent / "scripts"
_OURS = ("outlast", "trainctl", "_outlast", "__editable__")


def run_plain(folder: pathlib.Path, script: str, *arguments: str) -> dict[str, Any]:
    """Run a script of tests/support/scripts where outlast cannot be imported; the JSON that it prints.

    ``folder`` gets links to all that is installed but outlast; site-packages itself is not looked at (-S), so neither
    are its .pth files, by which an editable outlast would be found.
    """
    folder.mkdir(exist_ok=True)
    for entry in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
        link = folder / entry.name
        if not entry.name.startswith(_OURS) and not link.is_symlink():
            link.symlink_to(entry)
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-S", "-c", _REFUSING, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


_REFUSING = """
import importlib.util, runpy, sys
assert importlib.util.find_spec("outlast") is None, importlib.util.find_spec("outlast")
sys.argv = sys.argv[1:]
sys.path.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
