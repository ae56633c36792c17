"""A store that does not answer is waited for, and that is said: by whoever asks again, the keeper's tier, the agent."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from outlast import messages as m
from outlast.agent.attempt_record import AttemptRecord
from outlast.agent.keeper_calls import KeeperTasks
from outlast.agent.uploading import Uploading
from outlast.checkpoint import retrying
from outlast.checkpoint.pacing import Pace
from outlast.checkpoint.retrying import again
from outlast.checkpoint.store import StoreOptions, open_store
from outlast.checkpoint.tier import StoreTier
from outlast.errors import StaleAttemptError, StoreUnavailable
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


def failing() -> None:
    raise StoreUnavailable("503")


def test_whoever_gives_up_or_is_called_off_waits_no_more() -> None:
    for patience_s, cancelled, ends in ((0.05, False, StoreUnavailable), (60.0, True, StaleAttemptError)):
        heard: list[str | None] = []
        with pytest.raises(ends):
            again(failing, patience_s, lambda cancelled=cancelled: cancelled, heard.append)  # type: ignore[misc]
        assert heard[0] == "503"
        assert heard[-1] is None
        assert heard.count(None) == 1


def test_patience_with_a_slow_call_begins_with_its_first_failure() -> None:
    calls = 0

    def slow() -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            time.sleep(0.2)
            raise StoreUnavailable("503")
        return "answer"

    with pytest.raises(StoreUnavailable):
        again(slow, 0.1)
    calls = 0
    assert again(slow, 0.1, slow=True) == "answer"
    with pytest.raises(StoreUnavailable):
        again(failing, 0.05, slow=True)


Tier = tuple[StoreTier, list[StoreOptions]]


@pytest.fixture
def tier(monkeypatch: pytest.MonkeyPatch) -> Tier:
    """A tier, and the options that it opens stores with."""
    options: list[StoreOptions] = []
    monkeypatch.setattr("outlast.checkpoint.tier.open_store", lambda url, o: (options.append(o), open_store(url, o))[1])
    return StoreTier(), options


def test_a_tier_knows_why_its_transfers_wait(tmp_path: Path, tier: Tier) -> None:
    transfers, options = tier
    transfers.upload(f"file://{tmp_path}", "key", memoryview(b"x"), TransferLimits())
    assert transfers.trouble() is None
    options[0].on_wait("503")
    assert transfers.trouble() == "503"
    options[0].on_wait(None)
    assert transfers.trouble() is None


def test_one_that_was_answered_does_not_speak_for_those_that_wait(tmp_path: Path, tier: Tier) -> None:
    transfers, options = tier
    transfers.upload(f"file://{tmp_path}", "key", memoryview(b"x"), TransferLimits())
    heard, answered = threading.Event(), threading.Event()

    def waits(text: str) -> None:
        options[0].on_wait(text)
        heard.set()
        answered.wait(10)
        options[0].on_wait(None)

    thread = threading.Thread(target=waits, args=("the other",))
    thread.start()
    assert heard.wait(10)
    options[0].on_wait("this one")
    assert transfers.trouble() == "this one"
    options[0].on_wait(None)
    assert transfers.trouble() == "the other"
    answered.set()
    thread.join(10)
    assert transfers.trouble() is None


def test_trouble_ends_with_the_upload_that_had_it(tmp_path: Path, tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gave up leaves nothing to be told of the next one."""
    transfers, _ = tier
    troubles: list[str | None] = []

    def full(*_: object) -> int:
        troubles.append(transfers.trouble())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr("outlast.checkpoint.folder.os.write", full)
        with pytest.raises(StoreUnavailable, match="full"):
            transfers.upload(f"file://{tmp_path}", "key", memoryview(b"x"), TransferLimits(patience_s=0.1))
    assert troubles[0] is None
    assert "full" in str(troubles[-1])
    assert transfers.trouble() is None


def test_a_pace_takes_nothing_for_what_was_called_off() -> None:
    pace = Pace(1000)
    assert pace.wait(1)
    assert not pace.wait(10**6, lambda: True), "a thousand seconds of it"
    began = time.monotonic()
    assert pace.wait(1)
    assert time.monotonic() - began < 5


class Keeper:
    """A keeper's tasks of which the test says when they are done."""

    def __init__(self) -> None:
        self.done: list[Callable[[m.Uploaded | m.UploadFailed], None]] = []
        self.looks: list[Callable[[str | None], None]] = []

    def upload(self, upload: m.Upload, attempt: Attempt, seat: int, then: Callable[[Any], None]) -> None:
        self.done.append(then)

    def store_trouble(self, seconds: float, then: Callable[[str | None], None]) -> None:
        self.looks.append(then)


def uploading_of(keeper: Keeper, events: list[m.Event]) -> tuple[Uploading, m.Upload]:
    attempt = Attempt(1, "a" * 16)
    record = AttemptRecord(in_force=attempt, started=attempt, seat=0)
    uploading = Uploading("node-1", cast(KeeperTasks, keeper), lambda: record, events.append)
    return uploading, m.Upload(("node-1",), Generation.of(attempt, 5), "s3://bucket/x", None)


WAITS = m.Note("node-1", None, "store-unavailable", "node-1 waits for the store and tries again: 503")
ANSWERS = m.Note("node-1", None, "store-answers", "node-1: the store answers again")


def test_an_upload_that_waits_is_told_of_once_and_when_it_does_no_more() -> None:
    keeper, events = Keeper(), list[m.Event]()
    uploading, order = uploading_of(keeper, events)
    uploading.begin(order)

    def seen(*troubles: str | None) -> list[m.Event]:
        for trouble in troubles:
            keeper.looks.pop()(trouble)
        told = list(events)
        events.clear()
        return told

    assert seen(None, None, None, None) == []
    assert seen("503") == [WAITS]
    assert seen("503", None, None, "503", None, None) == [], "on and off is no news"
    assert seen(None) == [ANSWERS]
    assert seen(None, None) == []
    assert seen("503") == [WAITS]
    failed = m.UploadFailed("node-1", order.generation, "503")
    keeper.done.pop()(failed)
    assert seen("503") == [failed]
    assert keeper.looks == [], "an upload that is over does not wait"
    uploading.begin(order)
    assert seen(None, None) == []
    assert seen(None) == [ANSWERS], "what failed is no trouble any more once the next one goes on"


def test_who_has_uploaded_says_so_when_asked_again_and_uploads_anew_when_told_anew() -> None:
    keeper, events = Keeper(), list[m.Event]()
    uploading, order = uploading_of(keeper, events)
    again, done = replace(order, again=True), m.Uploaded("node-1", order.generation, (), 7, 1.0)
    uploading.begin(again)
    uploading.begin(again)
    assert len(keeper.done) == 1, "the first has not arrived, the second finds it under way"
    keeper.done.pop()(done)
    uploading.begin(again)
    assert (events, keeper.done) == ([done, done], [])
    uploading.begin(order)
    assert len(keeper.done) == 1, "the store may have lost it"
    keeper.done.pop()(m.UploadFailed("node-1", order.generation, "503"))
    uploading.begin(again)
    assert len(keeper.done) == 1
