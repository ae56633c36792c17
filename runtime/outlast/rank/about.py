"""What a checkpoint tells of its origin: which code wrote it, on which mesh."""

from __future__ import annotations

import hashlib
import pathlib
import sys
import sysconfig
from collections.abc import Iterable
from typing import Any

import torch

import outlast

_INSTALLED = {"site-packages", "dist-packages"}


def about(parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """{"script": fingerprint of the job's own code, "mesh": [dims, names] of the first sharded parameter, or None}."""
    return {"script": script_fingerprint(), "mesh": mesh_of(parameters)}


def mesh_of(parameters: Iterable[torch.Tensor]) -> list[list[Any]] | None:
    """Sizes and names of the dimensions that the first DTensor is spread over."""
    for parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None:
            return [list(mesh.mesh.shape), list(mesh.mesh_dim_names or [])]
    return None


def script_fingerprint() -> str:
    """SHA-256 over the names and bytes of the main script and of the modules loaded from its folder or the current one,
    installed packages apart; "" where there is no script."""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None:
        return ""
    script = pathlib.Path(main).resolve()
    folders = (script.parent, pathlib.Path.cwd())
    files = {script} | {file for file in _loaded() if any(file.is_relative_to(folder) for folder in folders)}
    digest = hashlib.sha256()
    for name, file in sorted((_name(file, folders), file) for file in files):
        try:
            content = file.read_bytes()
        except OSError:  # changed or gone since it was loaded
            content = b""
        digest.update(f"{name}|{len(content)}|".encode() + content)
    return digest.hexdigest()


def _name(file: pathlib.Path, folders: tuple[pathlib.Path, ...]) -> str:
    """Where a file is in the job's folder, wherever that is."""
    return next(str(file.relative_to(folder)) for folder in folders if file.is_relative_to(folder))


def _loaded() -> Iterable[pathlib.Path]:
    """The files of all modules that are nobody's installation."""
    paths = sysconfig.get_paths()
    foreign = {pathlib.Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    foreign.add(pathlib.Path(outlast.__file__).resolve().parent)
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and path.endswith(".py"):
            file = pathlib.Path(path).resolve()
            if foreign.isdisjoint(file.parents) and _INSTALLED.isdisjoint(file.parts):
                yield file
