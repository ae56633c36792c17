"""``trainctl suspend``, ``resume`` and ``delete`` against a cluster that plays one job."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import yaml

from outlast.errors import RequestError
from trainctl.cluster.refusals import ClusterError
from trainctl.cluster.where import Where
from trainctl.lifecycle import delete, scale, set_suspend
from trainctl.output import Form

pytestmark = pytest.mark.timeout(30)


class _Cluster:
    """A job whose status becomes each of ``statuses``, one after the other, once it is watched."""

    context = namespace = "lab"

    def __init__(self, suspend: bool, before: Mapping[str, Any], *statuses: Mapping[str, Any]) -> None:
        self.job: dict[str, Any] = {
            "metadata": {"name": "j", "uid": "u", "generation": 4, "resourceVersion": "1"},
            "spec": {"suspend": suspend, "checkpoint": {"url": "s3://bucket/p"}},
            "status": before,
        }
        self._statuses = statuses
        self.deleted: list[str] = []
        self.changed: list[Mapping[str, Any]] = []

    def __enter__(self) -> _Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def get(self, path: str, query: object = None, **_: object) -> dict[str, Any]:
        job = deepcopy(self.job)
        return job if path.endswith("/j") else {"items": [job], "metadata": {"resourceVersion": "1"}}

    def merge(self, path: str, change: Mapping[str, Any], query: object = None) -> dict[str, Any]:
        self.changed.append(change)
        self.job["spec"] |= change["spec"]
        self.job["metadata"]["generation"] += 1
        return deepcopy(self.job)

    def delete(self, path: str, options: object = None) -> dict[str, Any]:
        self.deleted.append(path.rpartition("/")[2])
        return {}

    def lines(self, path: str, query: object = None, **_: object) -> Iterator[str]:
        for status in self._statuses:
            self.job["status"] = status
            yield json.dumps({"type": "MODIFIED", "object": self.job})
        threading.Event().wait()


def status(phase: str, generation: int, step: int = 0) -> dict[str, Any]:
    return {"phase": phase, "observedGeneration": generation, "step": step}


def suspend(
    cluster: _Cluster, monkeypatch: pytest.MonkeyPatch, wanted: bool, form: Form | None = None, wait_s: float = 20.0
) -> None:
    monkeypatch.setattr("trainctl.lifecycle.Cluster", lambda where: cluster)
    set_suspend(Where(), "j", wanted, wait_s=wait_s, form=form)


@pytest.mark.parametrize(
    ("wanted", "phase", "other"), [(True, "Suspended", "Running"), (False, "Running", "Suspended")]
)
def test_a_status_from_before_the_change_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wanted: bool, phase: str, other: str
) -> None:
    """The job was just told the contrary, and its status still says what is asked for now."""
    stale, fresh = status(phase, 4, 1), status(phase, 5, 3)
    cluster = _Cluster(not wanted, stale, status(other, 4, 2), stale, fresh)
    suspend(cluster, monkeypatch, wanted, Form.JSON)
    assert json.loads(capsys.readouterr().out)["status"] == fresh


@pytest.mark.parametrize("wanted", [True, False])
def test_a_status_that_nobody_renews_is_not_waited_for_forever(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    phase = "Suspended" if wanted else "Running"
    with pytest.raises(ClusterError, match="is not seen to be"):
        suspend(_Cluster(not wanted, status(phase, 4)), monkeypatch, wanted, wait_s=0.3)


def test_waiting_in_vain_tells_that_no_operator_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _Cluster(False, {})
    cluster.job["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    with pytest.raises(ClusterError, match=r"it is Pending: no operator has looked at it for .*: does one run\?"):
        suspend(cluster, monkeypatch, True, wait_s=0.3)


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ((4, None, None), False),
        ((4, 2, 0), False),
        ((None, None, 0), False),
        ((5, None, None), True),
        ((4, 3, None), True),
        ((None, None, 1), True),
    ],
)
def test_scaling_to_what_there_is_changes_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: tuple[int | None, int | None, int | None],
    changes: bool,
) -> None:
    cluster = _Cluster(False, status("Running", 4))
    cluster.job["spec"]["workers"] = {"replicas": 4, "minReplicas": 2}
    monkeypatch.setattr("trainctl.lifecycle.Cluster", lambda where: cluster)
    scale(Where(), "j", *given, form=None)
    already = "trainingjob.outlast.dev/j has 4 nodes, at least 2 already\n"
    assert (bool(cluster.changed), capsys.readouterr().out != already) == (changes, changes)


def test_a_job_that_has_ended_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _Cluster(False, status("Running", 4), status("Succeeded", 4))
    with pytest.raises(ClusterError, match=r"has ended \(Succeeded\): it is not suspended"):
        suspend(cluster, monkeypatch, True)


@pytest.mark.parametrize("already", [True, False])
@pytest.mark.parametrize("form", list(Form))
def test_waiting_ends_with_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: Form, already: bool
) -> None:
    cluster = _Cluster(already, status("Running", 4), status("Suspended", 5, 7))
    if already:
        cluster = _Cluster(already, status("Suspended", 4, 7))
    suspend(cluster, monkeypatch, True, form)
    out = capsys.readouterr().out
    match form:
        case Form.JSON:
            assert json.loads(out)["status"]["step"] == 7
        case Form.YAML:
            assert [job["status"]["step"] for job in yaml.safe_load_all(out)] == [7]
        case Form.NAME:
            assert out == "trainingjob.outlast.dev/j\n"
        case Form.WIDE:
            assert out.splitlines()[-1] == "trainingjob.outlast.dev/j is Suspended"


@pytest.mark.parametrize("form", [Form.JSON, Form.YAML, Form.WIDE])
def test_a_deletion_has_no_object_to_write(monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    with pytest.raises(RequestError, match=f"delete -o {form}: write name or nothing"):
        delete(Where(), ["j"], wait_s=None, form=form)


def test_a_name_that_is_given_twice_is_deleted_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = _Cluster(False, status("Running", 4))
    monkeypatch.setattr("trainctl.lifecycle.Cluster", lambda where: cluster)
    delete(Where(), ["j", "j"], wait_s=None, form=Form.NAME)
    assert (cluster.deleted, capsys.readouterr().out) == (["j"], "trainingjob.outlast.dev/j\n")
