"""How fast a rank's state reaches its image, hashed, compared with a plain memcpy into the same pages.

    python benchmarks/copy_rate.py [--megabytes 400] [--tensors 340] [--rounds 9] [--dir /dev/shm]

Prints medians and the ratios; the copy should reach at least 70% of memcpy.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from outlast.snapshot.copier import Copier, Piece
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import Entry, ImageFile, plan_layout
from outlast.snapshot.kernel import Kernel, NativeKernel, PortableKernel, copy_and_hash, default_kernel, make_segments

TARGET = 0.70


def make_tensors(total_bytes: int, count: int) -> list[torch.Tensor]:
    """``count`` float32 tensors as a transformer has them: a few large ones, many small, three alike for AdamW."""
    weights = np.array([[16.0, 4.0, 4.0, 0.01, 0.003][index % 5] for index in range(count)])
    sizes = np.maximum(weights / weights.sum() * total_bytes // 4, 1).astype(int)
    return [torch.rand(int(size)) for size in sizes]


def seconds(action: Callable[[], object], rounds: int) -> float:
    """The median of ``rounds`` runs after one to warm up."""
    action()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@dataclass(frozen=True)
class Subject:
    """What is copied, and the warm image that it is copied into."""

    image: ImageFile
    pieces: list[Piece]

    @property
    def total_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def address(self, piece: Piece) -> int:
        return self.image.address + self.image.layout.entry(piece.entry).offset


def measure_memcpy(subject: Subject, rounds: int) -> dict[str, float]:
    """libc's memcpy of as many bytes, in one call and in one call a tensor."""
    flat = np.ones(subject.total_bytes, np.uint8)
    start = subject.image.address + subject.image.layout.data_offset
    calls = [(subject.address(piece), piece.tensor.data_ptr(), piece.nbytes) for piece in subject.pieces]

    def each() -> None:
        for call in calls:
            ctypes.memmove(*call)

    return {
        "memcpy, one call": seconds(lambda: ctypes.memmove(start, flat.ctypes.data, flat.size), rounds),
        "memcpy, each tensor": seconds(each, rounds),
    }


def measure_kernel(subject: Subject, kernel: Kernel, rounds: int) -> float:
    """The copy kernel over the whole file, header and pads included."""
    layout = subject.image.layout
    sources = {piece.entry: piece.tensor.data_ptr() for piece in subject.pieces}
    segments = make_segments(
        [(offset, sources.get(name or "", 0), nbytes) for offset, nbytes, name in layout.segments()]
    )
    sums = np.zeros(layout.n_blocks, np.uint64)
    return seconds(lambda: copy_and_hash(segments, subject.image.address, checksums=sums, kernel=kernel), rounds)


def measure_copier(subject: Subject, rounds: int) -> dict[str, float]:
    """A snapshot as a rank takes it: begin, copy and hash in the background, seal; and how long the caller is held."""
    copier, stalls, steps = Copier(), [], itertools.count(1)

    def snapshot() -> None:
        started = time.perf_counter()
        ticket = copier.start(subject.image, Generation(1, next(steps), "0" * 16), {}, subject.pieces)
        stalls.append(time.perf_counter() - started)
        ticket.wait(60)

    sealed = seconds(snapshot, rounds)
    copier.close()
    return {"copier, start to sealed": sealed, "copier, start() alone": statistics.median(stalls)}


def measure(folder: pathlib.Path, total_bytes: int, count: int, rounds: int) -> dict[str, float]:
    """Seconds by name of what was measured."""
    tensors = make_tensors(total_bytes, count)
    entries = [Entry(f"t{i}", "F32", (t.numel(),), t.nbytes, {"leaf": f"t{i}"}) for i, t in enumerate(tensors)]
    pieces = [Piece(f"t{i}", tensor, 0, tensor.nbytes) for i, tensor in enumerate(tensors)]
    started = time.perf_counter()
    image = ImageFile.create(folder / "slot-0-0.img", plan_layout(entries, {"kind": "shard"}))
    result = {"create (cold pages)": time.perf_counter() - started}
    subject = Subject(image, pieces)
    result |= measure_memcpy(subject, rounds)
    result["kernel"] = measure_kernel(subject, default_kernel(), rounds)
    result["kernel without native"] = measure_kernel(subject, PortableKernel(), rounds)
    result |= measure_copier(subject, rounds)
    result["verify"] = seconds(image.verify, rounds)
    image.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--tensors", type=int, default=340)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path("/dev/shm"))
    options = parser.parse_args()
    total = options.megabytes * 10**6
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="outlast-copy-") as folder:
        times = measure(pathlib.Path(folder), total, options.tensors, options.rounds)
    native = isinstance(default_kernel(), NativeKernel)
    print(f"{options.megabytes} MB, {options.tensors} tensors, native kernel: {native}")
    for name, value in times.items():
        print(f"{name:26} {value * 1e3:9.2f} ms {total / value / 1e9:8.1f} GB/s")
    ratio = times["memcpy, each tensor"] / times["copier, start to sealed"]
    verdict = "reached" if ratio >= TARGET else "missed"
    print(f"copy, hash and seal at {ratio:.0%} of memcpy (target {TARGET:.0%}: {verdict})")
    print(f"kernel alone at {times['memcpy, one call'] / times['kernel']:.0%} of memcpy in one call")


if __name__ == "__main__":
    main()
