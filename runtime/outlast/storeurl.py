"""Where checkpoints lie, as people write it: a store's URL, and one job's checkpoint in it (``URL[@STEP]``). Pure.

Both are returned as they are used from then on: without slashes at the end of the URL. Every ``ValueError`` names the
value, says what is allowed and, where it can be guessed, what was meant. Nothing is asked of a store here.
"""

from __future__ import annotations

import re
from urllib.parse import quote

_BUCKET = re.compile(r"[a-z0-9][-.a-z0-9]{1,61}[a-z0-9]")
_UNUSABLE = re.compile(r"[?#\s\x00-\x1f\x7f]")
_WANTED = "write s3://bucket/prefix or file:///folder"


def parse_store_url(text: str) -> str:
    """``s3://bucket/prefix`` or ``file:///folder``. Raises ValueError."""
    scheme, found, rest = text.partition("://")
    if not found or scheme not in ("s3", "file"):
        raise ValueError(f'"{text}" is no store: {_WANTED}{_meant(text)}')
    unusable = _UNUSABLE.search(text)
    if unusable:
        remedy = f"; write {quote(unusable[0])} for it" if scheme == "file" else ""
        raise ValueError(f'"{text}" cannot be a store: {unusable[0]!r} may not stand in it{remedy}')
    first, *parts = rest.rstrip("/").split("/")
    if scheme == "file" and (first or not parts):
        raise ValueError(f'"{text}" is no absolute folder: write file:///folder{_meant(text)}')
    if scheme == "s3" and not _BUCKET.fullmatch(first):
        raise ValueError(f'"{first}" is no bucket: write 3 to 63 of a-z, 0-9, - and . after s3://')
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f'"{text}" must be written out: without //, . and .. in its path')
    return f"{scheme}://{rest.rstrip('/')}"


def parse_checkpoint(text: str) -> str:
    """``URL[@STEP]``: a job's own URL in a store, which ends in its name, and a step of it. Raises ValueError."""
    before, slash, name = text.rstrip("/").rpartition("/")
    name, at, step = name.partition("@")
    url = parse_store_url(before + slash + name)
    if url.startswith("s3://") and url.count("/") == 2:
        raise ValueError(f'"{text}" names a bucket, not a job: write s3://bucket/prefix/<namespace>/<name>')
    if at and not (step.isascii() and step.isdecimal()):
        raise ValueError(f'"@{step}" is no step: write @12000, or leave it out for the newest')
    return f"{url}@{int(step)}" if at else url


def job_of(checkpoint: str) -> str:
    """The job's URL in what ``parse_checkpoint`` returned."""
    before, slash, name = checkpoint.rpartition("/")
    return before + slash + name.partition("@")[0]


def _meant(text: str) -> str:
    """A path, or a file URL with too few slashes."""
    path = re.fullmatch(r"(?:file:/{0,2})?(/?)([^:/?#\s][^:?#\s]*)", text)
    if path is None or not (path[1] or text.startswith("file:")):
        return ""
    return f"; did you mean file:///{path[2]}?"
