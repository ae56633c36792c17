"""How jobs, nodes, events and descriptions look: golden text of values."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from trainctl.columns import facts, printable, section, table
from trainctl.describing import description, spec_facts
from trainctl.jobview import job_facts, job_table, node_table, pod_state, recovery_table, wall, why
from trainctl.lifecycle import what_goes
from trainctl.output import Form, dumped
from trainctl.showing import job_page
from trainctl.status import event_line
from trainctl.timeline import Entry, line, merged, of_controller, of_kubernetes, timeline
from trainctl.watching import Moment, PlainJobView, page

NOW = wall("2026-11-27T12:00:00Z")

RUNNING: dict[str, Any] = {
    "metadata": {"name": "bytelm", "namespace": "team", "creationTimestamp": "2026-11-27T11:00:00Z"},
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
        "restarts   2 x rank-exit",
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
