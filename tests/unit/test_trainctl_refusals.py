"""What is said when a cluster refuses, when there is none, and when a fault is none: one line, with what to do."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import urllib3

from outlast.errors import OutlastError, RequestError
from trainctl.breaking import check_allowed, check_form
from trainctl.cluster.connection import Lines
from trainctl.cluster.controller import ask_status
from trainctl.cluster.kubeconfig import find_cluster
from trainctl.cluster.refusals import (
    Absent,
    Asked,
    ClusterError,
    Conflict,
    ControllerAway,
    Forbidden,
    Gone,
    Invalid,
    NotInstalled,
    Unauthorized,
    Unreachable,
    Unwell,
    forward_refusal,
    port_error,
    refusal,
)
from trainctl.cluster.resources import PATIENCE_S, Away, JobRef, Note, follow, list_all
from trainctl.cluster.where import Where
from trainctl.completion import PATIENCE_S as COMPLETION_S
from trainctl.completion import complete_jobs, job_names
from trainctl.main import run

JOBS = "/apis/outlast.dev/v1alpha1/namespaces/team/trainingjobs"
PODS = "/api/v1/namespaces/team/pods"


def body(message: str, **details: Any) -> bytes:
    return json.dumps({"kind": "Status", "message": message, "details": details}).encode()


@pytest.mark.parametrize(
    ("status", "answer", "asked", "kind", "said"),
    [
        (401, body("Unauthorized"), ("GET", JOBS), Unauthorized, "log in again, or choose another context"),
        (
            403,
            body('pods "x" is forbidden: User "bob" cannot get resource "pods"'),
            ("GET", f"{PODS}/x/log"),
            Forbidden,
            'you may not get pods/log in namespace "team": User "bob" cannot get resource "pods": ask who runs',
        ),
        (
            403,
            body('User "bob" cannot list resource "trainingjobs" at the cluster scope'),
            ("GET", "/apis/outlast.dev/v1alpha1/trainingjobs", "list"),
            Forbidden,
            'you may not list trainingjobs.outlast.dev: User "bob" cannot list',
        ),
        (
            403,
            body('trainingjobs "x" is forbidden: exceeded quota: jobs'),
            ("POST", JOBS),
            Forbidden,
            'the cluster refuses to create trainingjobs.outlast.dev in namespace "team": trainingjobs "x" is forbidden: '
            "exceeded quota",
        ),
        (
            404,
            b"404 page not found\n",
            ("GET", JOBS),
            NotInstalled,
            "knows no TrainingJobs: install Outlast there first",
        ),
        (404, body("the server could not find the requested resource"), ("GET", JOBS), NotInstalled, "helm install"),
        (
            404,
            body("not found", name="x", kind="trainingjobs"),
            ("GET", f"{JOBS}/x"),
            Absent,
            'there is no TrainingJob "x" in namespace "team" (context "lab"): `trainctl status -A`',
        ),
        (404, body('pods "x" not found', name="x", kind="pods"), ("GET", f"{PODS}/x"), Absent, 'pods "x" not found'),
        (
            404,
            body('namespaces "t" not found', name="t", kind="namespaces"),
            ("POST", JOBS),
            Absent,
            'there is no namespace "t" in the cluster of context "lab": make it (kubectl create namespace t), or',
        ),
        (409, body("already exists"), ("POST", JOBS), Conflict, "already exists"),
        (410, body("too old"), ("GET", JOBS), Gone, "too old"),
        (422, body("spec.workers: minReplicas must be"), ("POST", JOBS), Invalid, "spec.workers: minReplicas must be"),
        (
            503,
            b"",
            ("GET", JOBS, "list"),
            Unwell,
            "answers 503 (no reason given) when asked to list trainingjobs",
        ),
        (429, body("Too many requests"), ("GET", JOBS, "watch"), Unwell, "answers 429 (Too many requests)"),
        (500, body("dial tcp: i/o timeout"), ("GET", f"{PODS}/x/log"), ClusterError, "answers 500 (dial tcp"),
        (500, body("a webhook failed"), ("POST", JOBS), ClusterError, "answers 500 (a webhook failed)"),
    ],
)
def test_refusals(status: int, answer: bytes, asked: Any, kind: type[OutlastError], said: str) -> None:
    method, path, *verb = asked
    error = refusal(status, answer, Asked(method, path, "lab", *verb))
    assert type(error) is kind
    assert said in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("status", "answer", "kind", "said"),
    [
        (500, body('pod not found ("x_team")'), ControllerAway, "port 1 of Pod x cannot be reached: the Pod has no"),
        (500, body("container x is not running"), ControllerAway, "the Pod has no container that runs now"),
        (500, body("dial tcp 10.0.0.1:10250: i/o timeout"), ClusterError, "answers 500 (dial tcp"),
        (404, body('pods "x" not found', name="x", kind="pods"), Absent, 'pods "x" not found'),
    ],
)
def test_a_pod_that_does_not_run_is_no_trouble_of_the_api_server(
    status: int, answer: bytes, kind: type[OutlastError], said: str
) -> None:
    asked = Asked("GET", f"{PODS}/x/portforward", "lab", "create")
    error = forward_refusal(status, answer, asked, "port 1 of Pod x")
    assert type(error) is kind
    assert said in str(error)


def test_a_port_that_nobody_listens_on_is_told_as_that() -> None:
    refused = b"error forwarding port 8470 to pod 5ab, uid : dial tcp4 127.0.0.1:8470: connect: Connection refused\n"
    said = "the head Pod x-head-0 runs, but its controller does not listen yet"
    assert str(port_error(refused, "port 8470 of Pod x-head-0", "x-head-0")) == said
    gone = b'sandbox container "5ab" is not running'
    assert "the Pod has no container that runs now" in str(port_error(gone, "port 1 of Pod x", "x"))
    assert str(port_error(b"broken pipe\n", "port 1 of Pod x", "x")) == "port 1 of Pod x: broken pipe"


class _Asked:
    """A cluster with one head Pod, or an answer for it; it forwards nothing."""

    namespace = context = "lab"

    def __init__(self, pod: dict[str, Any] | OutlastError) -> None:
        self._pod = pod
        self.asked: list[str] = []

    def get(self, path: str) -> dict[str, Any]:
        self.asked.append(path.rpartition("/")[2])
        if path.endswith("/x-outlast"):
            raise Unauthorized("the Pod may be asked, and so the token is looked for")
        if isinstance(self._pod, OutlastError):
            raise self._pod
        return self._pod


def head_pod(phase: str, **state: Any) -> dict[str, Any]:
    states = [{"name": "outlast", "state": state}] if state else []
    return {"metadata": {"name": "x-head-0"}, "status": {"phase": phase, "containerStatuses": states}}


def trouble(cluster: _Asked, phase: str, head: str | None = "x-head-0") -> str:
    job = JobRef(cluster, "lab", "x")  # type: ignore[arg-type]
    live, told = ask_status(job, {"metadata": {"name": "x"}, "status": {"phase": phase, "head": head}})
    assert live is None
    return told


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ("Succeeded", "the job has ended (Succeeded), and its controller with it: `trainctl logs x --head` shows what"),
        ("Failed", "the job has ended (Failed), and its controller with it: `trainctl logs x --head` shows what"),
        ("Suspended", "the job is suspended, and has no controller until it is resumed"),
    ],
)
@pytest.mark.parametrize("head", ["x-head-0", None])
def test_the_controller_of_a_job_that_is_over_is_not_asked(phase: str, said: str, head: str | None) -> None:
    cluster = _Asked(head_pod("Running", running={}))
    assert trouble(cluster, phase, head).startswith(said)
    assert cluster.asked == []


@pytest.mark.parametrize(
    ("pod", "said"),
    [
        (head_pod("Pending"), "the head Pod x-head-0 is still starting (Pending)"),
        (
            head_pod("Pending", waiting={"reason": "ContainerCreating"}),
            "the head Pod x-head-0 is still starting (ContainerCreating)",
        ),
        (
            head_pod("Running", waiting={"reason": "CrashLoopBackOff"}),
            "the head Pod x-head-0 has no container that runs (CrashLoopBackOff)",
        ),
        (head_pod("Failed", terminated={}), "the head Pod x-head-0 has ended (Failed)"),
        (Absent("no"), "the head Pod x-head-0 is gone, and another one not in its place yet"),
        (ClusterError("it is broken"), "it is broken"),
    ],
)
def test_a_head_that_does_not_run_is_not_asked(pod: Any, said: str) -> None:
    cluster = _Asked(pod)
    assert trouble(cluster, "Starting") == said
    assert cluster.asked == ["x-head-0"]


@pytest.mark.parametrize("pod", [head_pod("Running", running={}), head_pod("Running"), Forbidden("you may not look")])
def test_a_head_that_runs_or_may_not_be_looked_at_is_asked(pod: Any) -> None:
    cluster = _Asked(pod)
    assert "the token is looked for" in trouble(cluster, "Starting")
    assert cluster.asked == ["x-head-0", "x-outlast"]


def test_what_is_wrong_with_a_request_is_told_from_what_a_cluster_cannot() -> None:
    assert issubclass(Invalid, RequestError)
    assert issubclass(Conflict, RequestError)
    assert not issubclass(ClusterError, RequestError)


# --- kubeconfig -----------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "here",
    "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:6443"}}],
    "users": [{"name": "u", "user": {"token": "t"}}],
    "contexts": [
        {"name": "here", "context": {"cluster": "c", "user": "u"}},
        {"name": "team", "context": {"cluster": "c", "user": "u", "namespace": "team"}},
        {"name": "broken", "context": {"cluster": "none", "user": "u"}},
    ],
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(path: Path, text: str | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_the_namespace_is_the_contexts_unless_it_is_said(home: Path) -> None:
    write(home / ".kube" / "config", CONFIG)
    found = find_cluster(Where())
    assert (found.context, found.namespace, found.configuration.host) == ("here", "default", "https://127.0.0.1:6443")
    assert find_cluster(Where(context="team")).namespace == "team"
    assert find_cluster(Where(context="team", namespace="x")).namespace == "x"


def test_files_are_merged_and_the_persons_own_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(home / "a", {**CONFIG, "current-context": ""})
    second = write(home / "b", {"current-context": "team"})
    third = write(home / "c", {"current-context": "broken"})
    files = (first, home / "absent", second, third)
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, files)))
    assert find_cluster(Where()).context == "team", "of the first file that names one"
    assert find_cluster(Where(context="here")).context == "here"
    assert find_cluster(Where(kubeconfig=write(home / "d", CONFIG))).context == "here"


def test_files_that_are_empty_are_passed_over(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (write(home / "a", ""), write(home / "b", "# later\n"), write(home / "c", CONFIG))
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, files)))
    assert find_cluster(Where()).context == "here"


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        (None, Where(), "no kubeconfig was found: there is none at ~/.kube/config: get one"),
        (None, Where(kubeconfig=Path("/nowhere")), "--kubeconfig /nowhere: there is no such file"),
        ("", Where(), "this is no usable kubeconfig: it is empty"),
        ("a: [", Where(), "this is no usable kubeconfig: it is no YAML"),
        ("- a\n", Where(), "config: this is no usable kubeconfig: it holds no mapping"),
        ("hello\n", Where(), "config: this is no usable kubeconfig: it holds no mapping"),
        (
            {**CONFIG, "clusters": [{"name": "c", "cluster": {"server": "notaurl"}}]},
            Where(),
            'config: this is no usable kubeconfig: "notaurl" is no server of a cluster, as https://HOST:PORT is one',
        ),
        ({**CONFIG, "current-context": ""}, Where(), "no context is current: choose one with --context (here, team"),
        (CONFIG, Where(context="none"), "--context none: there is no such context in"),
        ({**CONFIG, "current-context": "gone"}, Where(), "current-context gone: there is no such context in"),
        (CONFIG, Where(context="broken"), "this is no usable kubeconfig"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_told(home: Path, text: Any, where: Where, said: str) -> None:
    if text is not None:
        write(home / ".kube" / "config", text)
    with pytest.raises(RequestError) as refused:
        find_cluster(where)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_of_several_kubeconfigs_the_wrong_one_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = (write(home / "a", CONFIG), write(home / "b", "a: ["))
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(map(str, files)))
    with pytest.raises(RequestError, match=f"^{files[1]}: this is no usable kubeconfig: it is no YAML"):
        find_cluster(Where())


@pytest.mark.parametrize("named", [None, "~", "~nobody-of-that-name"])
def test_a_user_whom_nobody_knows_has_no_home(home: Path, monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    def unknown(who: object) -> pwd.struct_passwd:
        raise KeyError(who)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    if named:
        monkeypatch.setenv("KUBECONFIG", f"{named}/config")
    with pytest.raises(RequestError, match=f"no kubeconfig was found: .*{named or '~'}/"):
        find_cluster(Where())


@pytest.mark.parametrize("name", ["..", "a?b", "a/b", "A", "a.b", "-a", "a-", "x" * 64])
def test_what_can_name_no_namespace_is_refused(home: Path, name: str) -> None:
    said = "is no name of a namespace: at most 63 of a-z"
    with pytest.raises(RequestError, match=said):
        Where(name)
    contexts = [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": name}}]
    with pytest.raises(RequestError, match=said):
        find_cluster(Where(kubeconfig=write(home / "config", {**CONFIG, "contexts": contexts})))


def plugin(command: str) -> dict[str, Any]:
    """A kubeconfig whose credentials a program says, on a port where nobody answers."""
    told = {"apiVersion": "client.authentication.k8s.io/v1", "command": command, "interactiveMode": "Never"}
    server = {"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}
    return {**CONFIG, "clusters": [server], "users": [{"name": "u", "user": {"exec": told}}]}


@pytest.mark.parametrize(
    ("command", "said"),
    [("nosuchexec", "nosuchexec: No such file or directory"), ("false", "exec: process returned 1")],
)
def test_an_exec_plugin_that_fails_is_one_error(home: Path, command: str, said: str) -> None:
    config = write(home / "config", plugin(command))
    command_line = [sys.executable, "-m", "trainctl", "status", "x", "--kubeconfig", str(config)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command_line, env=environment, text=True, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f'trainctl: {config}: the credentials of context "here" cannot be had from its exec plugin: {said}: mend or '
        "install it, or choose another context with --context"
    ]


def test_a_dry_run_asks_for_no_credentials(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(home / "config", plugin("nosuchexec"))
    (home / "train.py").write_text("")
    words = ["submit", str(home / "train.py"), "--name", "x", "--dry-run", "--context", "team"]
    assert trainctl(monkeypatch, *words, "--kubeconfig", str(config)) == 0
    assert "namespace: team" in capsys.readouterr().out


def trainctl(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs the command here; its exit status."""
    monkeypatch.setattr("sys.argv", ["trainctl", *words])
    with pytest.raises(SystemExit) as ended:
        run()
    return int(ended.value.code or 0)


