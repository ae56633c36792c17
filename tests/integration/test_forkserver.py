"""The forkserver with real processes: what children are, how their ends are told, who dies with whom."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from outlast.agent.forkclient import Exit, ForkClient, launch
from outlast.agent.forkprotocol import ServerSetup, Spawn, program
from outlast.agent.isolation import Isolate, may_isolate
from outlast.agent.pidfiles import node_pids, signal_node
from outlast.errors import RequestError


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def eventually(check: Callable[[], Any], seconds: float = 5.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return found


@dataclass
class Bench:
    """A folder, and a client of a server in it."""

    folder: Path
    socket: str
    client: ForkClient
    exits: queue.Queue[Exit] = field(default_factory=queue.Queue)

    def script(self, text: str, *args: str, **changes: Any) -> Spawn:
        path = self.folder / f"script{len(list(self.folder.glob('script*')))}.py"
        path.write_text(text)
        env = {"PATH": os.environ["PATH"], **changes.pop("env", {})}
        out = str(self.folder / "out.log")
        spawn = Spawn(id=path.stem, kind="script", argv=(str(path), *args), env=env, cwd=str(self.folder))
        return replace(spawn, stdout=out, stderr=out, **changes)

    def out(self) -> str:
        path = self.folder / "out.log"
        return path.read_text() if path.exists() else ""

    def run(self, spawn: Spawn) -> tuple[Exit, str]:
        self.client.spawn(spawn)
        return self.exits.get(timeout=20), self.out()


def connect(path: str, exits: queue.Queue[Exit]) -> ForkClient:
    return ForkClient(path, exits.put)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    with tempfile.TemporaryDirectory(prefix="ol-") as name:
        folder = Path(name)
        process = launch(f"{name}/s.sock", log=folder / "server.log", preload=("json", "numpy", "no_such_module"))
        yield folder, process
        process.terminate()
        assert process.wait(10) == 0
        assert not (folder / "s.sock").exists()


@pytest.fixture
def bench(server: tuple[Path, subprocess.Popen[bytes]]) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="ol-") as name:
        exits: queue.Queue[Exit] = queue.Queue()
        client = connect(str(server[0] / "s.sock"), exits)
        yield Bench(Path(name), str(server[0] / "s.sock"), client, exits)
        client.close()
        with ForkClientClosing(str(server[0] / "s.sock")) as other:
            eventually(lambda: not other.state().children)


class ForkClientClosing:
    def __init__(self, path: str) -> None:
        self.client = ForkClient(path)

    def __enter__(self) -> ForkClient:
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()


def test_a_server_without_descriptors_goes_on_and_takes_clients_later(
    server: tuple[Path, subprocess.Popen[bytes]], bench: Bench
) -> None:
    pid, log = server[1].pid, server[0] / "server.log"
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    open_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files + 1, limits[1]))
    with contextlib.ExitStack() as clients:
        try:
            others = [clients.enter_context(ForkClientClosing(bench.socket)) for _ in range(4)]
            eventually(lambda: "accepts no connections for now" in log.read_text())
            with pytest.raises(RequestError, match="no child"):
                bench.client.kill("nobody", signal.SIGTERM)
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert [other.state().pid for other in others] == [pid] * 4
    assert log.read_text().count("accepts no connections for now") == 1


@pytest.mark.parametrize(
    ("command", "kind", "argv"),
    [
        (["python", "train.py", "-m", "x"], "script", ("train.py", "-m", "x")),
        (["python3", "-u", "-m", "pkg.mod", "a"], "module", ("pkg.mod", "a")),
        ([sys.executable, "train.py"], "script", ("train.py",)),
        (["python", "-O", "train.py"], "exec", ("python", "-O", "train.py")),
        (["python", "-c", "pass"], "exec", ("python", "-c", "pass")),
        (["/elsewhere/bin/python", "train.py"], "exec", ("/elsewhere/bin/python", "train.py")),
        (["bash", "run.sh"], "exec", ("bash", "run.sh")),
    ],
)
def test_what_a_command_becomes(command: list[str], kind: str, argv: tuple[str, ...]) -> None:
    assert program(command) == (kind, argv)


def test_a_script_sees_what_python_would_give_it(bench: Bench) -> None:
    (bench.folder / "sibling.py").write_text("VALUE = 7\n")
    text = """
