"""Ranks' logs in the store: what they are called, how much of them, how long they stay."""

from __future__ import annotations

import pathlib

import pytest

from outlast.checkpoint.line import garbage
from outlast.checkpoint.shipping import main, prune_logs, ship, tail
from outlast.checkpoint.store import open_store
from outlast.errors import ObjectMissing
from outlast.joblogs import log_file, log_key, outdated, parse_log_file, parse_log_key


def test_names_are_read_back() -> None:
    assert parse_log_file(log_file(3, 12)) == (3, 12)
    assert parse_log_key(log_key(3, 12)) == (3, 12)
    assert [parse_log_file("keeper.node-0.log"), parse_log_key("1-abc-5/rank-00001.safetensors")] == [None, None]


@pytest.mark.parametrize(
    ("attempts", "kept", "old"),
    [([], 2, set()), ([1, 2], 2, set()), ([1, 2, 3], 2, {1}), ([1, 9], 2, {1}), ([5, 5, 4, 3], 2, {3})],
)
def test_which_attempts_are_outdated(attempts: list[int], kept: int, old: set[int]) -> None:
    assert outdated(attempts, kept) == old


def test_a_long_log_is_kept_from_the_beginning_of_a_line_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first line\nsecond line\nthird\n")
    assert tail(path, 100) == b"first line\nsecond line\nthird\n"
    assert tail(path, 15) == b"(23 bytes before this were left out)\nthird\n"


def test_logs_go_to_their_place_and_the_oldest_go_away(tmp_path: pathlib.Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    (tmp_path / "a").write_bytes(b"hello\n")
    (tmp_path / "b").write_bytes(b"")
    for attempt in range(1, 24):
        ship(store, attempt, {0: tmp_path / "a", 1: tmp_path / "b", 2: tmp_path / "never-written"})
    prune_logs(store)
    kept = {parse_log_key(info.key) for info in store.list()}
    assert kept == {(attempt, rank) for attempt in range(4, 24) for rank in (0, 1)}
    assert store.get(log_key(23, 0))[0] == b"hello\n"
    with pytest.raises(ObjectMissing):
        store.get(log_key(3, 0))


def test_garbage_collection_leaves_logs_alone(tmp_path: pathlib.Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    (tmp_path / "a").write_bytes(b"hello\n")
    ship(store, 1, {0: tmp_path / "a"})
    store.put("1-abc-5/rank-00000.safetensors", b"left behind")
    later = max(info.modified for info in store.list()) + 10**6
    assert garbage(store.list(), None, [], later, 1.0) == ["1-abc-5/rank-00000.safetensors"]


def test_a_store_that_refuses_is_told_with_its_reason(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.nice", lambda _: 0)
    (tmp_path / "a").write_bytes(b"hello\n")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(f"file://{tmp_path}/file/store", 1, [[0, str(tmp_path / "a")]], True)
    assert ended.value.code == 1
    assert "file" in capsys.readouterr().err
