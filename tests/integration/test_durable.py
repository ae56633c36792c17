"""Whole runs with an object tier: what memory cannot give back comes from the store, and the store is never trusted."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from support.plain_python import run_plain
from support.runs import Outcome, job, trainctl_run

pytestmark = pytest.mark.timeout(400)

FSDP = ("--parallel", "fsdp", "--pace", "0.1", "--global-batch", "256", "--steps", "40")
EVERYTHING = tuple(f"node-loss@27:{seat}" for seat in range(4))
QUICKLY = ("--replace-after", "1")


def durable(folder: pathlib.Path, *arguments: str, **spec: Any) -> dict[str, Any]:
    """The job with a store in a folder, a checkpoint every 10 steps and a snapshot every 5."""
    checkpoint = {"url": f"file://{folder}/store", "interval": 10, **spec.pop("checkpoint", {})}
    return job("train.py", *(arguments or FSDP), checkpoint=checkpoint, **spec)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Without faults and without a store: what everything else must end with."""
    outcome = trainctl_run(job("train.py", *FSDP), tmp_path_factory.mktemp("reference"))
    assert outcome.status == 0, outcome.output
    return outcome


def manifests(folder: pathlib.Path) -> list[pathlib.Path]:
    """The manifests of the job's checkpoints, oldest first."""
    found = (folder / "store" / "default" / "test" / "manifests").glob("*.json")
    return sorted(found, key=lambda path: int(path.stem.rsplit("-", 1)[1]))


def images(folder: pathlib.Path, manifest: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "store" / "default" / "test" / manifest.stem).iterdir())


def test_a_run_with_a_store_ends_the_same_and_leaves_its_last_step_there(
    tmp_path: pathlib.Path, reference: Outcome
) -> None:
    outcome = trainctl_run(durable(tmp_path), tmp_path)
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    assert outcome.report["checkpoints"]["last_step"] == 40
    assert manifests(tmp_path)[-1].stem.endswith("-40")
    assert len(manifests(tmp_path)) <= 3, "keepLast"
    for form, script in (("safetensors", "load_safetensors.py"), ("dcp", "load_dcp_weights.py")):
        to = str(tmp_path / form)
        done = checkpoints("export", f"file://{tmp_path}/store/default/test", "--format", form, "--to", to)
        assert done.returncode == 0, done.stderr
        assert run_plain(tmp_path / "plain", script, to)["weights"] == reference.digest


def checkpoints(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainctl", "checkpoints", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("faults", [EVERYTHING[:3], EVERYTHING, ("head-loss@27", *EVERYTHING)], ids=["3", "4", "all"])
def test_losses_beyond_the_parity_go_on_from_the_store(
    tmp_path: pathlib.Path, reference: Outcome, faults: tuple[str, ...]
) -> None:
    outcome = trainctl_run(durable(tmp_path), tmp_path, faults, QUICKLY)
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    recovery = outcome.recoveries[-1]
    assert recovery["restored_step"] >= 10, recovery
    assert recovery["restore_sources"].get("object", 0) >= 1, recovery


def test_a_job_that_lost_everything_is_resumed_elsewhere(tmp_path: pathlib.Path, reference: Outcome) -> None:
    """Its store has even lost the head: that is refused with the remedy, and the repaired store is gone on from."""
    spec = durable(tmp_path)
    first = trainctl_run(spec, tmp_path / "a", interrupt=("checkpoint-committed", 1))
    assert first.status == 130, first.output
    refused = trainctl_run(spec, tmp_path / "b")
    assert refused.status == 2, refused.output
    assert "--resume" in refused.output
    url = f"file://{tmp_path}/store/default/test"
    head = tmp_path / "store" / "default" / "test" / "head.json"
    head.unlink()
    for options in ((), ("--resume",)):
        refused = trainctl_run(spec, tmp_path / "b", options=options)
        assert refused.status == 2, refused.output
        assert f"trainctl checkpoints repair {url}" in refused.output.replace("\n", " ")
    assert checkpoints("repair", url).returncode == 0
    assert not head.exists(), "a dry run"
    assert checkpoints("repair", url, "--write").returncode == 0
    resumed = trainctl_run(spec, tmp_path / "c", options=("--resume",))
    assert resumed.status == 0, resumed.output
    assert resumed.events("restored")[0]["fields"]["step"] >= 10
    assert resumed.digest == reference.digest


def test_another_job_starts_from_a_checkpoint(tmp_path: pathlib.Path, reference: Outcome) -> None:
    first = trainctl_run(durable(tmp_path, checkpoint={"keepLast": 10}), tmp_path / "a")
    assert first.status == 0, first.output
    step = int(manifests(tmp_path)[1].stem.rsplit("-", 1)[1])
    spec = durable(tmp_path, checkpoint={"restoreFrom": f"file://{tmp_path}/store/default/test@{step}"})
    spec["metadata"]["name"] = "branch"
    branch = trainctl_run(spec, tmp_path / "b")
    assert branch.status == 0, branch.output
    assert min(branch.losses()) == step + 1 or min(branch.losses()) == step
    assert branch.digest == reference.digest


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1000]), flip],
    ids=["missing", "truncated", "flipped"],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_older(
    tmp_path: pathlib.Path, reference: Outcome, damage: Callable[[pathlib.Path], None]
) -> None:
    spec = durable(tmp_path)
    first = trainctl_run(spec, tmp_path / "a", interrupt=("checkpoint-committed: step 20", 1))
    newest = manifests(tmp_path)[-1]
    damage(images(tmp_path, newest)[1])
    resumed = trainctl_run(spec, tmp_path / "b", options=("--resume",))
    assert resumed.status == 0, first.output + resumed.output
    step = int(newest.stem.rsplit("-", 1)[1])
    assert resumed.events("restored")[-1]["fields"]["step"] < step
    assert resumed.events("checkpoint-quarantined"), resumed.output
    assert images(tmp_path, newest), "what is damaged is kept for people"
    assert resumed.digest == reference.digest


def test_a_full_store_holds_nothing_up(tmp_path: pathlib.Path, reference: Outcome, small_disk: pathlib.Path) -> None:
    """A folder on a disk without room, which somebody frees while the job runs."""
    filler = small_disk / "filler"
    filler.write_bytes(bytes(small_disk_free(small_disk) - 65536))
    spec = durable(tmp_path, checkpoint={"url": f"file://{small_disk}/store"})
    watcher = threading.Thread(target=free_when_told, args=(tmp_path / "run" / "events.jsonl", filler))
    watcher.start()
    outcome = trainctl_run(spec, tmp_path, timeout=390)
    watcher.join()
    assert outcome.status == 0, outcome.output
    assert outcome.events("checkpoint-failed"), outcome.output
    assert outcome.report["checkpoints"]["last_step"] == 40
    assert outcome.digest == reference.digest


def small_disk_free(path: pathlib.Path) -> int:
    import os

    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def free_when_told(events: pathlib.Path, filler: pathlib.Path) -> None:
    """Remove the filler once a checkpoint has failed."""
    import time

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if events.exists() and '"checkpoint-failed"' in events.read_text():
            break
        time.sleep(0.1)
    filler.unlink()


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Any:
    """A file system of 64 MiB."""
    import os

    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