import json, os, sys, sibling
session = [os.getpgrp() == os.getpid(), os.getsid(0) == os.getpid()]
modules = ["numpy" in sys.modules, sys.modules["__main__"].__dict__ is globals()]
told = [__name__, sys.argv[1:], sibling.VALUE, os.getcwd(), dict(os.environ), __file__, session, modules]
print(json.dumps([*told, sorted(os.listdir("/proc/self/fd"))]))
"""
    spawn = bench.script(text, "a", "--b", env={"KEY": "value"})
    exit_, out = bench.run(spawn)
    assert (exit_.id, exit_.code, exit_.signal) == (spawn.id, 0, None)
    name, argv, value, cwd, env, file, session, modules, fds = json.loads(out)
    assert (name, argv, value, cwd, file) == ("__main__", ["a", "--b"], 7, str(bench.folder), spawn.argv[0])
    assert env == {"PATH": os.environ["PATH"], "KEY": "value"}
    assert all([*session, *modules])
    assert len(fds) <= 5, f"the server's files are open in a child: {fds}"


@pytest.mark.parametrize(
    ("text", "code", "printed"),
    [
        ("print('hello')", 0, "hello\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no good')", 1, "no good\n"),
        ("import atexit, threading, time\natexit.register(print, 'two')\n"
         "threading.Thread(target=lambda: (time.sleep(0.1), print('one'))).start()", 0, "one\ntwo\n"),
    ],
)  # fmt: skip
def test_a_script_ends_as_under_python(bench: Bench, text: str, code: int, printed: str) -> None:
    exit_, out = bench.run(bench.script(text))
    assert (exit_.code, exit_.signal, out) == (code, None, printed)


def test_an_exception_is_printed_without_the_launcher_and_written_for_torchelastic(bench: Bench) -> None:
    errors = bench.folder / "error.json"
    spawn = bench.script(
        "def f():\n    raise ValueError('bad batch')\nf()\n", env={"TORCHELASTIC_ERROR_FILE": str(errors)}
    )
    exit_, out = bench.run(spawn)
    assert exit_.code == 1
    assert out.startswith('Traceback (most recent call last):\n  File "' + spawn.argv[0])
    assert out.endswith("ValueError: bad batch\n")
    told = json.loads(errors.read_text())["message"]
    assert told["message"] == "ValueError: bad batch"
    assert "in f" in told["extraInfo"]["py_callstack"]
    assert abs(float(told["extraInfo"]["timestamp"]) - time.time()) < 60


def test_modules_functions_and_other_programs(bench: Bench) -> None:
    (bench.folder / "mod.py").write_text("import sys\nprint('module', __name__, sys.argv[1:])\n")
    base = bench.script("")
    runs = [
        replace(base, id="m", kind="module", argv=("mod", "x")),
        replace(base, id="c", kind="call", target="builtins:print", args=("call", 1)),
        replace(base, id="e", kind="exec", argv=("sh", "-c", "echo exec $KEY; exit 5"), env={**base.env, "KEY": "k"}),
        replace(base, id="n", kind="exec", argv=("no-such-program",)),
        replace(base, id="d", kind="exec", argv=("true",), cwd="/no/such/folder"),
    ]
    codes = [bench.run(spawn)[0].code for spawn in runs]
    assert codes == [0, 0, 5, 127, 1]
    assert bench.out().splitlines()[:4] == [
        "module __main__ ['x']",
        "call 1",
        "exec k",
        "cannot run no-such-program: No such file or directory",
    ]
    assert "/no/such/folder" in bench.out()


def test_an_exit_is_told_at_once_and_takes_the_group_with_it(bench: Bench) -> None:
    text = "import subprocess, time\np = subprocess.Popen(['sleep', '100'])\nprint(p.pid)\ntime.sleep(100)\n"
    spawn = bench.script(text)
    pid = bench.client.spawn(spawn)
    child = int(eventually(bench.out))
    before = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    exit_ = bench.exits.get(timeout=5)
    took = time.monotonic() - before
    assert (exit_.pid, exit_.code, exit_.signal) == (pid, None, signal.SIGKILL)
    eventually(lambda: not alive(child), 1)
    assert took < 0.1


def test_kill_reaches_the_whole_group_even_when_stopped(bench: Bench) -> None:
    spawn = bench.script("import os, time\nos.fork()\nprint(os.getpid())\ntime.sleep(100)\n")
    bench.client.spawn(spawn)
    pids = eventually(lambda: len(bench.out().split()) == 2 and bench.out().split())
    bench.client.kill(spawn.id, signal.SIGSTOP)
    bench.client.kill(spawn.id, signal.SIGKILL)
    assert bench.exits.get(timeout=5).signal == signal.SIGKILL
    eventually(lambda: not any(alive(int(pid)) for pid in pids), 1)
    with pytest.raises(RequestError, match="no child"):
        bench.client.kill(spawn.id, signal.SIGKILL)


def test_what_left_its_group_ends_with_the_last_rank(bench: Bench) -> None:
    spawn = bench.script("import subprocess\np = subprocess.Popen(['setsid', 'sleep', '100'])\nprint(p.pid)\n")
    assert bench.run(spawn)[0].code == 0
    eventually(lambda: not alive(int(bench.out())), 2)


def test_a_client_takes_its_children_with_it_but_not_the_servers(bench: Bench) -> None:
    sleeper = "import time\ntime.sleep(100)\n"
    exits: queue.Queue[Exit] = queue.Queue()
    other = connect(bench.socket, exits)
    mine = other.spawn(bench.script(sleeper))
    kept = other.spawn(bench.script(sleeper, lifetime="server"))
    other.close()
    eventually(lambda: not alive(mine), 2)
    assert alive(kept)
    [child] = eventually(lambda: [c for c in bench.client.state().children if c.pid == kept])
    assert (child.lifetime, child.orphan) == ("server", False)
    bench.client.kill(child.id, signal.SIGKILL)
    assert bench.exits.get(timeout=5).pid == kept, "the end of a server's child is told to every client"


def test_ids_are_unique_and_nonsense_is_refused(bench: Bench) -> None:
    spawn = bench.script("import time\ntime.sleep(100)\n")
    bench.client.spawn(spawn)
    with pytest.raises(RequestError, match="is alive"):
        bench.client.spawn(spawn)
    with pytest.raises(RequestError, match="unknown operation"):
        bench.client._ask("dance")
    with pytest.raises(RequestError, match="unexpected keyword"):
        bench.client._ask("spawn", id="x", kind="exec", colour="red")
    state = bench.client.state()
    assert (state.threads, state.missing) == (1, ("no_such_module",))


def test_stdout_and_stderr_are_appended_to(bench: Bench) -> None:
    bench.run(bench.script("print('first')"))
    assert bench.run(bench.script("print('second')"))[1] == "first\nsecond\n"


def test_random_numbers_differ_between_siblings(bench: Bench) -> None:
    text = "import random, numpy\nprint(random.random(), numpy.random.random())\n"
    bench.run(bench.script(text))
    first, second = bench.run(bench.script(text))[1].splitlines()
    assert set(first.split()).isdisjoint(second.split())


def node_server(bench: Bench, **changes: Any) -> tuple[Path, ForkClient, queue.Queue[Exit]]:
    folder = bench.folder / "node-0"
    folder.mkdir()
    bench.client.fork_server(ServerSetup(f"{folder}/f.sock", pid_dir=str(folder), **changes))
    exits: queue.Queue[Exit] = queue.Queue()
    return folder, connect(f"{folder}/f.sock", exits), exits


def test_a_further_server_dies_as_a_node(bench: Bench) -> None:
    folder, client, _ = node_server(bench)
    text = "import subprocess, time\nprint(subprocess.Popen(['sleep', '100']).pid)\ntime.sleep(100)\n"
    client.spawn(bench.script(text, role="rank-0"))
    client.spawn(bench.script("import time\ntime.sleep(100)\n", role="keeper", lifetime="server"))
    grandchild = int(eventually(bench.out))
    pids = eventually(lambda: len(node_pids(folder)) == 3 and node_pids(folder))
    assert set(pids) == {"forkserver", "keeper", "rank-0"}
    assert signal_node(folder, signal.SIGKILL) == pids
    eventually(lambda: not any(alive(pid) for pid in (*pids.values(), grandchild)))
    assert bench.exits.get(timeout=5).signal == signal.SIGKILL
    assert node_pids(folder) == {}


def test_a_further_server_dies_with_its_parent_and_its_children_with_it() -> None:
    with tempfile.TemporaryDirectory(prefix="ol-") as name:
        zygote = launch(f"{name}/z.sock", log=Path(name) / "log", preload=())
        bench = Bench(Path(name), f"{name}/z.sock", ForkClient(f"{name}/z.sock"))
        folder, client, _ = node_server(bench)
        rank = client.spawn(bench.script("import time\ntime.sleep(100)\n"))
        server = node_pids(folder)["forkserver"]
        zygote.kill()
        zygote.wait(5)
        eventually(lambda: not alive(server) and not alive(rank), 2)


def test_a_server_ends_when_its_parent_has_ended() -> None:
    code = """
