"""``python -m outlast.checkpoint.export URL --to FOLDER``: a checkpoint as plain safetensors, or as a DCP folder.

Every byte is verified as it is read; ranks' pieces become whole tensors, a batch at a time (memory: see ``whole`` and
``formats``). The folder appears when it is complete: what is being written lies beside it under a name of its own, or
in it where it is there already (it may be a file system of its own), with what makes the files an export moved up last.
Started by ``trainctl checkpoints export``; what it says is described in ``saying``.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from outlast.checkpoint import formats
from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import Entry
from outlast.checkpoint.reading import ObjectShard
from outlast.checkpoint.saying import Progress, carry_out
from outlast.checkpoint.statedict import LeafRef, Weights, state_dicts, weights_of
from outlast.checkpoint.store import open_store
from outlast.checkpoint.whole import WholeState
from outlast.errors import CapacityError, CheckpointError, ObjectMissing, RequestError
from outlast.quantities import parse_bytes

SHARD_BYTES = 5_000_000_000
"""Of one file, as Hugging Face's libraries write them."""
_CATALOGUES = ("model.safetensors.index.json", ".metadata")
"""They name the other files, which nobody loads without them."""

Format = Literal["safetensors", "dcp"]


@dataclass(frozen=True)
class Request:
    """``url``: the job's own; ``step`` None: the newest; ``to``: a folder that is not there, or empty."""

    url: str
    step: int | None
    format: Format
    to: pathlib.Path
    shard_bytes: int = SHARD_BYTES


def export(request: Request) -> dict[str, Any]:
    """Write it, and say what: {"text", "step", "folder", "files", "bytes", "weights_digest"}.

    ``weights_digest`` is that of the run whose last step this is; None where ``state_dict()`` has tensors that no
    checkpoint holds. Raises RequestError, CapacityError, CheckpointError, StateError, StoreError, OSError.
    """
    _check_folder(request.to)
    with closing(open_store(request.url)) as store:
        archive = Archive(store)
        entry = archive.find(request.step)
        try:
            whole = _open(archive, entry)
            state = whole.state()
            weights = weights_of(state, whole.leaves())
            with _draft(request.to) as draft:
                digest = _write(request, draft, whole, state, weights)
        except (ObjectMissing, CheckpointError):
            archive.check_named(entry)
            raise
    files = sorted(path.name for path in _entries(request.to))
    size = sum((request.to / name).stat().st_size for name in files)
    return {
        "text": _text(request, entry, files, weights, digest),
        "step": entry.step,
        "generation": str(entry.generation),
        "folder": str(request.to),
        "files": files,
        "bytes": size,
        "weights_digest": digest,
        "lacking": list(weights.lacking),
    }


def _check_folder(folder: pathlib.Path) -> None:
    if folder.exists():
        _check_empty(folder)
    elif not folder.absolute().parent.is_dir():
        raise RequestError(f"--to {folder}: there is no folder {folder.absolute().parent}")


def _check_empty(folder: pathlib.Path, *but: pathlib.Path) -> None:
    found = [path.name for path in _entries(folder) if path not in but] if folder.is_dir() else ["a file"]
    if others := [name for name in found if not _is_draft(name, folder)]:
        text = f"it is there and not an empty folder ({min(others)}); nothing is overwritten"
        raise RequestError(f"--to {folder}: {text}")
    if found:
        raise _drafted(folder / min(found))


def _drafted(draft: pathlib.Path) -> RequestError:
    """Who left a draft, and whether it still writes, cannot be known: it may run on another machine."""
    return RequestError(f"{draft} is of an export that was killed, or that goes on: if none does, remove it first")


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    """What is in it, but for what a new file system has of itself."""
    return [path for path in folder.iterdir() if path.name != "lost+found"]


def _open(archive: Archive, entry: Entry) -> WholeState:
    manifest = archive.manifest(entry)

    def open_image(rank: int) -> ObjectShard:
        image = manifest.images[rank]
        return ObjectShard(archive.store, image.key, manifest.generation, checksum=image.checksum)

    return WholeState(open_image, len(manifest.images), f"the checkpoint of step {entry.step}")


