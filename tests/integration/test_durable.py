"""Whole runs with an object tier: what memory cannot give back comes from the store, and the store is never trusted."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from support.mounts import small_file_system
from support.plain_python import run_plain
from support.runs import Interrupt, Outcome, job, trainctl_run

pytestmark = pytest.mark.timeout(400)

FSDP = ("--parallel", "fsdp", "--pace", "0.1", "--global-batch", "256", "--steps", "90")
QUICKLY = ("--replace-after", "1")

Undisturbed = Callable[[dict[str, Any]], Outcome]


def durable(folder: pathlib.Path, *arguments: str, **spec: Any) -> dict[str, Any]:
    """The job with a store in a folder, a checkpoint every 10 steps and a snapshot every 5."""
    checkpoint = {"url": f"file://{folder}/store", "interval": 10, **spec.pop("checkpoint", {})}
    return job("train.py", *FSDP, *arguments, checkpoint=checkpoint, **spec)


@pytest.fixture(scope="module")
def reference(undisturbed: Undisturbed) -> Outcome:
    """Without faults and without a store: what everything else must end with."""
    return undisturbed(job("train.py", *FSDP))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Outcome]:
    """A run with a store, and the folder of both."""
    folder = tmp_path_factory.mktemp("stored")
    outcome = trainctl_run(durable(folder), folder)
    assert outcome.status == 0, outcome.output
    return folder, outcome


def manifests(folder: pathlib.Path) -> list[pathlib.Path]:
    """The manifests of the job's checkpoints, oldest first."""
    found = (folder / "store" / "default" / "test" / "manifests").glob("*.json")
    return sorted(found, key=lambda path: int(path.stem.rsplit("-", 1)[1]))


def images(folder: pathlib.Path, manifest: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "store" / "default" / "test" / manifest.stem).iterdir())


def test_a_run_with_a_store_ends_the_same_and_leaves_its_last_step_there(
    stored: tuple[pathlib.Path, Outcome], tmp_path: pathlib.Path, reference: Outcome
) -> None:
    folder, outcome = stored
    assert outcome.digest == reference.digest
    assert outcome.report["checkpoints"]["last_step"] == 90
    assert manifests(folder)[-1].stem.endswith("-90")
    assert len(manifests(folder)) <= 3, "keepLast"
    for form, script in (("safetensors", "load_safetensors.py"), ("dcp", "load_dcp_weights.py")):
        to = str(tmp_path / form)
        done = checkpoints("export", f"file://{folder}/store/default/test", "--format", form, "--to", to)
        assert done.returncode == 0, done.stderr
        assert run_plain(tmp_path / "plain", script, to)["weights"] == reference.digest


def checkpoints(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trainctl", "checkpoints", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_losses_beyond_the_parity_go_on_from_the_store(tmp_path: pathlib.Path, reference: Outcome) -> None:
    """Three of four nodes, then all, then all and the head."""
    lost = [f"node-loss@{step}:{seat}" for step, seats in ((27, 3), (52, 4), (77, 4)) for seat in range(seats)]
    outcome = trainctl_run(durable(tmp_path), tmp_path, [*lost, "head-loss@77"], QUICKLY)
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    recoveries = [outcome.recoveries[0], outcome.recoveries[1], outcome.recoveries[-1]]
    for recovery, step in zip(recoveries, (10, 30, 50), strict=True):
        assert recovery["restored_step"] >= step, outcome.recoveries
        assert recovery["restore_sources"].get("object", 0) >= 1, outcome.recoveries


def test_a_job_that_lost_everything_is_resumed_elsewhere(tmp_path: pathlib.Path, reference: Outcome) -> None:
    """Its store has even lost the head: that is refused with the remedy, and the repaired store is gone on from."""
    spec = durable(tmp_path)
    first = trainctl_run(spec, tmp_path / "a", interrupt=Interrupt("checkpoint-committed"))
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


def test_another_job_starts_from_a_checkpoint(
    stored: tuple[pathlib.Path, Outcome], tmp_path: pathlib.Path, reference: Outcome
) -> None:
    folder, _ = stored
    step = int(manifests(folder)[0].stem.rsplit("-", 1)[1])
    assert step < 90
    spec = durable(tmp_path, checkpoint={"restoreFrom": f"file://{folder}/store/default/test@{step}"})
    spec["metadata"]["name"] = "branch"
    branch = trainctl_run(spec, tmp_path)
    assert branch.status == 0, branch.output
    assert min(branch.losses()) == step + 1 or min(branch.losses()) == step
    assert branch.digest == reference.digest


def lose(path: pathlib.Path) -> None:
    path.unlink()


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    path.write_bytes(content)


def test_damaged_checkpoints_are_passed_over_for_older_ones(tmp_path: pathlib.Path, reference: Outcome) -> None:
    """The newest lost an object, the one before it is truncated, and bytes of the one before that are flipped."""
    spec = durable(tmp_path, checkpoint={"interval": 10, "keepLast": 10})
    first = trainctl_run(spec, tmp_path / "a", interrupt=Interrupt("checkpoint-committed", events=4))
    oldest, *damaged = manifests(tmp_path)[-4:]
    for manifest, damage in zip(damaged, (flip, truncate, lose), strict=True):
        damage(images(tmp_path, manifest)[1])
    resumed = trainctl_run(spec, tmp_path / "b", options=("--resume",))
    assert resumed.status == 0, first.output + resumed.output
    assert resumed.events("restored")[-1]["fields"]["step"] == int(oldest.stem.rsplit("-", 1)[1])
    assert len(resumed.events("checkpoint-quarantined")) == 3, resumed.output
    assert all(images(tmp_path, manifest) for manifest in damaged), "what is damaged is kept for people"
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
    assert any("full" in event["text"] for event in outcome.events("store-unavailable")), outcome.output
    assert outcome.report["checkpoints"]["last_step"] == 90
    assert outcome.digest == reference.digest


def small_disk_free(path: pathlib.Path) -> int:
    import os

    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def free_when_told(events: pathlib.Path, filler: pathlib.Path) -> None:
    """Remove the filler once it was told that an upload waits for room."""
    import time

    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if events.exists() and '"store-unavailable"' in events.read_text():
            break
        time.sleep(0.1)
    filler.unlink()


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Any:
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    with small_file_system(place, 64):
        yield place
