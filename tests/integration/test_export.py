"""Exports of checkpoints: read by processes that know nothing of outlast, equal to what was trained."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from outlast.checkpoint import formats
from outlast.checkpoint.export import main
from outlast.protect.leaves import local_of
from outlast.snapshot.identity import Generation
from support import checkpoints
from support.checkpoints import WORLD, Objects, as_rank, checkpoint, sharded, train, write_image
from support.mounts import small_file_system
from support.plain_net import Net, optimizer_digest
from support.plain_python import run_plain

Run = Callable[..., dict[str, Any]]
STEPS = {"sharded": 10, "replicated": 20}
MARK = "ab" * 8


class Stored:
    """A job's URL, and the digests of what was trained."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.url = f"file://{folder}/store/default/test"
        plain = checkpoints.build()
        self.weights = checkpoints.weights_digest(plain)
        self.optimizer = optimizer_digest(plain["optimizer"])
        self.generations = {name: Generation(1, step, MARK) for name, step in STEPS.items()}
        checkpoints.sharded_images(folder / "sharded", self.generations["sharded"])
        checkpoints.replicated_images(folder / "replicated", self.generations["replicated"], plain)
        for name, generation in self.generations.items():
            checkpoints.checkpoint(self.url, folder / name, generation)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a script where outlast cannot be imported."""
    return partial(run_plain, tmp_path_factory.mktemp("plain"))


def export(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and last line; all lines are JSON and the bytes add up."""
    status = main(list(arguments))
    *progress, end = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    if status == 0:
        assert progress[-1]["bytes"] == progress[-1]["total"] > 0
    assert (end["type"], end["exit"]) == ("end", status)
    return status, end


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("shard_size", ["5G", "300"])
def test_safetensors_alone_reads_the_weights(
    stored: Stored, run: Run, kind: str, shard_size: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "out"
    step = str(STEPS[kind])
    status, end = export(capsys, stored.url, "--step", step, "--to", str(to), "--shard-size", shard_size)
    assert status == 0, end
    assert end["weights_digest"] == stored.weights
    found = run("load_safetensors.py", str(to))
    assert found["weights"] == stored.weights
    if shard_size == "5G":
        assert end["files"] == ["model.safetensors"]
    else:
        count = len(found["files"])
        assert count > 1
        assert found["files"] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        assert json.loads((to / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 978


@pytest.mark.parametrize("kind", STEPS)
def test_torch_alone_reads_a_dcp_folder(
    stored: Stored, run: Run, kind: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "out"
    step = str(STEPS[kind])
    status, end = export(capsys, stored.url, "--step", step, "--format", "dcp", "--to", str(to))
    assert status == 0, end
    assert end["weights_digest"] == stored.weights
    for form in ("nested", "flat"):
        assert run("load_dcp.py", str(to), form) == {"weights": stored.weights, "optimizer": stored.optimizer}


class PlainState(torch.optim.Optimizer):
    """Keeps what it knows of a parameter as a plain tensor of the local shard's shape, as 8-bit optimizers do."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                local, gradient = local_of(parameter), local_of(parameter.grad)
                state = self.state[parameter]
                state.setdefault("mean", torch.zeros_like(local)).mul_(0.9).add_(gradient)
                local.add_(state["mean"], alpha=-0.1)
                state["name"] = torch.full((3,), float(local.dim()))


def with_plain_state(shard: Callable[[nn.Module], None] = lambda model: None) -> Objects:
    torch.manual_seed(5)
    model = Net()
    shard(model)
    objects: Objects = {"model": model, "optimizer": PlainState(list(model.parameters())), "notes": {}}
    train(objects, 3)
    return objects


def test_state_that_is_cut_like_its_parameter_is_exported_whole(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = Generation(1, 5, "ab" * 8)
    for rank in range(WORLD):
        with as_rank(rank):
            write_image(with_plain_state(sharded), tmp_path / "images", rank, generation, {})
    url, to = f"file://{tmp_path}/store/default/test", tmp_path / "out"
    checkpoint(url, tmp_path / "images", generation)
    status, end = export(capsys, url, "--format", "dcp", "--to", str(to))
    assert status == 0, end
    plain = with_plain_state()
    wanted: dict[str, torch.Tensor] = {}
    for name, parameter in plain["model"].named_parameters():
        for key, value in plain["optimizer"].state[parameter].items():
            wanted[f"optimizer.state.{name}.{key}"] = value
    loaded = {name: torch.empty_like(value) for name, value in wanted.items()}
    dcp.load(loaded, checkpoint_id=to)
    for name, value in wanted.items():
        assert torch.equal(loaded[name], value), name


def test_dcp_folders_of_several_files_are_read_too(
    stored: Stored,
    run: Run,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("outlast.checkpoint.formats.FILE_BYTES", 500)
    to = tmp_path / "out"
    status, end = export(capsys, stored.url, "--format", "dcp", "--to", str(to))
    assert status == 0, end
    assert len(end["files"]) > 3
    assert run("load_dcp.py", str(to), "flat")["weights"] == stored.weights


def test_what_is_wrong_is_said_and_leaves_nothing(
    stored: Stored, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    for arguments, said in (
        (("--to", str(full)), "nothing is overwritten"),
        (("--to", str(tmp_path / "a" / "b")), "there is no folder"),
        (("--to", str(tmp_path / "x"), "--step", "15"), "no checkpoint of step 15"),
        (("--to", str(tmp_path / "x"), "--shard-size", "5GB"), "did you mean 5G"),
    ):
        status, end = export(capsys, stored.url, *arguments)
        assert status == 2
        assert said in end["text"]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.fixture
def mounted(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty file system of its own, of 1 MiB."""
    place = tmp_path / "mounted"
    place.mkdir()
    with small_file_system(place, 1):
        (place / "lost+found").mkdir()  # as a new one has
        yield place


def test_a_file_system_of_its_own_is_exported_to(
    stored: Stored,
    run: Run,
    mounted: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its room is what counts."""
    monkeypatch.setattr("outlast.checkpoint.export._bytes", lambda *_: 2 << 20)
    status, end = export(capsys, stored.url, "--to", str(mounted))
    assert status == 1
    assert f"{mounted} has 1 MiB free" in end["text"]
    assert [path.name for path in mounted.iterdir()] == ["lost+found"]
    monkeypatch.undo()
    status, end = export(capsys, stored.url, "--to", str(mounted))
    assert status == 0, end
    assert end["files"] == ["model.safetensors"]
    assert {path.name for path in mounted.iterdir()} == {"lost+found", "model.safetensors"}
    assert run("load_safetensors.py", str(mounted))["weights"] == stored.weights


FORMS = {
    ("--shard-size", "300"): ("load_safetensors.py", "model.safetensors.index.json"),
    ("--format", "dcp"): ("load_dcp.py", ".metadata"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_working_folder_is_exported_to(
    stored: Stored,
    run: Run,
    form: tuple[str, str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script, catalogue = FORMS[form]
    to = tmp_path / "out"
    to.mkdir()
    monkeypatch.chdir(to)
    status, end = export(capsys, stored.url, *form, "--to", ".")
    assert status == 0, end
    assert sorted(path.name for path in to.iterdir()) == end["files"]
    assert catalogue in end["files"]
    assert run(script, str(to), *(["nested"] if "dcp" in form else []))["weights"] == stored.weights
    assert list(tmp_path.iterdir()) == [to]


@pytest.mark.parametrize("form", FORMS)
def test_what_makes_files_an_export_comes_last_into_a_folder_that_is_there(
    stored: Stored,
    form: tuple[str, str],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever ends it before leaves nothing that can be loaded; an error leaves nothing at all."""
    to, real, moved = tmp_path / "out", pathlib.Path.rename, []
    to.mkdir()

    def rename(path: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if target.parent == to:
            moved.append(target.name)
            if target.name == FORMS[form][1]:
                left.extend(path.parent.iterdir())
                raise OSError("no more")
        return real(path, target)

    left: list[pathlib.Path] = []
    monkeypatch.setattr(pathlib.Path, "rename", rename)
    status, end = export(capsys, stored.url, *form, "--to", str(to))
    assert (status, end["text"]) == (1, "no more")
    assert len(moved) > 1
    assert [path.name for path in left] == moved[-1:]
    assert list(to.iterdir()) == []
    assert list(tmp_path.iterdir()) == [to]


def test_what_somebody_puts_into_the_folder_meanwhile_is_not_overwritten(
    stored: Stored, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "model.safetensors"
    write = formats.write_safetensors
    monkeypatch.setattr(formats, "write_safetensors", lambda *given: (mine.write_text("mine"), write(*given))[1])
    status, end = export(capsys, stored.url, "--to", str(tmp_path))
    assert status == 2
    assert "not an empty folder (model.safetensors); nothing is overwritten" in end["text"]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_bytes_that_do_not_verify_are_not_exported(
    stored: Stored, form: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = Generation(1, 30, MARK)
    checkpoints.replicated_images(tmp_path / "images", generation, checkpoints.build())
    url = f"file://{tmp_path}/store/default/test"
    checkpoints.checkpoint(url, tmp_path / "images", generation)
    (image,) = (tmp_path / "store").rglob("rank-00001.safetensors")
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 1
    image.write_bytes(content)
    status, end = export(capsys, url, "--format", form, "--to", str(tmp_path / "out"))
    assert status == 1
    assert "rank-00001.safetensors" in end["text"]
    assert "does not verify" in end["text"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "store"]


def trainctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainctl", "checkpoints", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_exports(stored: Stored, tmp_path: pathlib.Path) -> None:
    done = trainctl("export", stored.url, "10", "--to", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    assert stored.weights in done.stdout
    done = trainctl("export", stored.url, "--format", "dcp", "--to", str(tmp_path / "b"), "--json")
    assert json.loads(done.stdout)["step"] == STEPS["replicated"]
    done = trainctl("export", stored.url, "--to", str(tmp_path / "b"))
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr


def test_the_command_verifies(stored: Stored, tmp_path: pathlib.Path) -> None:
    done = trainctl("verify", stored.url)
    assert done.returncode == 0, done.stderr
    assert "bytes verify" in done.stdout
    shutil.copytree(stored.url.removeprefix("file://"), tmp_path / "default" / "test")
    for image in sorted((tmp_path / "default" / "test").glob("*-10/rank-0000[12]*")):
        image.write_bytes(image.read_bytes()[:-1] if "00001" in image.name else b"")
    done = trainctl("verify", f"file://{tmp_path}/default/test", "10", "--json")
    assert done.returncode == 1
    assert [problem["rank"] for problem in json.loads(done.stdout)["problems"]] == [1, 2]
