"""What an export that was killed leaves behind, and what the next one says of it."""

from __future__ import annotations

import pathlib

import pytest

from outlast.checkpoint.export import Request, _draft, export
from outlast.errors import RequestError

REMEDY = "is of an export that was killed, or that goes on: if none does, remove it first"


def request(to: pathlib.Path) -> Request:
    return Request(f"file://{to.parent}/store/default/job", None, "safetensors", to)


@pytest.mark.parametrize("there", [True, False])
def test_a_draft_that_was_left_is_named_with_the_remedy(there: bool, tmp_path: pathlib.Path) -> None:
    to = tmp_path / "to"
    if there:
        to.mkdir()
    killed = _draft(to)
    draft = killed.__enter__()
    with pytest.raises(RequestError, match=f"{draft} {REMEDY}"), _draft(to):
        pytest.fail("two write to one draft")
    assert draft.is_dir()
    if there:
        with pytest.raises(RequestError, match=f"{draft} {REMEDY}"):
            export(request(to))


def test_files_of_others_are_named_first(tmp_path: pathlib.Path) -> None:
    for name in (".to.4711", ".to.x"):
        (tmp_path / "to" / name).mkdir(parents=True)
    with pytest.raises(RequestError, match=r"not an empty folder \(\.to\.x\); nothing is overwritten"):
        export(request(tmp_path / "to"))