import sys, os, time, pathlib
from outlast.agent.forkclient import launch, ForkClient
process = launch(sys.argv[1], log=pathlib.Path(os.devnull), preload=())
ForkClient(sys.argv[1])
print(process.pid)
"""
    with tempfile.TemporaryDirectory(prefix="ol-") as name:
        done = subprocess.run(
            [sys.executable, "-c", code, f"{name}/s.sock"], capture_output=True, text=True, timeout=30
        )
        eventually(lambda: not alive(int(done.stdout)), 3)
        assert not Path(f"{name}/s.sock").exists()


@pytest.mark.skipif(not may_isolate(), reason="mount namespaces need root")
def test_an_isolated_server_sees_no_other_nodes_memory(bench: Bench) -> None:
    base = Path(tempfile.mkdtemp(prefix="ol-", dir="/dev/shm"))
    try:
        for node in ("own", "other"):
            (base / node).mkdir()
            (base / node / "file").write_text(node)
        _, client, exits = node_server(bench, isolate=Isolate(str(base), str(base / "own")))
        text = "import os, sys\nprint(os.listdir(sys.argv[1]), open(sys.argv[1] + '/own/file').read())\n"
        text += "open(sys.argv[1] + '/own/new', 'w').write('x')\n"
        client.spawn(bench.script(text, str(base)))
        assert exits.get(timeout=5).code == 0
        assert bench.out() == "['own'] own\n"
        assert (base / "own" / "new").read_text() == "x", "it must be the real folder"
        client.close()
    finally:
        subprocess.run(["rm", "-rf", str(base)], check=True)
    bench.client.kill(str(bench.folder / "node-0" / "f.sock"), signal.SIGKILL)


class Attending:
    """A client that wants to know when its server is told to go."""

    def __init__(self, folder: Path, grace_s: float) -> None:
        self.told: queue.Queue[float] = queue.Queue()
        self.exits: queue.Queue[Exit] = queue.Queue()
        self.gone = threading.Event()
        self.client = ForkClient(f"{folder}/f.sock", self.exits.put, self.gone.set, on_terminating=self.told.put)
        self.client.attend(grace_s)


SLEEPER = "import time\ntime.sleep(100)\n"


def test_a_server_that_is_told_to_go_lets_its_clients_hand_over(bench: Bench) -> None:
    folder, _, _ = node_server(bench)
    first = Attending(folder, 30.0)
    child = first.client.spawn(bench.script(SLEEPER, lifetime="server"))
    server = node_pids(folder)["forkserver"]
    os.kill(server, signal.SIGTERM)
    left = first.told.get(timeout=5)
    assert 25 < left <= 30
    second = Attending(folder, 60.0)
    assert second.told.get(timeout=5) < left, "who comes later is told as well, and gets no more time"
    assert first.client.spawn(bench.script("pass")) > 0, "it serves as before"
    assert first.exits.get(timeout=5).code == 0
    os.kill(server, signal.SIGTERM)
    first.client.close()
    second.client.state()
    assert alive(child)
    second.client.shutdown()
    assert second.gone.wait(5)
    assert bench.exits.get(timeout=5).pid == server
    assert not alive(child)
    assert first.told.empty()
    assert second.told.empty(), "once is enough"


def test_a_server_ends_when_the_grace_is_over(bench: Bench) -> None:
    folder, _, _ = node_server(bench)
    attending = Attending(folder, 0.3)
    child = attending.client.spawn(bench.script(SLEEPER))
    os.kill(node_pids(folder)["forkserver"], signal.SIGTERM)
    assert attending.told.get(timeout=5) <= 0.3
    assert attending.gone.wait(5)
    assert not alive(child)


@pytest.mark.parametrize("attended", [False, True])
def test_a_server_that_nobody_attends_ends_at_once(bench: Bench, attended: bool) -> None:
    folder, client, _ = node_server(bench)
    if attended:  # by one who has left since
        Attending(folder, 30.0).client.close()
    client.spawn(bench.script(SLEEPER))
    before = time.monotonic()
    os.kill(node_pids(folder)["forkserver"], signal.SIGTERM)
    assert bench.exits.get(timeout=10).code == 0
    assert time.monotonic() - before < 2


@pytest.mark.parametrize("back", [True, False])
def test_who_attended_and_is_being_started_again_is_waited_for(bench: Bench, back: bool) -> None:
    """Its keeper lives: what a new agent can hand over. One that does not come back in 10 s is not waited for."""
    folder, client, _ = node_server(bench)
    agent = Attending(folder, 30.0)
    keeper = client.spawn(bench.script(SLEEPER, lifetime="server", role="keeper"))
    agent.client.close()
    os.kill(node_pids(folder)["forkserver"], signal.SIGTERM)
    if back:
        again = Attending(folder, 30.0)
        assert 20 < again.told.get(timeout=5) <= 30.0
        assert alive(keeper)
        again.client.shutdown()
    assert bench.exits.get(timeout=15).code == 0
    assert not alive(keeper)


def test_a_server_that_ends_takes_attended_ones_with_it_at_once() -> None:
    with tempfile.TemporaryDirectory(prefix="ol-") as name:
        zygote = launch(f"{name}/z.sock", log=Path(name) / "log", preload=())
        bench = Bench(Path(name), f"{name}/z.sock", ForkClient(f"{name}/z.sock"))
        folder, _, _ = node_server(bench)
        attending = Attending(folder, 30.0)
        before = time.monotonic()
        zygote.terminate()
        assert zygote.wait(10) == 0
        assert attending.gone.wait(5)
        assert time.monotonic() - before < 3
        assert attending.told.empty()
