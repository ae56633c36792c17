"""How jobs, nodes, events and descriptions look: golden text of values."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from trainctl.cluster.resources import JobRef
from trainctl.columns import facts, printable, section, table
from trainctl.describing import description, spec_facts
from trainctl.jobview import job_facts, job_table, node_table, pod_state, recovery_table, unseen, wall, why
from trainctl.lifecycle import what_goes
from trainctl.output import Form, dumped
from trainctl.showing import job_page
from trainctl.status import event_line
from trainctl.timeline import Entry, line, merged, of_controller, of_kubernetes, timeline
from trainctl.watching import Moment, PlainJobView, moments, page

NOW = wall("2026-11-27T12:00:00Z")

RUNNING: dict[str, Any] = {
    "metadata": {"name": "bytelm", "namespace": "team", "creationTimestamp": "2026-11-27T11:00:00Z", "generation": 1},
    "spec": {
        "entrypoint": ["python", "train.py", "--steps", "2000"],
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        "workers": {
            "replicas": 4,
            "minReplicas": 2,
            "spares": 1,
            "procsPerWorker": 8,
            "failureDomain": "topology.kubernetes.io/zone",
            "template": {"spec": {"containers": [{"name": "outlast", "image": "img:1"}]}},
        },
        "snapshot": {"everySteps": 10, "erasure": {"parity": 2, "groupSize": 4}},
        "checkpoint": {"url": "s3://bucket/p", "interval": "10m", "keepLast": 3},
        "recovery": {"maxRestarts": 20, "window": "1h"},
        "faults": {"allow": True},
        "activeDeadlineSeconds": 604800,
    },
    "status": {
        "phase": "Running",
        "observedGeneration": 1,
        "step": 120,
        "totalSteps": 2000,
        "attempt": 3,
        "restartCount": 2,
        "restarts": {"node-lost": 1, "rank-exit": 1},
        "workers": {"ready": 4, "wanted": 4, "spares": 1},
        "goodput": 0.9871,
        "snapshot": {"step": 118, "time": "2026-11-27T11:59:57Z"},
        "checkpoint": {"step": 100, "time": "2026-11-27T11:58:00Z", "url": "s3://bucket/p/team/bytelm"},
        "startTime": "2026-11-27T11:01:00Z",
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "reason": "Training",
                "message": "all ranks run",
                "lastTransitionTime": "2026-11-27T11:30:00Z",
            }
        ],
        "failures": [
            {
                "time": "2026-11-27T11:30:00Z",
                "cause": "node-lost",
                "message": "no heartbeat\nfor 1.5 s",
                "node": "bytelm-node-2",
                "step": 90,
            }
        ],
    },
}
FRESH: dict[str, Any] = {
    "metadata": {"name": "a", "namespace": "default", "creationTimestamp": "2026-11-27T11:59:58Z"},
    "spec": {"entrypoint": ["python", "a.py"]},
}
LIVE: dict[str, Any] = {
    "phase": "Running",
    "step": 125,
    "total": 2000,
    "attempt": 3,
    "metrics": {"loss": 1.25},
    "restarts": {"rank-exit": 2},
    "workers": {"wanted": 2},
    "nodes": {
        "bytelm-node-3": {"node": "bytelm-node-3", "seat": 1, "state": "active", "domain": "b", "keeper": "up"},
        "bytelm-node-1": {"node": "bytelm-node-1", "seat": 0, "state": "active", "domain": "a", "keeper": "down"},
        "bytelm-node-4": {"node": "bytelm-node-4", "seat": None, "state": "spare", "domain": None, "keeper": "up"},
        "bytelm-node-2": {"node": "bytelm-node-2", "seat": None, "state": "lost", "reason": "no heartbeat"},
    },
    "recoveries": [
        {
            "attempt": 3,
            "kind": "node-lost",
            "cause": "no heartbeat of bytelm-node-2",
            "total_s": 2.345,
            "lost_steps": 4,
            "restore_sources": {"local": 24, "decoded": 8},
        }
    ],
    "checkpoint": {"count": 5, "skipped": 1, "failed": 0, "bytes": 3 << 30, "last_error": "503"},
}


def pod(name: str, machine: str = "m1", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "spec": {"nodeName": machine, "containers": []},
        "status": {"phase": "Running", **status},
    }


def test_a_list_of_jobs() -> None:
    assert job_table([RUNNING, FRESH], NOW).splitlines() == [
        "NAME     PHASE     STEP       NODES    GOODPUT   RESTARTS   SNAPSHOT            CHECKPOINT            AGE",
        "a        Pending   -          0/1      -         0          -                   -                     2 s",
        "bytelm   Running   120/2000   4/4 +1   98.7%     2          step 118, 3 s ago   step 100, 2 min ago   60 min",
    ]
    wide = job_table([RUNNING], NOW, namespaces=True, wide=True).splitlines()
    assert wide[0].split()[0] == "NAMESPACE"
    assert wide[0].endswith("ATTEMPT   STARTED   ENDED   WHY   STORE")
    assert wide[1].endswith("3         59 min    -       -     s3://bucket/p/team/bytelm")


def test_the_facts_of_a_job_are_the_controllers_where_it_can_be_asked() -> None:
    assert facts(job_facts(RUNNING, LIVE, NOW)).splitlines() == [
        "job        team/bytelm",
        "phase      Running",
        "step       125/2000",
        "loss       1.2500",
        "nodes      2/2 active, 1 spare, 1 lost",
        "attempt    3",
        "goodput    98.7%",
        "restarts   1 x node-lost, 1 x rank-exit",
    ]
    assert facts(job_facts(RUNNING, None, NOW)).splitlines() == [
        "job          team/bytelm",
        "phase        Running",
        "step         120/2000",
        "nodes        4/4 +1",
        "attempt      3",
        "snapshot     step 118, 3 s ago",
        "checkpoint   step 100, 2 min ago",
        "goodput      98.7%",
        "restarts     1 x node-lost, 1 x rank-exit",
    ]


BETWEEN_HEADS: dict[str, Any] = {
    **RUNNING,
    "status": {
        "phase": "Recovering",
        "observedGeneration": 1,
        "step": 211,
        "totalSteps": 2000,
        "attempt": 7,
        "restarts": {"head-lost": 1, "node-lost": 2, "rank-exit": 3},
        "restartCount": 6,
        "goodput": 0.62,
        "controller": {"identity": "first"},
        "conditions": [{"type": "Recovering", "status": "True", "reason": "HeadLost", "message": "a new one starts"}],
    },
}


def facts_between_heads(**live: Any) -> dict[str, str]:
    return dict(job_facts(BETWEEN_HEADS, live, NOW))


def test_a_controller_that_has_just_taken_over_has_counted_nothing() -> None:
    new = {"phase": "Pending", "step": 0, "attempt": 0, "total": None, "restarts": {}, "goodput": {"ratio": 0.0}}
    assert facts_between_heads(controller="second", **new) == {
        "job": "team/bytelm",
        "phase": "Recovering",
        "why": "HeadLost: a new one starts",
        "step": "211/2000",
        "attempt": "7",
        "goodput": "62.0%",
        "restarts": "1 x head-lost, 2 x node-lost, 3 x rank-exit",
    }


def test_what_is_added_up_over_controllers_is_the_resources() -> None:
    live = {"phase": "Failed", "step": 230, "attempt": 8, "restarts": {"rank-exit": 1}, "goodput": {"ratio": 0.725}}
    rows = facts_between_heads(controller="second", **live)
    assert (rows["phase"], rows["why"]) == ("Recovering", "HeadLost: a new one starts"), "of one source"
    assert (rows["goodput"], rows["restarts"]) == ("62.0%", "1 x head-lost, 2 x node-lost, 3 x rank-exit")
    assert (rows["step"], rows["attempt"]) == ("230/2000", "8"), "newer than the resource's"


@pytest.mark.parametrize(
    ("live", "step", "attempt"),
    [
        ({"controller": "first", "step": 215, "attempt": 7}, "215/2000", "7"),
        ({"controller": "first", "step": 205, "attempt": 7}, "211/2000", "7"),
        ({"controller": "first", "step": 205, "attempt": 8}, "205/2000", "8"),
        ({"controller": "first", "step": 0, "attempt": 8}, "211/2000", "8"),
        ({"controller": "second", "step": 205, "attempt": 7}, "205/2000", "7"),
    ],
)
def test_a_controllers_progress_is_shown_unless_the_resource_has_more_of_it(
    live: dict[str, Any], step: str, attempt: str
) -> None:
    rows = facts_between_heads(**live)
    assert (rows["step"], rows["attempt"]) == (step, attempt)


def test_what_the_resource_does_not_know_yet_is_the_controllers() -> None:
    condition = {"type": "Ready", "status": "False", "reason": "WaitingForNodes"}
    resource = {**FRESH, "status": {"conditions": [condition]}}
    live = {"phase": "Failed", "goodput": {"ratio": 0.5}, "restarts": {"hang": 1}}
    rows = dict(job_facts(resource, live, NOW))
    assert (rows["phase"], rows["goodput"], rows["restarts"]) == ("Failed", "50.0%", "1 x hang")
    assert "why" not in rows, "the resource's reason is not that of the controller's phase"


# --- a specification that nobody looks at ---------------------------------------------------------------------------


def written(at: str, *fields: str, **more: str) -> dict[str, Any]:
    return {"manager": "m", "time": f"2026-11-27T11:59:{at}Z", "fieldsV1": {name: {} for name in fields}, **more}


def specified(generation: int, observed: int | None, *managed: dict[str, Any], **meta: Any) -> dict[str, Any]:
    about = {"name": "a", "creationTimestamp": "2026-11-27T11:59:00Z", "generation": generation, **meta}
    status = {} if observed is None else {"observedGeneration": observed}
    return {"metadata": {**about, "managedFields": list(managed)}, "spec": {}, "status": status}


@pytest.mark.parametrize(
    ("resource", "unseen_for"),
    [
        (FRESH, ""),
        (specified(1, None), "60 s"),
        (specified(1, 1), ""),
        (specified(1, None, written("55", "f:spec")), "60 s"),
        (specified(2, 1, written("00", "f:spec"), written("40", "f:spec")), "20 s"),
        (specified(2, None, written("40", "f:spec")), "20 s"),
        (specified(2, 1, written("40", "f:spec"), written("59", "f:status", subresource="status")), "20 s"),
        (specified(2, 1, written("40", "f:spec"), written("59", "f:metadata")), "20 s"),
        (specified(2, 1, written("55", "f:spec", subresource="scale")), ""),
        (specified(2, 1), "60 s"),
        (specified(2, 2, written("40", "f:spec")), ""),
        (specified(2, 1, written("40", "f:spec"), deletionTimestamp="2026-11-27T11:59:50Z"), ""),
    ],
)
def test_that_no_operator_looks_is_told_after_a_while(resource: dict[str, Any], unseen_for: str) -> None:
    told = unseen_for and (
        f"no operator has looked at it for {unseen_for}: does one run? "
        "(kubectl get pods -A -l app.kubernetes.io/name=outlast)"
    )
    assert unseen(resource, NOW) == told
    assert dict(job_facts(resource, None, NOW)).get("note", "") == told
    for text in (job_page(resource, None, "", [], NOW), description(resource, [], None, "", [], NOW)):
        assert ("no operator has looked at it" in text) == bool(told)


class _Quiet(JobRef):
    """A job of which nothing is heard after its first sight, but that it has no head Pod."""

    def watch_itself(self) -> Iterator[dict[str, Any]]:
        yield specified(1, None)
        threading.Event().wait()


@pytest.mark.timeout(30)
def test_a_job_that_nobody_looks_at_is_told_of_also_when_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainctl.watching.SAY_EVERY_S", 0.05)
    times = iter((NOW - 55, NOW))
    view = PlainJobView(lambda: next(times, NOW))
    for number, moment in enumerate(moments(_Quiet(None, "lab", "a"))):  # type: ignore[arg-type]
        view.show(moment)
        if number == 2:
            break
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert ("note" in first, "note no operator has looked at it for 60 s" in second) == (False, True)


def ended(phase: str) -> dict[str, Any]:
    condition = {"type": phase, "status": "True", "reason": "Why", "message": "so", "lastTransitionTime": ""}
    return {
        **RUNNING,
        "status": {**RUNNING["status"], "phase": phase, "conditions": [condition], "weightsDigest": "c0"},
    }


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_of_a_job_that_has_ended_the_resource_has_the_last_word(phase: str) -> None:
    rows = dict(job_facts(ended(phase), LIVE, NOW))
    assert (rows["phase"], rows["why"], rows["step"], rows["weights"]) == (phase, "Why: so", "120/2000", "c0")


@pytest.mark.parametrize(
    ("conditions", "told"),
    [
        ([], ""),
        ([("Ready", "True", "Training", "")], ""),
        ([("Ready", "False", "NoNodes", "3 of 4 are missing")], "NoNodes: 3 of 4 are missing"),
        ([("Ready", "False", "Suspended", ""), ("Suspended", "True", "Asked", "no store")], "Asked: no store"),
        ([("Recovering", "False", "Over", ""), ("Failed", "True", "TooManyRestarts", "")], "TooManyRestarts"),
    ],
)
def test_the_condition_that_matters_says_why(conditions: list[tuple[str, ...]], told: str) -> None:
    names = ("type", "status", "reason", "message")
    status = {"conditions": [dict(zip(names, condition, strict=True)) for condition in conditions]}
    assert why({**FRESH, "status": status}) == told


def test_nodes_with_seats_come_first_and_pods_that_are_gone_are_said() -> None:
    pods = [pod("bytelm-node-3", "m3"), pod("bytelm-node-1"), pod("bytelm-node-4"), pod("bytelm-node-5", "")]
    assert node_table(LIVE, pods).splitlines() == [
        "POD             SEAT   STATE                 POD PHASE   MACHINE   DOMAIN   KEEPER",
        "bytelm-node-1   0      active                Running     m1        a        down",
        "bytelm-node-3   1      active                Running     m3        b        up",
        "bytelm-node-2   -      lost (no heartbeat)   gone        -         -        -",
        "bytelm-node-4   -      spare                 Running     m1        -        up",
        "bytelm-node-5   -      -                     Running     -         -        -",
    ]
    assert node_table(None, []) == ""


@pytest.mark.parametrize(
    ("about", "told"),
    [
        (pod("x"), "Running"),
        ({**pod("x"), "metadata": {"name": "x", "deletionTimestamp": "2026-11-27T11:00:00Z"}}, "Terminating"),
        (pod("x", containerStatuses=[{"state": {"waiting": {"reason": "ErrImagePull"}}}]), "ErrImagePull"),
        (
            pod(
                "x",
                phase="Pending",
                conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}],
            ),
            "Unschedulable",
        ),
        (pod("x", phase="Failed", reason="Evicted"), "Evicted"),
        ({"metadata": {"name": "x"}}, "-"),
    ],
)
def test_a_pods_state_is_what_holds_it(about: dict[str, Any], told: str) -> None:
    assert pod_state(about) == told


def test_recoveries() -> None:
    assert recovery_table(LIVE).splitlines() == [
        "ATTEMPT   KIND        TOOK     LOST STEPS   STATE FROM            CAUSE",
        "3         node-lost   2.35 s   4            24 local, 8 decoded   no heartbeat of bytelm-node-2",
    ]
    assert recovery_table(None) == recovery_table({}) == ""


def kubernetes(reason: str, time: str, kind: str = "Pod", **more: Any) -> dict[str, Any]:
    about = {"kind": kind, "name": "bytelm-node-1" if kind == "Pod" else "bytelm"}
    return {"metadata": {}, "involvedObject": about, "reason": reason, "lastTimestamp": time, "message": "m", **more}


LOGGED = {"time": NOW - 30.5, "seq": 1, "kind": "fault", "attempt": 2, "text": "rank 1 was killed"}


def test_events_of_both_sources_are_in_one_order() -> None:
    events = [
        kubernetes("Started", "2026-11-27T11:59:40Z"),
        kubernetes("BackOff", "2026-11-27T11:59:20Z", type="Warning", count=3, message="two\nlines"),
        kubernetes("Restarted", "2026-11-27T11:59:50Z", kind="TrainingJob"),
    ]
    assert timeline(merged(events, [LOGGED])).splitlines() == [
        "TIME                   SOURCE       KIND        ABOUT           WHAT",
        "2026-11-27T11:59:20Z   kubernetes   BackOff     bytelm-node-1   ! two lines (x3)",
        "2026-11-27T11:59:29Z   controller   fault       attempt 2       rank 1 was killed",
        "2026-11-27T11:59:40Z   kubernetes   Started     bytelm-node-1   m",
        "2026-11-27T11:59:50Z   kubernetes   Restarted   job             m",
    ]
    assert timeline([]) == ""
    assert line(of_controller(LOGGED)) == "2026-11-27T11:59:29Z  controller  fault  attempt 2: rank 1 was killed"


@pytest.mark.parametrize(
    "times",
    [
        {"lastTimestamp": None, "eventTime": "2026-11-27T12:00:00.000000Z"},
        {"lastTimestamp": None, "metadata": {"creationTimestamp": "2026-11-27T12:00:00Z"}},
        {"series": {"lastObservedTime": "2026-11-27T12:00:00Z", "count": 1}},
    ],
)
def test_an_event_has_one_of_several_times(times: dict[str, Any]) -> None:
    assert of_kubernetes({**kubernetes("x", "2026-01-01T00:00:00Z"), **times}).time == NOW


CREATED = {"name": "bytelm", "uid": "this", "creationTimestamp": "2026-11-27T11:00:00Z"}
BEFORE, AFTER = "2026-11-27T10:59:59Z", "2026-11-27T11:00:00Z"


def about(kind: str, name: str, time: str, uid: str | None = None) -> dict[str, Any]:
    identity = {} if uid is None else {"uid": uid}
    return {"metadata": {}, "involvedObject": {"kind": kind, "name": name, **identity}, "lastTimestamp": time}


@pytest.mark.parametrize(
    ("event", "is_its"),
    [
        (about("TrainingJob", "bytelm", BEFORE, "this"), True),
        (about("TrainingJob", "bytelm", AFTER, "earlier"), False),
        (about("TrainingJob", "bytelm", AFTER), True),
        (about("TrainingJob", "bytelm", BEFORE), False),
        (about("TrainingJob", "other", AFTER), False),
        (about("Pod", "bytelm-node-1", AFTER, "pod"), True),
        (about("Pod", "bytelm-node-1", BEFORE, "pod"), False),
        (about("Pod", "bytelm-x-1", AFTER, "pod"), False),
        ({**about("Pod", "bytelm-head-0", BEFORE), "series": {"lastObservedTime": AFTER}}, True),
        ({**about("Pod", "bytelm-head-0", BEFORE), "lastTimestamp": None}, True),
    ],
)
def test_events_of_an_earlier_job_of_the_name_are_not_this_ones(event: dict[str, Any], is_its: bool) -> None:
    listed = {"TrainingJob": [], "Pod": [], event["involvedObject"]["kind"]: [event]}

    class Listing:
        def get(self, path: str, query: dict[str, Any], verb: str = "") -> dict[str, Any]:
            kind = query["fieldSelector"].partition(",")[0].rpartition("=")[2]
            return {"items": listed[kind]}

    job = JobRef(Listing(), "team", "bytelm")  # type: ignore[arg-type]
    assert job.is_about(event, {"metadata": CREATED}) == is_its
    assert job.events({"metadata": CREATED}) == ([event] if is_its else [])


def test_a_description_of_a_running_job() -> None:
    pods = [pod("bytelm-head-7"), pod("bytelm-node-1")]
    text = description(
        RUNNING, pods, LIVE, "", [Entry(NOW, "controller", "running", "attempt 3", "all ranks run")], NOW
    )
    assert text.split("\n\n")[:2] == [
        "Name        bytelm\nNamespace   team\nCreated     2026-11-27T11:00:00Z (60 min ago)",
        "Wanted\n"
        "  entrypoint       python train.py --steps 2000\n"
        "  environment      NCCL_DEBUG=WARN\n"
        "  image            img:1\n"
        "  nodes            4 of 8 ranks each, at least 2, 1 spare\n"
        "  ranks            32\n"
        "  failure domain   topology.kubernetes.io/zone\n"
        "  snapshots        every 10 steps, parity 2, groups of 4\n"
        "  checkpoints      s3://bucket/p, every 10m, the last 3 kept\n"
        "  restarts         at most 20 within 1h\n"
        "  deadline         604800 s\n"
        "  faults           allowed",
    ]
    titles = [part.split("\n")[0] for part in text.split("\n\n")[2:]]
    assert titles == ["Now", "Conditions", "Head", "Nodes", "Recoveries", "Failures", "Checkpoints", "Events"]
    for row in (
        "  Ready   True     Training   30 min   all ranks run",
        "  30 min ago   node-lost   bytelm-node-2   -      90     no heartbeat for 1.5 s",
        "  in this run    5 made, 1 skipped, 0 failed, 3.0 GiB sent",
        "  bytelm-head-7   -      -       Running     m1        -        -",
    ):
        assert row in text.split("\n")


def test_a_description_of_what_nobody_has_looked_at_yet() -> None:
    text = description(FRESH, [], None, "the job has no head Pod", [], NOW)
    assert [part.split("\n")[0] for part in text.split("\n\n")] == ["Name        a", "Wanted", "Now"]
    assert text.endswith("  (from the resource alone: the job has no head Pod)")
    assert ("checkpoints", "none: snapshots in memory alone") in spec_facts(FRESH["spec"])


def test_what_a_deletion_takes_along() -> None:
    assert dict(what_goes(RUNNING)) == {
        "goes": "its Pods (5 nodes and the head), Service, Secret, NetworkPolicy and disruption budget",
        "lost": "what it has done since its newest checkpoint (it is at step 120)",
        "stays": "its checkpoints and logs at s3://bucket/p/team/bytelm",
    }
    assert set(dict(what_goes(ended("Succeeded")))) == {"goes", "stays"}


@pytest.mark.parametrize(
    ("checkpoint", "lost"),
    [
        ({"url": "s3://bucket/p"}, "all that it has done: it has no checkpoint (it is at step 120)"),
        (None, "all that it has done: it has no checkpoint, for it has no store (it is at step 120)"),
    ],
)
def test_a_deletion_speaks_of_no_checkpoint_that_is_not_there(checkpoint: Any, lost: str) -> None:
    status = {name: value for name, value in RUNNING["status"].items() if name != "checkpoint"}
    resource = {**RUNNING, "spec": {**RUNNING["spec"], "checkpoint": checkpoint}, "status": status}
    assert dict(what_goes(resource))["lost"] == lost


def test_columns_are_as_wide_as_what_is_in_them() -> None:
    assert table(("A", "LONG"), [("1", ""), ("wider", "x")]) == "A       LONG\n1       -\nwider   x"
    assert facts([("a", "1\n2"), ("long", "")]) == "a      1\n       2\nlong   -"
    assert section("T", "") == ""
    assert section("T", "a\nb") == "T\n  a\n  b"


HOSTILE = "\x1b]0;title\x07\x1b[2Jone\r\ntwo\x9b\u202e\ud800"
SHOWN = r"\x1b]0;title\x07\x1b[2Jone two\x9b\u202e\ud800"


def test_a_terminal_does_not_obey_what_others_have_written() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("é 日本 👩\u200d🔬") == "é 日本 👩\u200d🔬"
    condition = {**dict.fromkeys(("type", "reason"), "Ready"), "status": "False", "message": HOSTILE}
    failure = {"cause": "rank-exit", "message": HOSTILE}
    told = {"conditions": [condition], "failures": [failure], "phase": "Pending"}
    resource = {"metadata": {"name": "x"}, "spec": {"entrypoint": ["python", HOSTILE]}, "status": told}
    event = of_controller({"time": 0.0, "kind": "failed", "text": HOSTILE})
    live = {"nodes": {"0": {"node": "x-node-0", "state": "lost", "reason": HOSTILE}}}
    texts = [
        description(resource, [], None, HOSTILE, [event], 0.0),
        job_page(resource, None, HOSTILE, [], 0.0),
        page(Moment(resource, None, HOSTILE), 0.0),
        node_table(live, []),
        line(event),
        event_line({"kind": "failed", "text": HOSTILE}),
    ]
    for text in texts:
        assert SHOWN in text
        assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_lines_of_a_job_that_is_watched_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    condition = {"type": "Ready", "status": "False", "reason": "NoNodes", "message": HOSTILE}
    resource = {"metadata": {"name": "x"}, "spec": {}, "status": {"conditions": [condition]}}
    PlainJobView().show(Moment(resource, None, HOSTILE))
    said = capsys.readouterr()
    assert SHOWN in said.out
    assert said.err == f"from the resource alone: {SHOWN}\n"


# --- YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["1e-3", "1e5", "1.e+5", ".5e3", "-1_0", "0o17", "0x_1F", "0b+1", "y", "N", "on", "null", "~", "5", "1:30", "<<"],
)
def test_text_that_kubernetes_would_take_for_something_else_is_quoted(text: str) -> None:
    shown = dumped({"list": [text], text: "key"}, Form.YAML)
    assert shown == f"list:\n- '{text}'\n'{text}': key"
    assert yaml.safe_load(shown) == {"list": [text], text: "key"}


@pytest.mark.parametrize("text", ["1.2.3", "16Gi", "10m", "e5", "yy", "-n", "--lr", "_1", "0xg", "img:1", "ö"])
def test_other_text_is_not(text: str) -> None:
    assert dumped({"a": text}, Form.YAML) == f"a: {text}"


def test_numbers_and_booleans_stay_what_they_are() -> None:
    value = {"b": [1, -2.5, 1e-05, 1e20, True, None], "a": {}}
    assert dumped(value, Form.YAML) == "b:\n- 1\n- -2.5\n- 1.0e-05\n- 1.0e+20\n- true\n- null\na: {}"
