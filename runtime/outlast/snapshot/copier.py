"""Fill a rank's image in the background, while the training thread computes.

``Copier.start`` writes the small eager parts at once and hands the rest to one worker thread, which makes one native
call for the whole file (``outlast.snapshot.kernel``: it needs no GIL, so a busy main thread cannot starve it) and then
seals the image. Whoever is about to change a tensor that is still being copied waits on the ticket first.

The worker calls no torch operator for tensors in host memory. That is on purpose: they would have to be limited by
``torch.set_num_threads(1)``, which every thread made later would inherit, and thread counts decide bits.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from outlast.clock import Clock, SystemClock
from outlast.errors import SnapshotError, StateError
from outlast.snapshot.cuda import CudaTransfer
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import ImageFile
from outlast.snapshot.kernel import BytesLike, Segments, byte_view, copy_and_hash, make_segments


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """Bytes [byte_start, byte_stop) of a contiguous local tensor: all of one entry of the image."""

    entry: str
    tensor: torch.Tensor
    byte_start: int
    byte_stop: int

    @property
    def nbytes(self) -> int:
        return self.byte_stop - self.byte_start


class DeviceTransfer(Protocol):
    """Brings pieces that are not in host memory into the image. ``begin`` runs in the training thread, ``run`` in the
    worker, later; after ``run`` the bytes are there."""

    def begin(self, pieces: Sequence[Piece]) -> None: ...

    def run(self, image: ImageFile, pieces: Sequence[Piece]) -> None: ...

    def close(self) -> None: ...


class CopyTicket:
    """One copy under way, or done."""

    def __init__(self, image: ImageFile, generation: Generation) -> None:
        self.image = image
        self.generation = generation
        self.seconds = 0.0
        """How long the background part took, sealing included; 0 until it is done."""
        self._progress = np.zeros(1, np.uint64)
        self._future: Future[None] | None = None

    @property
    def copied_bytes(self) -> int:
        """Bytes of the image written and hashed so far."""
        return int(self._progress[0])

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future is not None and self._future.done()

    def wait(self, timeout: float | None = None) -> None:
        """Sleep until the image is sealed. Raises the copy's error, or TimeoutError after ``timeout`` seconds."""
        assert self._future is not None
        wait([self._future], timeout)
        if not self._future.done():
            raise TimeoutError(
                f"the copy of generation {self.generation} to {self.image.path} did not end within {timeout} s: "
                f"{self.copied_bytes} of {self.image.layout.trailer_offset} bytes are there"
            )
        self._future.result()


class Copier:
    """Copies snapshots, one after the other, in one long-lived worker thread. Call it from one thread.

    ``close`` waits for the copy under way; so does the interpreter's exit.
    """

    def __init__(self, clock: Clock | None = None, device: DeviceTransfer | None = None) -> None:
        self._clock = clock or SystemClock()
        self._device = device or CudaTransfer()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="outlast-copier")
        self._templates: weakref.WeakKeyDictionary[ImageFile, _Template] = weakref.WeakKeyDictionary()
        self._latest: weakref.WeakKeyDictionary[ImageFile, CopyTicket] = weakref.WeakKeyDictionary()

    def start(
        self, image: ImageFile, generation: Generation, eager: Mapping[str, BytesLike], lazy: Sequence[Piece]
    ) -> CopyTicket:
        """Begin ``generation`` in ``image``; returns when the ``eager`` entries are copied and the rest is under way.

        Every entry that has bytes is in exactly one of ``eager`` and ``lazy``, with all of its bytes. Until the ticket
        is done nobody may change the bytes of ``lazy`` tensors; their storages are kept alive.

        Raises StateError when what is given does not fit the layout, SnapshotError when the image is being filled.
        """
        latest = self._latest.get(image)
        if latest is not None and not latest.done():
            raise SnapshotError(f"{image.path} is still being filled with generation {latest.generation}")
        template = self._templates.get(image)
        if template is None:
            template = self._templates[image] = _Template(image)
        job = template.job(image, generation, eager, lazy)
        image.begin(generation)
        for name, data in eager.items():
            image.entry_view(name)[:] = byte_view(data)
        self._device.begin(job.remote)
        ticket = CopyTicket(image, generation)
        ticket._future = self._worker.submit(self._run, job, ticket)
        self._latest[image] = ticket
        return ticket

    def _run(self, job: _Job, ticket: CopyTicket) -> None:
        started = self._clock.monotonic()
        image = ticket.image
        if job.remote:
            self._device.run(image, job.remote)
        checksums = np.zeros(image.layout.n_blocks, np.uint64)
        copy_and_hash(job.segments, image.address, checksums=checksums, progress=ticket._progress)
        image.seal(checksums)
        ticket.seconds = self._clock.monotonic() - started

    def close(self) -> None:
        """Wait for the copy under way and end the worker."""
        self._worker.shutdown(wait=True)
        self._device.close()


