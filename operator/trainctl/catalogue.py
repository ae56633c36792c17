"""What ``trainctl checkpoints`` reads and writes in a store: heads, manifests, pins, garbage. No image is read.

Raises RequestError for what is not there (with what is), StoreDenied and StoreUnavailable as the store does, and
CheckpointError for a head or manifest that cannot be read.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from outlast.errors import CheckpointError, RequestError
from outlast.quantities import parse_duration
from trainctl.columns import counted, facts, printable, table

if TYPE_CHECKING:
    from outlast.checkpoint.archive import Archive
    from outlast.checkpoint.manifest import Entry, Head
    from outlast.checkpoint.store import Store

PATIENCE_S = 20.0
"""How long a store that does not answer is asked again."""
_NAMED = 20
_HEAD = "head.json"


# --- the commands ---------------------------------------------------------------------------------------------------


def list_checkpoints(url: str, as_json: bool) -> None:
    """A job's checkpoints, newest first, or the jobs below ``url``."""
    with _store(url) as store:
        archive = _archive(store)
        head = archive.read_head()
        if head is None:
            archive.check_lost()
            _list_jobs(store, as_json)
            return
        rows = list(_rows(archive, head))
    if as_json:
        _print_json(
            {"url": url, "job": head.job.to_json(), "claim": head.claim and head.claim.to_json(), "checkpoints": rows}
        )
        return
    print(f"{counted(len(head.line), 'checkpoint')} of {head.job.namespace}/{head.job.name} at {url}")
    _print_table(
        ("STEP", "GENERATION", "AGE", "SIZE", "RANKS", "PINNED", "STATE"),
        [
            (
                str(row["step"]),
                row["generation"],
                ago(row["age_s"]),
                amount(row["bytes"]),
                str(row["ranks"] or "-"),
                "pinned" if row["pinned"] else "",
                f"{row['state']}: {row['reason']}" if row["reason"] else row["state"],
            )
            for row in rows
        ],
    )


def show_checkpoint(url: str, step: int | None, as_json: bool) -> None:
    """A checkpoint's manifest."""
    with _job(url, step) as (archive, step):
        entry = archive.find(step)
        manifest = archive.manifest(entry)
    told = json.loads(manifest.to_text())
    if as_json:
        _print_json({"url": archive.url, "pinned": entry.pinned, "bytes": entry.bytes, **told})
        return
    rows = {
        "url": archive.url,
        "job": str(manifest.job),
        "step": manifest.step,
        "generation": manifest.generation,
        "created": f"{manifest.created}, {ago(_age(entry))} ago",
        "ranks": f"{len(manifest.images)}: {counted(manifest.nodes, 'node')} x {manifest.procs}",
        "size": amount(entry.bytes),
        "pinned": "yes" if entry.pinned else "no",
        "manifest": f"{entry.manifest}, SHA-256 {entry.digest}",
        **dict(_flat(manifest.about)),
    }
    _print_table((), [(name, str(value)) for name, value in rows.items()])
    images = [(str(i.rank), str(i.seat), amount(i.size), i.checksum, i.key) for i in manifest.images]
    _print_table(("RANK", "SEAT", "SIZE", "CHECKSUM", "OBJECT"), images)


def collect_garbage(url: str, grace: str, delete: bool, as_json: bool) -> None:
    """Show, or remove, what no checkpoint needs and nobody has touched for ``grace``."""
    try:
        grace_s = parse_duration(float(grace) if grace.replace(".", "", 1).isdecimal() else grace)
    except ValueError as error:
        raise RequestError(f"--grace: {error}") from error
    with _job(url, None) as (archive, _):
        sizes = {info.key: info.size for info in archive.store.list()}
        report = archive.gc(dry_run=not delete, grace_s=grace_s)
    if as_json:
        found = {"objects": [{"key": key, "bytes": sizes.get(key, 0)} for key in report.keys]}
        parts = [{"key": upload.key, "started": upload.started} for upload in report.unfinished]
        _print_json({"url": archive.url, "deleted": delete, "bytes": report.bytes, **found, "unfinished": parts})
        return
    rows = [(amount(sizes.get(key, 0)), key) for key in report.keys]
    rows += [("-", f"{upload.key} (an upload that was never ended)") for upload in report.unfinished]
    if rows:
        _print_table(("SIZE", "OBJECT"), rows)
    unfinished = counted(len(report.unfinished), "unfinished upload")
    count = f"{counted(len(report.keys), 'object')} of {amount(report.bytes)} and {unfinished}"
    if not rows:
        print("there is no garbage")
    else:
        print(f"removed {count}" if delete else f"{count} would be removed: add --delete")


def set_pin(url: str, step: int | None, pinned: bool, as_json: bool) -> None:
    """Pin or unpin a checkpoint."""
    with _job(url, step) as (archive, step):
        entry = archive.pin(step) if pinned else archive.unpin(step)
    if as_json:
        _print_json({"url": archive.url, **entry.to_json()})
    else:
        print(f"step {entry.step} ({entry.generation}) is {'pinned' if entry.pinned else 'left to retention'}")


# --- finding things -------------------------------------------------------------------------------------------------


@contextmanager
def _store(url: str) -> Iterator[Store]:
    from outlast.checkpoint.store import StoreOptions, open_store

    with closing(open_store(url, StoreOptions(patience_s=PATIENCE_S, on_wait=_once_told(url)))) as store:
        yield store