def test_what_is_said_at_the_command_counts_more_than_before_it() -> None:
    assert Where("a", None, None).over(Where("b", "c", Path("d"))) == Where("a", "c", Path("d"))


def test_completion_is_silent_where_there_is_no_cluster(home: Path) -> None:
    class Line:
        params: dict[str, object] = {"namespace": "x", "kubeconfig": "/nowhere"}  # noqa: RUF012
        parent = None

    assert complete_jobs(Line(), [], "") == []  # type: ignore[arg-type]


def test_completion_gives_up_soon(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        server = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{mute.getsockname()[1]}"}}
        config = write(home / "config", {**CONFIG, "clusters": [server]})
        began = time.monotonic()
        with pytest.raises(Unreachable):
            job_names(Where(kubeconfig=config))
        assert time.monotonic() - began < 2 * COMPLETION_S


def test_a_stream_that_breaks_off_gives_what_had_come() -> None:
    class Response:
        closed = False

        def stream(self, **_: object) -> Any:
            yield b"one\ntw"
            yield "o\ndré\nrest".encode()
            raise urllib3.exceptions.ProtocolError("gone")

        def close(self) -> None:
            self.closed = True

    response = Response()
    assert list(Lines(response)) == ["one", "two", "dré", "rest"]  # type: ignore[arg-type]
    assert response.closed


def test_an_api_server_that_is_away_is_waited_for_and_then_given_up() -> None:
    now, pauses = [0.0], []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    away = Away(lambda: now[0], pause, Note(lambda: now[0]))

    def wait_forever() -> None:
        while True:
            away.wait_or_raise(Unreachable("away"))

    with pytest.raises(Unreachable):
        wait_forever()
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert 60 <= now[0] < 70
    away.over()
    away.wait_or_raise(Unreachable("again"))
    assert pauses[-1] == 0.5


def test_that_an_api_server_is_waited_for_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    note = Note(lambda: now[0])
    followers = [Away(lambda: now[0], lambda _: None, note) for _ in range(2)]
    for away in followers * 2:
        away.wait_or_raise(Unreachable("it is away"))
    said = capsys.readouterr().err
    assert said == "note: the API server is asked again, for 60 s at most: it is away\n"
    now[0] = PATIENCE_S + 1
    for away in followers:
        away.over()
        away.wait_or_raise(Unreachable("it is away"))
    assert capsys.readouterr().err == said


Answer = OutlastError | list[dict[str, Any]]


class _Server:
    """Answers with what it is told to, one after the other: a list's items, a watch's lines, or a refusal."""

    def __init__(self, *answers: Answer, has_answered: bool = False) -> None:
        self._answers, self.has_answered = iter(answers), has_answered
        self.asked: list[str] = []

    def get(self, path: str, query: object = None, *, verb: str = "") -> dict[str, Any]:
        return {"items": self._next(verb), "metadata": {"resourceVersion": "1"}}

    def lines(self, path: str, query: object, *, verb: str, quiet_s: float) -> list[str]:
        return [json.dumps(line) for line in self._next(verb)]

    def _next(self, verb: str) -> list[dict[str, Any]]:
        self.asked.append(verb)
        answer = next(self._answers)
        if isinstance(answer, OutlastError):
            raise answer
        return answer


def item(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": name, "resourceVersion": "2"}}


def ill(status: int, verb: str) -> OutlastError:
    return refusal(status, b"etcdserver: leader changed", Asked("GET", JOBS, "lab", verb))


def watch_error(code: int) -> list[dict[str, Any]]:
    return [{"type": "ERROR", "object": {"code": code, "message": f"it was {code}"}}]


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was paused; the clock is moved on by it, and by nothing else."""
    pauses: list[float] = []

    def away() -> Away:
        return Away(lambda: sum(pauses), pauses.append, Note(lambda: sum(pauses)))

    monkeypatch.setattr("trainctl.cluster.resources.Away", away)
    return pauses


def test_an_api_server_that_is_unwell_is_asked_again(slept: list[float]) -> None:
    added = {"type": "ADDED", "object": item("b")}
    server = _Server(
        [item("a")],
        watch_error(500),
        ill(502, "list"),
        [item("a")],
        ill(429, "watch"),
        [item("a")],
        [added],
        watch_error(504),
        [item("b")],
    )
    following = follow(server, JOBS)  # type: ignore[arg-type]
    assert [sorted(next(following)) for _ in range(5)] == [["a"], ["a"], ["a"], ["a", "b"], ["b"]]
    assert slept == [0.5, 1.0, 2.0, 0.5], "a list alone does not tell that it is well"


def test_what_the_api_server_will_not_do_ends_a_watch(slept: list[float]) -> None:
    following = follow(_Server([item("a")], watch_error(403)), JOBS)  # type: ignore[arg-type]
    next(following)
    with pytest.raises(ClusterError, match="it was 403"):
        next(following)
    assert slept == []


@pytest.mark.parametrize("lists", [True, False])
def test_an_api_server_that_stays_unwell_is_given_up(slept: list[float], lists: bool) -> None:
    begun: list[Answer] = [[item("a")], watch_error(500)]
    answers: list[Answer] = begun if lists else [ill(500, "list")]
    following = follow(_Server(*begun, *answers * 100), JOBS)  # type: ignore[arg-type]
    with pytest.raises(Unwell):
        list(following)
    assert PATIENCE_S < sum(slept) < PATIENCE_S + 10


def test_an_api_server_that_has_never_answered_is_not_waited_for(slept: list[float]) -> None:
    with pytest.raises(Unreachable):
        list(follow(_Server(Unreachable("connection refused")), JOBS))  # type: ignore[arg-type]
    assert slept == []


def test_an_api_server_that_has_answered_something_else_is_waited_for(slept: list[float]) -> None:
    """As one that has just taken a deletion, which is then waited for."""
    away = Unreachable("connection refused")
    assert list(next(follow(_Server(away, [item("a")], has_answered=True), JOBS))) == ["a"]  # type: ignore[arg-type]
    assert slept == [0.5]
    with pytest.raises(Forbidden):
        list(follow(_Server(ill(403, "list"), has_answered=True), JOBS))  # type: ignore[arg-type]


def test_an_api_server_that_answers_is_waited_for_from_the_first_list_on(slept: list[float]) -> None:
    following = follow(_Server(ill(503, "list"), [item("a")]), JOBS)  # type: ignore[arg-type]
    assert list(next(following)) == ["a"]
    assert slept


ADDED = {"type": "ADDED", "object": item("b")}
REFUSALS = [ill(403, "list"), ill(401, "list"), refusal(404, b"404 page not found", Asked("GET", JOBS, "lab", "list"))]
"""What a starting API server answers until it has read who may do what, and which definitions there are."""


def test_an_api_server_that_starts_anew_is_waited_for_though_it_refuses(slept: list[float]) -> None:
    watched = [ADDED], Unreachable("connection refused")
    server = _Server([item("a")], *watched, *REFUSALS, [item("b")], ill(403, "watch"), [item("b")], [ADDED])
    following = follow(server, JOBS)  # type: ignore[arg-type]
    assert [sorted(next(following)) for _ in range(5)] == [["a"], ["a", "b"], ["b"], ["b"], ["b"]]
    assert slept == [0.5, 1.0, 2.0, 4.0, 4.0]


@pytest.mark.parametrize("refused", REFUSALS)
def test_what_is_refused_for_good_is_told_in_the_end(slept: list[float], refused: OutlastError) -> None:
    with pytest.raises(type(refused)):
        list(follow(_Server([item("a")], [ADDED], *[refused] * 100), JOBS))  # type: ignore[arg-type]
    assert PATIENCE_S < sum(slept) < PATIENCE_S + 10


@pytest.mark.parametrize("refused", REFUSALS)
@pytest.mark.parametrize("listed", [[], [[item("a")]]])
def test_what_was_never_allowed_is_told_at_once(
    slept: list[float], listed: list[Answer], refused: OutlastError
) -> None:
    with pytest.raises(type(refused)):
        list(follow(_Server(*listed, refused), JOBS))  # type: ignore[arg-type]
    assert slept == []


def test_a_watch_that_ends_at_once_is_not_asked_for_at_once(slept: list[float]) -> None:
    server = _Server([item("a")], [], [], [], [ADDED], [], ill(403, "watch"))
    following = follow(server, JOBS)  # type: ignore[arg-type]
    assert [sorted(next(following)) for _ in range(2)] == [["a"], ["a", "b"]]
    assert slept == [0.5, 1.0, 2.0]
    assert server.asked == ["list", "watch", "watch", "watch", "watch"]


@pytest.mark.parametrize("words", [["status", "x", "--watch"], ["status", "--watch"]])
def test_watching_a_cluster_that_is_away_fails_at_once(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    slept: list[float],
    words: list[str],
) -> None:
    server = {"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}
    config = write(home / "config", {**CONFIG, "clusters": [server]})
    assert trainctl(monkeypatch, *words, "--kubeconfig", str(config)) == 1
    assert "does not answer: Connection refused" in capsys.readouterr().err
    assert slept == []


def test_what_is_asked_once_tells_at_once_that_the_api_server_is_unwell(slept: list[float]) -> None:
    server = _Server(ill(500, "list"))
    with pytest.raises(ClusterError, match="etcdserver: leader changed"):
        list_all(server, JOBS)  # type: ignore[arg-type]
    assert (server.asked, slept) == (["list"], [])


# --- faults ---------------------------------------------------------------------------------------------------------


def job(allow: bool = True, phase: str = "Running") -> dict[str, Any]:
    return {"metadata": {"name": "x"}, "spec": {"faults": {"allow": allow}}, "status": {"phase": phase}}


def test_faults_are_for_jobs_that_allow_them_and_run() -> None:
    check_allowed(job())
    with pytest.raises(RequestError, match=r"does not allow faults .* set it to true before the job starts"):
        check_allowed(job(allow=False))
    with pytest.raises(RequestError, match=r"has ended \(Failed\): there is nothing to break"):
        check_allowed(job(phase="Failed"))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("foo", "the fault foo: unknown kind foo: a running job can be asked for agent-crash,"),
        ("node-join", "unknown kind node-join: a running job can be asked for"),
        ("", "the fault (none): it is not KIND:TARGET"),
        ("rank-crash", "rank-crash needs a rank: rank-crash:0"),
        ("rank-crash@3:1", "it is not KIND:TARGET, such as rank-crash:1"),
        ("head-loss:1", "head-loss takes no target"),
        ("pod-delete", "pod-delete needs a seat: pod-delete:0"),
        ("corrupt:1/foot", "unknown part foot"),
    ],
)
def test_what_is_no_fault_is_told_before_a_cluster_is_looked_for(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, said: str
) -> None:
    assert trainctl(monkeypatch, "fault", fault, "x") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["rank-crash:1", "corrupt:0/header", "controller-crash", "head-loss", "pod-delete:2"])
def test_faults_of_a_running_job_pass(fault: str) -> None:
    check_form(fault)


# --- quick ----------------------------------------------------------------------------------------------------------


def test_help_and_dry_runs_without_a_cluster(tmp_path: Path) -> None:
    """Help loads nothing of Kubernetes, and a dry run here needs no cluster."""
    code = "import sys, trainctl.main; print([n for n in ('kubernetes', 'yaml', 'pydantic') if n in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path), "KUBECONFIG": ""}
    run = {"env": environment, "text": True, "capture_output": True, "timeout": 60, "check": True, "cwd": tmp_path}
    assert subprocess.run([sys.executable, "-c", code], **run).stdout == "[]\n"  # type: ignore[call-overload]
    (tmp_path / "train.py").write_text("")
    command = [sys.executable, "-m", "trainctl", "submit", "train.py", "--name", "x", "--dry-run", "--", "--dry-run"]
    shown = subprocess.run(command, **run).stdout  # type: ignore[call-overload]
    assert "namespace: default" in shown
    assert "- --dry-run" in shown, "what comes after -- is the script's"
