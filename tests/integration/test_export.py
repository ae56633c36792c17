"""Exports of checkpoints: read by processes that know nothing of outlast, equal to what was trained."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from outlast.checkpoint.export import main
from outlast.snapshot.identity import Generation
from support import checkpoints
from support.plain_net import optimizer_digest
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
