"""Ranks' lines among a Pod's, which Pods to read, what is said where they cannot be, and several sources read as one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpoint.store import open_store
from outlast.errors import OutlastError, RequestError
from trainctl.cluster.refusals import Asked, Forbidden, Unauthorized, Unreadable, refusal
from trainctl.cluster.resources import JobRef
from trainctl.cluster.where import Where
from trainctl.logs import _check_rank, log_request, show_logs
from trainctl.merging import Ended, Merged
from trainctl.podlogs import Following, container_of
from trainctl.ranklines import (
    RankLine,
    Wanted,
    by_attempt,
    instant,
    parse_line,
    pods_of_ranks,
    shown,
    split_time,
)

T = "2026-11-27T12:00:00.5Z"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"{T} [rank 3 attempt 12] step 7", RankLine(T, 3, 12, "step 7")),
        (f"{T} [rank 3 attempt 12]   indented", RankLine(T, 3, 12, "  indented")),
        (f"{T} [rank 3 attempt 12] ", RankLine(T, 3, 12, "")),
        (f"{T} [rank 0 attempt 1] [rank 9 attempt 9] quoted", RankLine(T, 0, 1, "[rank 9 attempt 9] quoted")),
        ("[rank 0 attempt 1] no time", RankLine("", 0, 1, "no time")),
        (f"{T} time=x event=own", None),
        (f"{T} said [rank 0 attempt 1] x", None),
        ("", None),
    ],
)
def test_a_ranks_line_is_known_by_its_mark(text: str, found: RankLine | None) -> None:
    assert parse_line(text) == found


def test_times_are_split_off() -> None:
    assert split_time(f"{T} a b") == (T, "a b")
    assert split_time("2026-11-27T12:00:00.123+02:00 a") == ("2026-11-27T12:00:00.123+02:00", "a")
    assert split_time("a b") == ("", "a b")


def test_times_without_their_last_zeros_are_in_order() -> None:
    times = ["2026-11-27T12:00:00Z", "2026-11-27T12:00:00.5Z", "2026-11-27T12:00:00.51Z", "2026-11-27T12:00:01Z"]
    shuffled = [times[2], times[0], times[3], times[1]]
    assert sorted(shuffled, key=instant) == times
    assert sorted(times) != times, "as text they are not"


def test_times_of_several_zones_are_in_order() -> None:
    times = [
        "2026-11-27T12:00:00Z",
        "2026-11-27T21:00:00.123456788+09:00",
        "2026-11-27T07:00:00.123456789-05:00",
        "2026-11-28T01:45:01+13:45",
        "2026-11-27T12:00:02Z",
    ]
    shuffled = [times[3], times[1], times[4], times[2], times[0]]
    assert sorted(shuffled, key=instant) == times
    assert instant("2026-11-27T14:00:00.5+02:00") == instant("2026-11-27T12:00:00.50Z")
    assert instant("") < instant(times[0])
    assert instant("2026-99-99T12:00:00Z"), "what a rank wrote so is no time"


LINES = [
    RankLine("2026-11-27T12:00:03Z", 0, 2, "d"),
    RankLine("2026-11-27T12:00:01Z", 0, 1, "a"),
    RankLine("2026-11-27T12:00:02Z", 1, 1, "b"),
    RankLine("2026-11-27T12:00:02.5Z", 0, 1, "c"),
]


@pytest.mark.parametrize(
    ("wanted", "tail", "texts"),
    [
        (Wanted(0), None, {1: "ac", 2: "d"}),
        (Wanted(None), None, {1: "abc", 2: "d"}),
        (Wanted(None, least=2), None, {2: "d"}),
        (Wanted(0, attempt=1), 1, {1: "c"}),
        (Wanted(0), 0, {1: "", 2: ""}),
        (Wanted(7), None, {}),
    ],
)
def test_lines_are_sorted_by_attempt_and_time(wanted: Wanted, tail: int | None, texts: dict[int, str]) -> None:
    found = by_attempt(LINES, wanted, tail)
    assert {attempt: "".join(line.text for line in lines) for attempt, lines in found.items()} == texts


def test_a_line_is_shown_with_what_tells_it_apart() -> None:
    line = RankLine(T, 3, 2, "x")
    assert shown(line, marked=False, timestamps=False) == "x"
    assert shown(line, marked=True, timestamps=True) == f"{T} [rank 3 attempt 2] x"
    assert shown(RankLine("", 3, 2, "x"), marked=False, timestamps=True) == "x", "of the store's lines nobody knows"


PODS = ("a", "b", "c")
LIVE = {"nodes": {name: {"node": name, "seat": seat} for name, seat in (("a", 1), ("b", None), ("c", 0))}}


@pytest.mark.parametrize(
    ("live", "procs", "rank", "pods"),
    [
        (LIVE, 1, 0, ("c",)),
        (LIVE, 1, 1, ("a",)),
        (LIVE, 4, 3, ("c",)),
        (LIVE, 4, 4, ("a",)),
        (LIVE, 1, 2, PODS),
        (None, 1, 0, PODS),
        (LIVE, 1, None, PODS),
        ({"nodes": {"gone": {"node": "gone", "seat": 0}}}, 1, 0, PODS),
    ],
)
def test_a_rank_is_looked_for_where_its_seat_is(live: Any, procs: int, rank: int | None, pods: tuple[str, ...]) -> None:
    assert pods_of_ranks(PODS, live, procs, rank) == pods


def status(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"name": "outlast", "containerID": "c1", "restartCount": 2, "state": state, **more}]}


@pytest.mark.parametrize(
    ("about", "started", "running"),
    [
        (status({"running": {}}), True, True),
        (status({"terminated": {}}), True, False),
        (status({"waiting": {}}), False, False),
        ({}, False, False),
    ],
)
def test_the_training_container_is_the_one_that_is_called_so(about: Any, started: bool, running: bool) -> None:
    containers = [{"name": "sidecar"}, {"name": "outlast"}]
    found = container_of({"metadata": {"name": "p"}, "spec": {"containers": containers}, "status": about})
    assert (found.name, found.started, found.running) == ("outlast", started, running)
    assert container_of({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "x"}]}}).name == "x"


PLAIN = {
    "all_ranks": False,
    "head": False,
    "follow": False,
    "attempt": None,
    "previous": False,
    "tail": None,
    "since": None,
    "timestamps": False,
}


def test_without_a_rank_it_is_the_first() -> None:
    assert log_request(None, **PLAIN).rank == 0  # type: ignore[arg-type]
    assert log_request(None, **{**PLAIN, "all_ranks": True}).rank is None  # type: ignore[arg-type]
    assert log_request(2, **{**PLAIN, "since": "1m30s"}).since == {"sinceSeconds": 90}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rank", "given", "said"),
    [
        (1, {"all_ranks": True}, "RANK, --all-ranks and --head: give one of them"),
        (None, {"all_ranks": True, "head": True}, "give one of them"),
        (0, {"previous": True, "attempt": 3}, "--previous and --attempt: give one of them"),
        (0, {"previous": True, "follow": True}, "--previous and --follow"),
        (0, {"since": "yesterday"}, '--since: "yesterday" is no duration'),
    ],
)
def test_options_that_contradict_each_other(rank: int | None, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        log_request(rank, **{**PLAIN, **given})


@pytest.mark.parametrize("given", [{"attempt": 1}, {"previous": True}])
def test_an_attempt_that_is_over_may_have_had_more_ranks(given: dict[str, Any]) -> None:
    """The job was scaled down since."""
    small = {"spec": {"workers": {"replicas": 1, "procsPerWorker": 2}}}
    with pytest.raises(RequestError, match="there is no rank 2: the job has ranks 0 to 1"):
        _check_rank(small, log_request(2, **PLAIN))  # type: ignore[arg-type]
    _check_rank(small, log_request(2, **{**PLAIN, **given}))


# --- what a cluster's Pods say --------------------------------------------------------------------------------------


def pod(number: int, role: str = "node") -> dict[str, Any]:
    return {
        "metadata": {"name": f"j-{role}-{number}", "labels": {"outlast.dev/role": role}},
        "spec": {"containers": [{"name": "outlast"}]},
        "status": status({"running": {}}, restartCount=0),
    }


class _Cluster:
    """A job with three node Pods. ``output``: lines of Pods, or the status with which the API server refuses them."""

    context = namespace = "lab"

    def __init__(self, output: dict[str, list[str] | int], store: str = "") -> None:
        self._output, self._store = output, store
        self.asked: list[str] = []
        self.since: list[object] = []

    def __enter__(self) -> _Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def get(self, path: str, query: object = None, **_: object) -> dict[str, Any]:
        if path.endswith("/pods"):
            return {"items": [pod(0, "head"), *(pod(number) for number in range(3))], "metadata": {}}
        spec = {"workers": {"replicas": 3}, **({"checkpoint": {"url": self._store}} if self._store else {})}
        return {"metadata": {"name": "j", "namespace": "lab"}, "spec": spec, "status": {"attempt": 2}}

    def lines(self, path: str, query: Mapping[str, object], **_: object) -> list[str]:
        name = path.split("/")[-2]
        self.asked.append(name)
        self.since.append(query.get("sinceTime"))
        output = self._output.get(name, [])
        if isinstance(output, int):
            raise refusal(output, b"dial tcp 10.0.0.4:10250: i/o timeout", Asked("GET", path, "lab"))
        return output


def logs_of(cluster: _Cluster, monkeypatch: pytest.MonkeyPatch, rank: int | None = 0, **given: Any) -> None:
    """``trainctl logs``; the controller says that the rank is in j-node-1."""
    live = {"nodes": {"j-node-1": {"node": "j-node-1", "seat": 0}}}
    monkeypatch.setattr("trainctl.logs.Cluster", lambda where: cluster)
    monkeypatch.setattr("trainctl.logs.ask_status", lambda job, resource: (live, ""))
    show_logs(Where(), "j", log_request(rank, **{**PLAIN, **given}))


DEAD = "note: Pod j-node-1 cannot be read: "


@pytest.mark.parametrize("code", [500, 502, 503])
def test_a_pod_whose_kubelet_is_away_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    cluster = _Cluster({"j-node-0": [f"{T} [rank 0 attempt 1] one"], "j-node-1": code, "j-node-2": [f"{T} own"]})
    logs_of(cluster, monkeypatch)
    said = capsys.readouterr()
    assert said.out == "one\n"
    note, older = said.err.splitlines()
    assert note.startswith(DEAD)
    assert "i/o timeout" in note
    assert older == "note: the Pods that can be read have nothing of attempt 2; this is attempt 1"
    assert cluster.asked == ["j-node-1", "j-node-0", "j-node-2"], "it takes its time: it is asked once"


def test_what_a_pod_that_cannot_be_read_has_said_comes_from_the_store(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    open_store(f"file://{tmp_path}/lab/j").put("logs/attempt-2/rank-0.log", b"stored\n")
    logs_of(_Cluster({"j-node-1": 500}, f"file://{tmp_path}"), monkeypatch, attempt=2)
    said = capsys.readouterr()
    assert said.out == "stored\n"
    assert said.err.startswith(DEAD)
    assert said.err.endswith("logs/attempt-2: no Pod that can be read has these lines\n")
    with pytest.raises(OutlastError, match="not in the 3 node Pods there are, as far as they can be read, and the job"):
        logs_of(_Cluster({"j-node-1": 500}), monkeypatch, attempt=2)


@pytest.mark.parametrize(("code", "kind"), [(401, Unauthorized), (403, Forbidden)])
def test_what_holds_for_all_pods_is_told_as_an_error(
    monkeypatch: pytest.MonkeyPatch, code: int, kind: type[OutlastError]
) -> None:
    for given in ({}, {"head": True}):
        with pytest.raises(kind):
            logs_of(_Cluster({"j-node-1": code, "j-head-0": code}), monkeypatch, None, **given)


OLD, NEW = f"{T} [rank 0 attempt 1] old", f"{T} [rank 0 attempt 2] new"


@pytest.mark.parametrize(
    "output",
    [{}, {"j-node-0": [OLD]}, {"j-node-1": [OLD]}, {"j-node-2": 500}],
    ids=["quiet", "moved", "begun anew", "another cannot be read"],
)
@pytest.mark.parametrize("given", [{}, {"attempt": 2}])
def test_a_rank_that_was_quiet_so_long_is_no_reason_to_look_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    output: dict[str, list[str] | int],
    given: dict[str, Any],
) -> None:
    open_store(f"file://{tmp_path}/lab/j").put("logs/attempt-1/rank-0.log", b"stored\n")
    logs_of(_Cluster(output, f"file://{tmp_path}"), monkeypatch, since="10s", **given)
    said = capsys.readouterr()
    assert said.out == ""
    assert "attempt-1" not in said.err


def test_what_was_written_so_recently_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs_of(_Cluster({"j-node-1": [OLD, NEW]}), monkeypatch, since="10s")
    assert capsys.readouterr() == ("new\n", "")
    logs_of(_Cluster({"j-node-1": [OLD, NEW]}), monkeypatch, since="10s", previous=True)
    assert capsys.readouterr() == ("old\n", "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"since": "10s"}, "--since cannot be obeyed"),
        ({"timestamps": True}, "--timestamps cannot be obeyed"),
        ({"since": "10s", "timestamps": True}, "--since and --timestamps cannot be obeyed"),
    ],
)
def test_that_stored_lines_have_no_times_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, given: Any, said: str
) -> None:
    open_store(f"file://{tmp_path}/lab/j").put("logs/attempt-1/rank-0.log", b"stored\n")
    dead: dict[str, list[str] | int] = {f"j-node-{number}": 500 for number in range(3)}
    logs_of(_Cluster(dead, f"file://{tmp_path}"), monkeypatch, **given)
    told = capsys.readouterr()
    assert told.out == "stored\n"
    assert told.err.endswith(f"they are stored without their times, so that {said}\n")


def test_stored_lines_end_where_ranks_ended_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "10%\r20%\x0b\x1c\u2028rest\n\nlast\n"
    open_store(f"file://{tmp_path}/lab/j").put("logs/attempt-2/rank-0.log", text.encode())
    logs_of(_Cluster({}, f"file://{tmp_path}"), monkeypatch)
    assert capsys.readouterr().out == text
    logs_of(_Cluster({}, f"file://{tmp_path}"), monkeypatch, tail=1)
    assert capsys.readouterr().out == "last\n"


def test_a_head_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unreadable, match="Pod j-head-0 cannot be read"):
        logs_of(_Cluster({"j-head-0": 500}), monkeypatch, None, head=True)


class _Job(JobRef):
    """A job that neither ends nor changes."""

    def watch_itself(self) -> Iterator[dict[str, Any]]:
        yield self.get()
        threading.Event().wait()

    def watch_pods(self) -> Iterator[list[dict[str, Any]]]:
        yield self.pods()
        threading.Event().wait()


def following(cluster: _Cluster, seen: dict[str, str]) -> Iterator[tuple[str, str]]:
    job = _Job(cluster, "lab", "j")  # type: ignore[arg-type]
    return Following(job, "node", lambda pods, live: ["j-node-0"], seen, ask_controller=False).lines()


def test_what_is_followed_goes_on_from_the_last_second_in_utc() -> None:
    before, after = (f"2026-11-27T21:00:00.{fraction}+09:00" for fraction in ("123456789", "2"))
    cluster = _Cluster({"j-node-0": [f"{before} old", f"{after} new"]})
    assert next(following(cluster, {"j-node-0": before})) == ("j-node-0", f"{after} new")
    assert cluster.since == ["2026-11-27T12:00:00Z"]


@pytest.mark.timeout(30)
def test_following_ends_when_the_caller_may_not_read() -> None:
    with pytest.raises(Forbidden):
        next(following(_Cluster({"j-node-0": 403}), {}))


class _Restarting(_Cluster):
    """Its API server refuses every second stream, after the first."""

    def lines(self, path: str, query: Mapping[str, object], **more: object) -> list[str]:
        if len(self.asked) % 2:
            self.asked.append("refused")
            raise refusal(403, b"", Asked("GET", path, "lab"))
        return super().lines(path, query, **more)


@pytest.mark.timeout(30)
def test_a_stream_that_is_refused_by_a_starting_api_server_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainctl.podlogs.AGAIN_S", 0.01)
    cluster = _Restarting({"j-node-0": [f"{T} one"]})
    lines = following(cluster, {})
    assert next(lines) == ("j-node-0", f"{T} one")
    cluster._output["j-node-0"] = [f"{T} one", "2026-11-27T12:00:00.6Z two"]
    assert next(lines) == ("j-node-0", "2026-11-27T12:00:00.6Z two")
    assert "refused" in cluster.asked


# --- several sources as one -----------------------------------------------------------------------------------------


def test_sources_are_taken_in_the_order_of_arrival_and_tell_their_end() -> None:
    merged, gate = Merged(), threading.Event()

    def late() -> Iterator[int]:
        assert gate.wait(10)
        yield 2

    def broken() -> Iterator[int]:
        raise RequestError("no")
        yield 0

    merged.add("late", late())
    merged.add("early", iter([1]))
    assert merged.next(10) == ("early", 1)
    assert merged.next(10) == ("early", Ended())
    assert merged.next(0.01) is None
    assert merged.open == {"late"}
    gate.set()
    assert merged.next(10) == ("late", 2)
    assert merged.next(10) == ("late", Ended())
    merged.add("broken", broken())
    name, ended = merged.next(10) or ("", None)
    assert name == "broken"
    assert isinstance(ended, Ended)
    assert str(ended.error) == "no"
