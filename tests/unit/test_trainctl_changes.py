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
from trainctl.lifecycle import delete, set_suspend
from trainctl.output import Form

pytestmark = pytest.mark.timeout(30)


class _Cluster:
    """A job whose status becomes each of ``statuses``, one after the other, once it is watched."""

    context = namespace = "lab"

    def __init__(self, suspend: bool, before: Mapping[str, Any], *statuses: Mapping[str, Any]) -> None:
        self._job: dict[str, Any] = {
            "metadata": {"name": "j", "uid": "u", "generation": 4, "resourceVersion": "1"},
            "spec": {"suspend": suspend, "checkpoint": {"url": "s3://bucket/p"}},
            "status": before,
        }
        self._statuses = statuses
        self.deleted: list[str] = []

    def __enter__(self) -> _Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def get(self, path: str, query: object = None, **_: object) -> dict[str, Any]:
        job = deepcopy(self._job)
        return job if path.endswith("/j") else {"items": [job], "metadata": {"resourceVersion": "1"}}

    def merge(self, path: str, change: Mapping[str, Any], query: object = None) -> dict[str, Any]:
        self._job["spec"] |= change["spec"]
        self._job["metadata"]["generation"] += 1
        return deepcopy(self._job)

    def delete(self, path: str, options: object = None) -> dict[str, Any]:
        self.deleted.append(path.rpartition("/")[2])
        return {}

    def lines(self, path: str, query: object = None, **_: object) -> Iterator[str]:
        for status in self._statuses:
            self._job["status"] = status
            yield json.dumps({"type": "MODIFIED", "object": self._job})
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