@contextmanager
def _draft(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder that takes the place of ``folder``, or whose files do, when all went well, and that goes otherwise."""
    there = folder.exists()
    draft = (folder if there else folder.absolute().parent) / f"{_draft_prefix(folder)}{os.getpid()}"
    try:
        draft.mkdir()
    except FileExistsError as error:
        raise _drafted(draft) from error
    try:
        yield draft
        _sync(*draft.iterdir(), draft)
        if there:
            _move_up(draft, folder)
        else:
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft_prefix(folder: pathlib.Path) -> str:
    return f".{folder.name or 'export'}."


def _is_draft(name: str, folder: pathlib.Path) -> bool:
    prefix = _draft_prefix(folder)
    return name.startswith(prefix) and name.removeprefix(prefix).isdecimal()


def _move_up(draft: pathlib.Path, folder: pathlib.Path) -> None:
    """Move all files of ``draft`` into the ``folder`` that it is in, the catalogue last; none when one cannot be."""
    _check_empty(folder, draft)
    *parts, last = sorted(draft.iterdir(), key=lambda path: (path.name in _CATALOGUES, path.name))
    moved: list[pathlib.Path] = []
    try:
        for path in parts:
            moved.append(path.rename(folder / path.name))
        _sync(folder)
        moved.append(last.rename(folder / last.name))
        _sync(folder)
    except BaseException:
        for path in reversed(moved):
            path.unlink(missing_ok=True)
        raise


def _sync(*paths: pathlib.Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(
    request: Request, draft: pathlib.Path, whole: WholeState, state: Mapping[str, Any], weights: Weights
) -> str | None:
    """Write the format that is wanted; the weights digest."""
    sections = state_dicts(state, weights, whole.tensor) if request.format == "dcp" else {}
    refs = [value.leaf for values in sections.values() for value in values.values() if isinstance(value, LeafRef)]
    size, of_weights = _bytes(whole, refs), _bytes(whole, list(weights.names.values()))
    _check_room(draft, size if request.format == "dcp" else of_weights)
    progress = Progress(size + of_weights)
    if request.format == "safetensors":
        digest = formats.write_safetensors(draft, weights.names, whole, request.shard_bytes, progress.add)
    else:
        formats.write_dcp(draft, sections, whole, progress.add)
        digest = formats.digest_of(weights.names, whole, progress.add)
    return None if weights.lacking else digest


def _bytes(whole: WholeState, leaves: Sequence[str]) -> int:
    return sum(whole.kind(leaf).nbytes for leaf in leaves)


def _check_room(folder: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CapacityError(
            f"{folder.parent} has {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed: "
            f"{math.ceil((needed - free) / 2**20)} MiB are missing"
        )


def _text(request: Request, entry: Entry, files: Sequence[str], weights: Weights, digest: str | None) -> str:
    files_of = f"{len(files)} file{'s' * (len(files) != 1)} of {request.format}"
    text = f"step {entry.step} of {request.url} is in {request.to}: {files_of}"
    if weights.lacking:
        return f"{text}; not in it, since state_dict() computes them: {', '.join(weights.lacking[:8])}"
    return f"{text}, weights {digest}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m outlast.checkpoint.export")
    parser.add_argument("url", help="the job's own URL: <store>/<namespace>/<name>")
    parser.add_argument("--step", type=int, default=None, help="the newest by default")
    parser.add_argument("--format", choices=["safetensors", "dcp"], default="safetensors")
    parser.add_argument("--to", type=pathlib.Path, required=True, help="a folder that is not there, or empty")
    parser.add_argument("--shard-size", default=str(SHARD_BYTES), help="of one safetensors file, such as 5G")
    args = parser.parse_args(argv)

    def work() -> dict[str, Any]:
        try:
            shard_bytes = parse_bytes(args.shard_size if not args.shard_size.isdecimal() else int(args.shard_size))
        except ValueError as error:
            raise RequestError(f"--shard-size: {error}") from error
        return export(Request(args.url, args.step, args.format, args.to, shard_bytes))

    return carry_out(work)


if __name__ == "__main__":
    raise SystemExit(main())
