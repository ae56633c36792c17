"""``outlast.load``: a checkpoint's weights without a job; and what a checkpoint tells of its origin."""

from __future__ import annotations

import pathlib
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import outlast
from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import ClaimMark, JobMark, Manifest, image_key
from outlast.errors import CheckpointError, RequestError, StateError
from outlast.rank import stored_weights
from outlast.rank.about import mesh_of, script_fingerprint
from outlast.snapshot.image import ImageFile
from outlast.snapshot.stored import StoredImage
from support.shards import GENERATION, Objects, image


def checkpoint(folder: pathlib.Path, objects: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Objects:
    store, key = Objects(), image_key(GENERATION, 0)
    store.objects[key] = image(folder, objects)
    sealed = ImageFile.open(folder / "slot-0-0.img")
    stored = StoredImage(0, 0, 0, key, len(store.objects[key]), str(sealed.digest))
    mark, claim = JobMark("jobs", "test", "id"), ClaimMark(1, "ab", "here")
    archive = Archive(store)  # type: ignore[arg-type]
    archive.claim(mark, claim, None)
    archive.commit(Manifest(mark, GENERATION, 5, 1, 1, "2026-01-01T00:00:00Z", (stored,)), claim)
    monkeypatch.setattr(stored_weights, "open_store", lambda url: store)
    return store


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 50_000, bias=False))


def test_a_checkpoints_weights_load_without_a_job(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, other = model(3), model(9)
    trained(torch.randn(8, 40))
    checkpoint(tmp_path, {"model": trained}, monkeypatch)
    assert outlast.load("s3://bucket/jobs/test@5", other) == 5
    for name, tensor in trained.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_tied_weights_load_into_a_model_that_ties_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})

    tied, plain = build(), build()
    tied["head"].weight = tied["embed"].weight
    checkpoint(tmp_path, {"model": tied}, monkeypatch)
    outlast.load("s3://bucket/jobs/test", plain)
    assert torch.equal(plain["head"].weight, tied["embed"].weight)
    assert torch.equal(plain["embed"].weight, tied["embed"].weight)


def test_weights_whose_names_have_slashes_load(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, other = (nn.ModuleDict({"extra/head": nn.Linear(2, 3), "head": nn.Linear(2, 3)}) for _ in range(2))
    checkpoint(tmp_path, {"model": trained}, monkeypatch)
    outlast.load("s3://bucket/jobs/test", other)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())


class Cached(nn.Module):
    """With a table that ``state_dict()`` leaves out, as rotary embeddings have."""

    def __init__(self, length: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 4)
        if length:
            self.register_buffer("table", torch.randn(length), persistent=False)


@pytest.mark.parametrize(("saved", "live"), [(8, 16), (8, 8), (8, 0), (0, 8)])
def test_what_a_state_dict_leaves_out_need_not_fit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, saved: int, live: int
) -> None:
    trained, other, untouched = Cached(saved, 1), Cached(live, 2), Cached(live, 2)
    checkpoint(tmp_path, {"model": trained}, monkeypatch)
    outlast.load("s3://bucket/jobs/test", other)
    assert torch.equal(other.layer.weight, trained.layer.weight)
    if live:
        assert torch.equal(other.table, (trained if live == saved else untouched).table)  # type: ignore[arg-type]


def test_a_model_with_a_name_twice_is_not_loaded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.ModuleDict({"head": nn.Linear(2, 3)}), nn.Linear(2, 3)

    checkpoint(tmp_path, {"model": nn.ModuleDict({"head": nn.Linear(2, 3)})}, monkeypatch)
    with pytest.raises(StateError, match=r"model\.module\.head\.weight and model\.head\.weight would both be called"):
        outlast.load("s3://bucket/jobs/test", Holder())


def test_of_several_modules_one_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, {"a": nn.Linear(2, 3), "b": nn.Linear(3, 4)}, monkeypatch)
    with pytest.raises(RequestError, match=r"step 5 at s3://bucket has not one module but these: a, b"):
        outlast.load("s3://bucket/jobs/test", nn.Linear(3, 4))


def test_a_model_that_does_not_fit_is_refused_by_name(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, {"model": nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))}, monkeypatch)
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(5, 5))
    with pytest.raises(StateError, match=r"model/2\.weight is in the model but not in it") as caught:
        outlast.load("s3://bucket/jobs/test", other)
    assert "'model/1.weight' is (5, 3)" in str(caught.value)


def test_no_such_step_or_module_is_a_wrong_request(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = checkpoint(tmp_path, {"model": nn.Linear(2, 3)}, monkeypatch)
    with pytest.raises(RequestError, match="no checkpoint of step 7"):
        outlast.load("s3://bucket/jobs/test@7", nn.Linear(2, 3))
    with pytest.raises(RequestError, match="give one step"):
        outlast.load("s3://bucket/jobs/test@7", nn.Linear(2, 3), step=5)
    with pytest.raises(RequestError, match="no module called 'other'"):
        outlast.load("s3://bucket/jobs/test", nn.Linear(2, 3), name="other")
    assert outlast.load("s3://bucket/jobs/test", nn.Linear(2, 3), 5, name="model") == 5
    damaged = bytearray(store.objects[f"{GENERATION}/rank-00000.safetensors"])
    damaged[5000] ^= 1
    store.objects[f"{GENERATION}/rank-00000.safetensors"] = bytes(damaged)
    with pytest.raises(CheckpointError, match="does not verify"):
        outlast.load("s3://bucket/jobs/test", nn.Linear(2, 3))


# --- origin -----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_script_and_its_own_modules(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(folder: str, helper: str, script: str = "import helper") -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "helper.py").write_text(helper)
        (place / "train.py").write_text(script)
        module = types.ModuleType("helper_of_the_job")
        module.__file__ = str(place / "helper.py")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(place / "train.py"))
        return script_fingerprint()

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    first = fingerprint("a", "x = 1")
    assert len(first) == 64
    assert fingerprint("b", "x = 1") == first, "wherever the folder is"
    assert fingerprint("a", "x = 2") != first
    assert fingerprint("a", "x = 1", "import helper  # and nothing else") != first
    assert fingerprint("a", "x = 1") == first
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert script_fingerprint() == ""


def test_a_model_without_sharding_has_no_mesh() -> None:
    assert mesh_of(nn.Linear(2, 2).parameters()) is None