def _once_told(url: str) -> Callable[[str | None], None]:
    """Says why nothing seems to happen: the first trouble with a store that is waited for."""
    told = threading.Event()

    def tell(trouble: str | None) -> None:
        if trouble is not None and not told.is_set():
            told.set()
            print(f"{url} is waited for, {PATIENCE_S:.0f} s at most: {trouble}", file=sys.stderr)

    return tell


def _archive(store: Store) -> Archive:
    from outlast.checkpoint.archive import Archive

    return Archive(store)


@contextmanager
def _job(text: str, step: int | None) -> Iterator[tuple[Archive, int | None]]:
    """The archive at a job's URL, and the step; ``URL@STEP`` is understood too."""
    url, step = locate(text, step)
    with _store(url) as store:
        yield _archive(store), step


def locate(text: str, step: int | None) -> tuple[str, int | None]:
    """The job's URL and the step that ``URL[@STEP]`` and ``STEP`` name.

    Raises RequestError when there are no checkpoints, naming those of the jobs that lie below.
    """
    from outlast.checkpoint.manifest import parse_reference

    url, named = parse_reference(text)
    if None not in (named, step) and named != step:
        raise RequestError(f"{text} names step {named}, and step {step} was given too: leave one of them out")
    with _store(url) as store:
        archive = _archive(store)
        if archive.read_head() is None:
            archive.check_lost()
            jobs = _jobs_below(store) + _headless_below(store)
            shown = "".join(f"\n  {job}" for job in jobs[:_NAMED])
            raise RequestError(
                f"{url} is no job's URL: below it are the checkpoints of{shown}"
                if jobs
                else f"{url} holds no checkpoints"
            )
    return url, named if step is None else step


def _jobs_below(store: Store) -> list[str]:
    keys = (info.key for info in store.list())
    return [f"{store.url}/{key.removesuffix('/' + _HEAD)}" for key in keys if key.endswith("/" + _HEAD)]


def _headless_below(store: Store) -> list[str]:
    """Those that have manifests, but no head."""
    from outlast.checkpoint.line import job_of_manifest

    jobs = (job_of_manifest(info.key) for info in store.list())
    found = dict.fromkeys(f"{store.url}/{job}" for job in jobs if job)
    known = _jobs_below(store) if found else []
    return [url for url in found if url not in known]


def _list_jobs(store: Store, as_json: bool) -> None:
    urls, headless = _jobs_below(store), _headless_below(store)
    if not urls and not headless:
        raise RequestError(f"{store.url} holds no checkpoints")
    rows: list[dict[str, Any]] = []
    unreadable: list[dict[str, str]] = []
    for url in urls:
        try:
            rows.append(_outline(url))
        except CheckpointError as error:
            unreadable.append({"url": url, "reason": str(error)})
    if as_json:
        _print_json({"url": store.url, "jobs": rows, "headless": headless, "unreadable": unreadable})
        return
    cells = [
        (row["url"], str(row["checkpoints"]), amount(row["bytes"]), "-" if row["step"] is None else str(row["step"]))
        for row in rows
    ]
    _print_table(("JOB", "CHECKPOINTS", "SIZE", "NEWEST STEP"), cells)
    for url in headless:
        print(f"{_HEAD} is lost: trainctl checkpoints repair {url}")
    for job in unreadable:
        print(job["reason"])


def _outline(url: str) -> dict[str, Any]:
    """A job in the list of a store's. Raises CheckpointError when its head cannot be read."""
    with _store(url) as store:
        head = _archive(store).require_head()
    newest = head.line[-1] if head.line else None
    size = sum(entry.bytes for entry in head.line)
    return {"url": url, "checkpoints": len(head.line), "bytes": size, "step": newest and newest.step}


def _rows(archive: Archive, head: Head) -> Iterator[dict[str, Any]]:
    """The line, newest first, each judged by its manifest and a listing; then what is in quarantine."""
    found = archive.restorable(enough=len(head.line))
    ranks = {stored.generation: stored.world for stored in found.stored}
    bad = {entry.generation: reason for entry, reason in found.bad}
    for entry in reversed(head.line):
        reason = bad.get(entry.generation)
        yield _row(entry, ranks.get(entry.generation), "incomplete" if reason else "ok", reason)
    for item in reversed(head.quarantined):
        yield _row(item.entry, None, "quarantined", item.reason)


def _row(entry: Entry, ranks: int | None, state: str, reason: str | None) -> dict[str, Any]:
    return {
        "step": entry.step,
        "generation": str(entry.generation),
        "created": entry.created,
        "age_s": round(_age(entry), 1),
        "bytes": entry.bytes,
        "ranks": ranks,
        "pinned": entry.pinned,
        "state": state,
        "reason": reason,
    }


def _age(entry: Entry) -> float:
    return max(0.0, time.time() - datetime.fromisoformat(entry.created).timestamp())


# --- showing them ---------------------------------------------------------------------------------------------------


def amount(size: float) -> str:
    """Bytes for people: "12.3 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def ago(seconds: float) -> str:
    """A time span for people: "41 s", "12 min", "3.2 h", "5.0 d"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} d"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows in columns, folded into a terminal; without ``columns``: names and values."""
    if sys.stdout.isatty():
        _draw_table(columns, rows)
    else:
        print(table(columns, rows) if columns else facts((name, value) for name, value in rows))


def _draw_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, show_header=bool(columns), padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns or ("", ""):
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(drawn)


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, indent=2))
