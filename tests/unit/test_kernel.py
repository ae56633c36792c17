"""The copy kernels: both against the xxhash package and each other, whatever the sizes, the cuts and the alignment."""

from __future__ import annotations

import ctypes
import pathlib
import platform
import shutil
import subprocess
import threading
import time

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.snapshot import kernel as kernel_module
from outlast.snapshot.kernel import (
    BLOCK,
    Kernel,
    NativeKernel,
    PortableKernel,
    block_count,
    copy_and_hash,
    default_kernel,
    xxh64_blocks,
)

SOURCE = pathlib.Path(kernel_module.__file__).with_name("_kernel.c")
COMPILER = shutil.which("cc")
VARIANTS = {"native": [], "sse2": ["-DKERNEL_STORES=1"], "plain": ["-DKERNEL_STORES=0"]}


@pytest.fixture(scope="module", params=["portable", *VARIANTS])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    if request.param == "portable":
        return PortableKernel()
    if COMPILER is None:
        pytest.skip("no C compiler")
    if request.param == "sse2" and platform.machine() != "x86_64":
        pytest.skip("SSE2 is x86")
    library = tmp_path_factory.mktemp("kernel") / "_kernel.so"
    command = [COMPILER, "-O3", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *VARIANTS[request.param]]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
    return NativeKernel(ctypes.CDLL(str(library)))


def digests(data: bytes, block: int) -> list[int]:
    return [xxhash.xxh64_intdigest(data[at : at + block]) for at in range(0, len(data), block)]


def aligned(nbytes: int, shift: int = 0) -> np.ndarray:
    """A zeroed array whose address is ``shift`` past a multiple of 64."""
    room = np.zeros(nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + shift
    return room[start : start + nbytes]


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 8, 31, 32, 33, 63, 64, 65, 100, 1000, 4096, 70001])
def test_hash_agrees_with_the_xxhash_package(kernel: Kernel, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    for block in (64, 100, 4096, BLOCK):
        sums = np.zeros(block_count(size, block), np.uint64)
        xxh64_blocks(data.ctypes.data, size, sums, block=block, kernel=kernel)
        assert sums.tolist() == digests(data.tobytes(), block)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 200), st.sampled_from([64, 4096, 4160, 20000])), max_size=12),
    kinds=st.lists(st.sampled_from(["copy", "zero", "there"]), min_size=12, max_size=12),
    shifts=st.lists(st.integers(0, 63), min_size=12, max_size=12),
    block=st.sampled_from([64, 96, 256, 4096, 10000]),
    base_shift=st.sampled_from([0, 0, 1, 32]),
)
def test_copy_any_segments(
    kernel: Kernel, lengths: list[int], kinds: list[str], shifts: list[int], block: int, base_shift: int
) -> None:
    out = aligned(sum(lengths) + 64, base_shift)
    out[:] = 255
    rng = np.random.default_rng(len(lengths))
    segments, keep, wanted = [], [], b""
    for length, kind, shift in zip(lengths, kinds, shifts, strict=False):
        source = aligned(length, shift)
        source[:] = rng.integers(0, 256, length, dtype=np.uint8) if kind == "copy" else 0
        address = source.ctypes.data
        if kind != "copy":
            address = 0 if kind == "zero" else out.ctypes.data + len(wanted)
        wanted_bytes = b"\xff" * length if kind == "there" else source.tobytes()
        segments.append((len(wanted), address, length))
        keep.append(source)
        wanted += wanted_bytes
    sums, progress = np.zeros(block_count(len(wanted), block), np.uint64), np.zeros(1, np.uint64)
    copy_and_hash(segments, out.ctypes.data, checksums=sums, block=block, progress=progress, kernel=kernel)
    assert out[: len(wanted)].tobytes() == wanted
    assert out[len(wanted) :].tobytes() == b"\xff" * 64, "wrote past the end"
    assert sums.tolist() == digests(wanted, block)
    assert progress[0] == len(wanted)


def test_refuses_holes_and_wrong_room() -> None:
    out, sums = np.zeros(128, np.uint8), np.zeros(1, np.uint64)
    with pytest.raises(ValueError, match="holes"):
        copy_and_hash([(0, 0, 10), (20, 0, 10)], out.ctypes.data, checksums=sums)
    with pytest.raises(ValueError, match="holes"):
        copy_and_hash([(8, 0, 10)], out.ctypes.data, checksums=sums)
    with pytest.raises(ValueError, match="1 elements"):
        copy_and_hash([(0, 0, 10)], out.ctypes.data, checksums=np.zeros(2, np.uint64))


def test_default_kernel_without_a_usable_library(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (None, b"not a library"):
        library = tmp_path / "_kernel.so"
        if content is not None:
            library.write_bytes(content)
        monkeypatch.setattr(kernel_module, "_LIBRARY", library)
        assert isinstance(default_kernel.__wrapped__(), PortableKernel)


def test_the_native_call_holds_no_gil(kernel: Kernel) -> None:
    """A Python loop goes on while a long native call runs in another thread."""
    if isinstance(kernel, PortableKernel):
        pytest.skip("the portable kernel comes back to Python for every block")
    source, out = np.ones(64 * 2**20, np.uint8), np.zeros(64 * 2**20, np.uint8)
    sums, progress = np.zeros(block_count(source.size), np.uint64), np.zeros(1, np.uint64)
    seen = set()

    def copy() -> None:
        for _ in range(5):
            copy_and_hash(
                [(0, source.ctypes.data, source.size)],
                out.ctypes.data,
                checksums=sums,
                progress=progress,
                kernel=kernel,
            )

    thread = threading.Thread(target=copy)
    thread.start()
    while thread.is_alive():
        seen.add(int(progress[0]))
        time.sleep(0)
    thread.join()
    assert len(seen) > 5
