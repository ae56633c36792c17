"""Images: layouts round-trip, any safetensors reader opens them, and no changed byte goes unnoticed."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from outlast.errors import CapacityError, ImageError
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import BLOCK, Entry, ImageFile, block_checksums, plan_layout, read_layout
from outlast.snapshot.layout import DTYPE_BYTES, FOOTER_BYTES, GENERATION_OFFSET, Layout

GENERATION = Generation(3, 1200, "0123456789abcdef")
META = {"kind": "shard", "rank": "1", "world": "4", "seat": "1", "local_rank": "0"}

names = st.text(min_size=1, max_size=20).filter(
    lambda n: not n.startswith(("__pad__.", "__outlast__.", "__metadata__"))
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def entry_lists(draw: st.DrawFn) -> list[Entry]:
    result = []
    for name in draw(st.lists(names, unique=True, max_size=8)):
        dtype = draw(st.sampled_from(["F32", "BF16", "U8", "I64", "BOOL", "F64"]))
        shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
        nbytes = int(np.prod(shape, dtype=int)) * DTYPE_BYTES[dtype]
        result.append(
            Entry(name, dtype, shape, nbytes, draw(st.dictionaries(st.text(max_size=6), json_values, max_size=3)))
        )
    return result


def fill(image: ImageFile, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for entry in image.layout.entries:
        image.entry_view(entry.name)[:] = rng.integers(0, 2, entry.nbytes, dtype=np.uint8).tobytes()


def sealed_image(path: pathlib.Path, layout: Layout, generation: Generation = GENERATION) -> ImageFile:
    image = ImageFile.create(path, layout)
    image.begin(generation)
    fill(image)
    image.seal(block_checksums(image.view(0, layout.trailer_offset)))
    return image


def small_layout() -> Layout:
    return plan_layout([Entry("w", "F32", (150_001,), 600_004, {"offset": [0]}), Entry("s", "U8", (9,), 9)], META)


@pytest.fixture(scope="module")
def sealed_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        image = sealed_image(pathlib.Path(folder, "a.img"), small_layout())
        return bytes(image.view(0, image.layout.total_bytes))


@pytest.fixture
def image(tmp_path: pathlib.Path) -> Iterator[ImageFile]:
    image = sealed_image(tmp_path / "slot-0-0.img", small_layout())
    yield image
    image.close()


@settings(deadline=None, max_examples=60)
@given(entries=entry_lists(), meta=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_round_trip_of_any_layout(entries: list[Entry], meta: dict[str, str]) -> None:
    layout = plan_layout(entries, {**meta, **META})
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "a.img")
        image = sealed_image(path, layout)
        content = {entry.name: bytes(image.entry_view(entry.name)) for entry in layout.entries}
        image.close()
        again = ImageFile.open(path)
        assert again.layout == layout == read_layout(path)
        assert again.generation == GENERATION
        assert all(again.verify())
        assert [Entry(e.name, e.dtype, e.shape, e.nbytes, e.info) for e in again.layout.entries] == entries
        assert {e.name: bytes(again.view(e.offset, e.nbytes)) for e in again.layout.entries} == content
        assert again.layout.meta == {
            k: v for k, v in {**meta, **META}.items() if k not in ("format", "generation", "entries")
        }
        again.close()
        with safe_open(path, "np") as file:
            assert set(file.keys()) >= set(content)
            for entry in entries:
                if entry.dtype != "BF16":
                    assert file.get_tensor(entry.name).tobytes() == content[entry.name]


@settings(deadline=None, max_examples=60)
@given(entries=entry_lists())
def test_geometry(entries: list[Entry]) -> None:
    layout = plan_layout(entries, META)
    assert layout.data_offset % 4096 == 0
    assert all(entry.offset % 64 == 0 for entry in layout.entries)
    assert layout.trailer_offset % 64 == 0
    assert layout.total_bytes == layout.trailer_offset + 8 * layout.n_blocks + FOOTER_BYTES
    at = 0
    for offset, nbytes, _ in layout.segments():
        assert offset == at
        at += nbytes
    assert at == layout.trailer_offset


def test_safetensors_sees_generation_and_meta(image: ImageFile) -> None:
    with safe_open(image.path, "np") as file:
        metadata = file.metadata()
        assert Generation.parse(metadata["generation"]) == GENERATION
        assert metadata["format"] == "outlast-image-1"
        assert {key: metadata[key] for key in META} == META
        assert json.loads(metadata["entries"]) == [{"offset": [0]}, {}]
        assert file.get_slice("w").get_shape() == [150_001]


def damage(content: bytes, position: int, flip: int, folder: str) -> tuple[str, list[int]]:
    """Where a reader finds that one byte was changed: ("open" | "seal" | "trailer" | "block", the bad blocks)."""
    path = pathlib.Path(folder, "a.img")
    changed = bytearray(content)
    changed[position] ^= flip
    path.write_bytes(changed)
    try:
        image = ImageFile.open(path)
    except ImageError:
        return "open", []
    try:
        verdict = image.verify() if image.sealed else []
    except ImageError:
        return "trailer", []
    finally:
        image.close()
    return ("block" if verdict else "seal"), [index for index, good in enumerate(verdict) if not good]


@settings(deadline=None, max_examples=200)
@given(data=st.data(), flip=st.integers(1, 255), region=st.sampled_from(["header", "data", "checksums", "footer"]))
def test_every_changed_byte_is_found_and_located(
    sealed_bytes: bytes, data: st.DataObject, flip: int, region: str
) -> None:
    layout = small_layout()
    bounds = {
        "header": (0, layout.data_offset),
        "data": (layout.data_offset, layout.trailer_offset),
        "checksums": (layout.trailer_offset, layout.total_bytes - FOOTER_BYTES),
        "footer": (layout.total_bytes - FOOTER_BYTES, layout.total_bytes),
    }[region]
    position = data.draw(st.integers(bounds[0], bounds[1] - 1))
    with tempfile.TemporaryDirectory() as folder:
        where, bad = damage(sealed_bytes, position, flip, folder)
    expected = {"data": {"block"}, "header": {"open", "block"}, "checksums": {"trailer"}, "footer": {"seal"}}[region]
    assert where in expected
    if where == "block":
        assert bad == [position // BLOCK]


def test_a_changed_generation_is_nonsense(sealed_bytes: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert damage(sealed_bytes, GENERATION_OFFSET, 1, folder) == ("open", [])


def test_begin_breaks_the_seal_first(image: ImageFile) -> None:
    reader = ImageFile.open(image.path)
    newer = Generation(3, 1300, GENERATION.incarnation)
    image.begin(newer)
    assert not reader.sealed
    assert reader.generation is None
    with pytest.raises(ImageError, match="not sealed"):
        reader.verify()
    image.seal(block_checksums(image.view(0, image.layout.trailer_offset)))
    assert reader.generation == newer
    assert all(reader.verify())
    reader.close()


def test_create_reuses_in_place_and_keeps_the_seal(image: ImageFile) -> None:
    inode = image.path.stat().st_ino
    again = ImageFile.create(image.path, small_layout())
    assert image.path.stat().st_ino == inode
    assert again.generation == GENERATION
    again.close()


def test_create_makes_a_new_file_for_another_layout_or_when_asked(image: ImageFile) -> None:
    inode = image.path.stat().st_ino
    fresh = ImageFile.create(image.path, small_layout(), fresh=True)
    assert image.path.stat().st_ino != inode
    assert not fresh.sealed
    image.begin(Generation(9, 9, "f" * 16))  # the old writer: its file is not this one any more
    assert fresh.layout == read_layout(image.path)
    other = plan_layout([Entry("x", "U8", (8,), 8)], META)
    assert ImageFile.create(image.path, other).layout == read_layout(image.path) == other
    fresh.close()


def test_full_file_system(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = tmp_path / "slot-0-0.img"
    with pytest.raises(CapacityError, match=r"slot-0-0\.img needs \d+ bytes .* \d+ bytes are missing"):
        ImageFile.create(path, small_layout())
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 5000, b"\0" * 8192, b"{" * 9000])
def test_nonsense_is_an_image_error(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "slot-0-0.img"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"slot-0-0\.img"):
        ImageFile.open(path)
    with pytest.raises(ImageError, match=r"slot-0-0\.img"):
        read_layout(path)


def test_cut_off_file(sealed_bytes: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(sealed_bytes[:-1])
    with pytest.raises(ImageError):
        ImageFile.open(path)


def test_views_outlive_close_and_stay_inside(image: ImageFile) -> None:
    view = image.entry_view("s")
    with pytest.raises(ValueError, match="has no bytes"):
        image.view(image.layout.total_bytes - 1, 2)
    content = bytes(view)
    image.close()
    assert bytes(view) == content


def test_readers_cannot_write(image: ImageFile) -> None:
    reader = ImageFile.open(image.path)
    with pytest.raises(TypeError):
        reader.begin(GENERATION)
    with pytest.raises(TypeError):
        reader.entry_view("s")[0] = 1
    writer = ImageFile.open(image.path, writable=True)
    writer.entry_view("s")[0] ^= 1
    assert reader.verify().count(False) == 1


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([Entry("a", "U8", (1,), 1), Entry("a", "U8", (1,), 1)], "used twice"),
        ([Entry("__pad__.0", "U8", (1,), 1)], "reserved"),
        ([Entry("a", "Q4", (1,), 1)], "dtype 'Q4'"),
        ([Entry("a", "F32", (3,), 11)], "has 12 bytes, not 11"),
    ],
)
def test_entries_that_cannot_be(entries: list[Entry], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plan_layout(entries, META)


def test_seal_wants_every_checksum(image: ImageFile) -> None:
    with pytest.raises(ValueError, match="blocks"):
        image.seal(np.zeros(1, np.uint64))
