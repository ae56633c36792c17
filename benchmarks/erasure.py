"""Reed-Solomon on one core against memcpy beside it: data bytes a second, as a ratio.

    PYTHONPATH=runtime python benchmarks/erasure.py [--megabytes 64] [--rounds 7] [--pieces 32,64,128,256]

Chunks are shared memory, as a keeper's images are, and together far larger than any cache. A round runs two memmoves of
all data and keeps the faster, then encode and decode with each piece size; a ratio is taken within a round, and the
median over rounds is printed. "decode 2" loses two data chunks, "decode 1" one. Targets: 60% for 4+2, 45% for 2+2.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np

from outlast.snapshot.codec import PIECE, Bytes, Codec

TARGETS = {(4, 2): 0.60, (2, 2): 0.45}
KIB = 1024


@dataclass(frozen=True)
class Stripe:
    """One stripe's chunks: k of data, m of parity, and room for a copy of the data."""

    k: int
    m: int
    chunks: list[Bytes]
    data: Bytes
    copy: Bytes

    @classmethod
    def random(cls, k: int, m: int, chunk: int) -> Stripe:
        """Random data; every page of every buffer has been written."""
        data, parity, copy = shared(k * chunk), shared(m * chunk), shared(k * chunk)
        noise = np.random.default_rng(0).integers(0, 256, chunk, np.uint8)
        for start in range(0, data.size, chunk):
            data[start : start + chunk] = np.roll(noise, start // chunk)
        parity.fill(1)
        copy.fill(1)
        cut = [whole[i : i + chunk] for whole in (data, parity) for i in range(0, whole.size, chunk)]
        return cls(k, m, cut, data, copy)

    def memcpy(self) -> None:
        ctypes.memmove(self.copy.ctypes.data, self.data.ctypes.data, self.data.size)

    def encode(self, codec: Codec) -> None:
        codec.encode(self.chunks[: self.k], self.chunks[self.k :])

    def decode(self, codec: Codec, losses: int) -> None:
        """Rebuild the first ``losses`` data chunks into the room for the copy."""
        present = {index: self.chunks[index] for index in range(losses, losses + self.k)}
        chunk = self.chunks[0].size
        codec.decode(present, range(losses), [self.copy[i * chunk : (i + 1) * chunk] for i in range(losses)])


def shared(size: int) -> Bytes:
    """Shared anonymous memory: pages like those of tmpfs."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def rate(work: Callable[[], None], nbytes: int) -> float:
    """Bytes a second of one call."""
    start = time.perf_counter()
    work()
    return nbytes / (time.perf_counter() - start)


def rounds(stripe: Stripe, pieces: list[int], count: int) -> Iterator[dict[tuple[str, int], tuple[float, float]]]:
    """For each round, by (operation, piece): bytes a second, and that over the same round's memcpy."""
    nbytes = stripe.data.size
    codecs = {piece: Codec(stripe.k, stripe.m, piece) for piece in pieces}
    for _ in range(count):
        base = max(rate(stripe.memcpy, nbytes) for _ in range(2))
        found = {("memcpy", 0): (base, 1.0)}
        for piece, codec in codecs.items():
            for name, work in (
                ("encode", lambda codec=codec: stripe.encode(codec)),
                ("decode 2", lambda codec=codec: stripe.decode(codec, 2)),
                ("decode 1", lambda codec=codec: stripe.decode(codec, 1)),
            ):
                speed = rate(work, nbytes)
                found[name, piece] = (speed, speed / base)
        yield found


def main() -> None:
    """Print one table row for each code, operation and piece size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="MiB of one chunk (default 64)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pieces", default="32,64,128,256", help="KiB, separated by commas")
    options = parser.parse_args()
    pieces = [int(text) * KIB for text in options.pieces.split(",")]
    print("| code | operation | piece KiB | GB/s | of memcpy | target |\n|---|---|---|---|---|---|")
    for (k, m), target in TARGETS.items():
        runs = list(rounds(Stripe.random(k, m, options.megabytes * KIB * KIB), pieces, options.rounds))
        for name, piece in runs[0]:
            speed = median(run[name, piece][0] for run in runs) / 1e9
            ratio = median(run[name, piece][1] for run in runs)
            size = f"{piece // KIB}{' (default)' if piece == PIECE else ''}" if piece else ""
            verdict = f"{target:.0%} {'met' if ratio >= target else 'MISSED'}" if piece else ""
            print(f"| {k}+{m} | {name} | {size} | {speed:.1f} | {ratio:.0%} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