@dataclass(frozen=True)
class _Job:
    """One pass over a file. ``keep`` holds the memory that the segments point to, the image's own included."""

    segments: Segments
    remote: Sequence[Piece]
    keep: Sequence[object]


class _Template:
    """The segments of an image when every entry is in place already; a job only fills in where lazy ones come from."""

    def __init__(self, image: ImageFile) -> None:
        self._path = image.path
        self._row_of: dict[str, int] = {}
        self._bytes_of: dict[str, int] = {}
        rows: list[tuple[int, int, int]] = []
        for offset, nbytes, name in image.layout.segments():
            if name is not None:
                self._row_of[name] = len(rows)
                self._bytes_of[name] = nbytes
            rows.append((offset, image.address + offset if name is not None else 0, nbytes))
        self._table = make_segments(rows)
        self._needed = frozenset(name for name, nbytes in self._bytes_of.items() if nbytes)
        self._last: tuple[Sequence[Piece], frozenset[str], _Job] | None = None

    def job(
        self, image: ImageFile, generation: Generation, eager: Mapping[str, BytesLike], lazy: Sequence[Piece]
    ) -> _Job:
        self._check_entries(eager, lazy)
        header = np.frombuffer(image.layout.header_of(generation), np.uint8)
        keep: list[object] = [image.view(0, image.layout.total_bytes), header]
        rows, sources, remote = [0], [header.ctypes.data], []
        for piece in lazy:
            tensor = piece.tensor
            if not tensor.is_contiguous() or not 0 <= piece.byte_start <= piece.byte_stop <= tensor.nbytes:
                raise self._unfit(piece)
            if tensor.is_cpu:
                rows.append(self._row_of[piece.entry])
                sources.append(tensor.data_ptr() + piece.byte_start)
                keep.append(tensor.untyped_storage())
            else:
                remote.append(piece)
        segments = self._table.copy()
        segments["source"][rows] = sources
        return _Job(segments, remote, keep)

    def _check_entries(self, eager: Mapping[str, BytesLike], lazy: Sequence[Piece]) -> None:
        given = {piece.entry: piece.byte_stop - piece.byte_start for piece in lazy}
        for name, data in eager.items():
            given[name] = data.nbytes if isinstance(data, np.ndarray) else memoryview(data).nbytes
        if len(given) != len(eager) + len(lazy):
            raise StateError(f"{self._path}: an entry is given more than once, as eager or lazy")
        if not given.items() <= self._bytes_of.items():
            name = next(name for name, nbytes in given.items() if self._bytes_of.get(name) != nbytes)
            wanted = self._bytes_of.get(name, "no")
            raise StateError(f"{self._path}: entry {name!r} has {wanted} bytes in the layout, {given[name]} are given")
        if missing := self._needed - given.keys():
            raise StateError(f"{self._path}: nothing is given for {', '.join(sorted(missing))}")

    def _unfit(self, piece: Piece) -> StateError:
        return StateError(
            f"{self._path}: entry {piece.entry!r} needs bytes [{piece.byte_start}, {piece.byte_stop}) of a contiguous "
            f"tensor; this one has {piece.tensor.nbytes} bytes and strides {piece.tensor.stride()}"
        )
