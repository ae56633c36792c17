"""A TrainingJob's file as a person has named it: what is wrong with it as a whole is told with its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outlast.api import TrainingJob, load
from outlast.errors import RequestError, SpecError
from outlast.yamlfile import read_mapping


def read_text(path: Path) -> str:
    """The file's text. Raises RequestError."""
    try:
        return path.read_text()
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: it is no text") from error


def load_named(text: str, name: str, overrides: Sequence[str] = ()) -> TrainingJob:
    """The job in the ``text`` of the file ``name``, as ``outlast.api.load`` reads it. Raises SpecError."""
    try:
        read_mapping(text)
    except SpecError as error:
        raise SpecError([(path or name, what) for path, what in error.problems]) from error
    return load(text, overrides)
