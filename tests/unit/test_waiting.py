"""A store that does not answer is waited for, and that is said: by whoever asks again, the keeper's tier, the agent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from outlast import messages as m
from outlast.agent.attempt_record import AttemptRecord
from outlast.agent.keeper_calls import KeeperTasks
from outlast.agent.uploading import Uploading
from outlast.checkpoint import retrying
from outlast.checkpoint.retrying import again
from outlast.checkpoint.store import StoreOptions, open_store
from outlast.checkpoint.tier import StoreTier
from outlast.errors import StoreUnavailable
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.stored import TransferLimits


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_S", 0.001)
    monkeypatch.setattr(retrying, "LONGEST_S", 0.001)


@pytest.mark.parametrize(
    ("fails", "patience_s", "told"),
    [(0, 60.0, []), (2, 60.0, ["503 the 1.", "503 the 2.", None]), (9, 0.0, [])],
)
def test_each_failure_that_is_waited_after_is_told_and_the_answer_at_last(
    fails: int, patience_s: float, told: list[str | None]
) -> None:
    heard: list[str | None] = []
    count = 0

    def ask() -> str:
        nonlocal count
        count += 1
        if count <= fails:
            raise StoreUnavailable(f"503 the {count}.")
        return "answer"

    if patience_s:
        assert again(ask, patience_s, on_wait=heard.append) == "answer"
    else:
        with pytest.raises(StoreUnavailable):
            again(ask, patience_s, on_wait=heard.append)
    assert heard == told


def test_a_tier_knows_why_its_transfers_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[StoreOptions] = []
    monkeypatch.setattr("outlast.checkpoint.tier.open_store", lambda url, o: (options.append(o), open_store(url, o))[1])
    tier = StoreTier()
    tier.upload(f"file://{tmp_path}", "key", memoryview(b"x"), TransferLimits())
    assert tier.trouble() is None
    options[0].on_wait("503")
    assert tier.trouble() == "503"
    options[0].on_wait(None)
    assert tier.trouble() is None


class Keeper:
    """A keeper's tasks of which the test says when they are done."""

    def __init__(self) -> None:
        self.done: list[Callable[[m.Uploaded | m.UploadFailed], None]] = []
        self.looks: list[Callable[[str | None], None]] = []

    def upload(self, upload: m.Upload, attempt: Attempt, seat: int, then: Callable[[Any], None]) -> None:
        self.done.append(then)

    def store_trouble(self, seconds: float, then: Callable[[str | None], None]) -> None:
        self.looks.append(then)


def test_an_upload_that_waits_is_told_of_once_and_no_longer_than_it_lasts() -> None:
    keeper, events = Keeper(), list[m.Event]()
    attempt = Attempt(1, "a" * 16)
    record = AttemptRecord(in_force=attempt, started=attempt, seat=0)
    uploading = Uploading("node-1", cast(KeeperTasks, keeper), lambda: record, events.append)
    generation = Generation.of(attempt, 5)
    order = m.Upload(("node-1",), generation, "s3://bucket/x", None)
    uploading.begin(order)
    keeper.looks.pop()(None)
    assert events == []
    keeper.looks.pop()("503")
    assert events == [m.Note("node-1", None, "store-unavailable", "node-1 waits for the store and tries again: 503")]
    assert keeper.looks == [], "said once"
    keeper.done.pop()(m.UploadFailed("node-1", generation, "503"))
    uploading.begin(order)
    keeper.done.pop()(m.UploadFailed("node-1", generation, "503"))
    keeper.looks.pop()("503")
    assert len(events) == 3, "an upload that is over does not wait"
