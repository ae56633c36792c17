"""From a CUDA device straight into the mapped image: page-locked mapping, side stream, event.

The mapping is registered with the driver once (``cudaHostRegister``), so that copies run at the link's speed beside the
computation. They are ordered after all work that the training thread had enqueued at the boundary.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from outlast.snapshot.image import ImageFile

if TYPE_CHECKING:
    from outlast.snapshot.copier import Piece


class CudaTransfer:
    """Copies pieces on CUDA devices into images (``outlast.snapshot.copier.DeviceTransfer``)."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._boundary: dict[torch.device, torch.cuda.Event] = {}
        self._targets: weakref.WeakKeyDictionary[ImageFile, _Target] = weakref.WeakKeyDictionary()

    def begin(self, pieces: Sequence[Piece]) -> None:
        """Mark the boundary on every device's current stream."""
        for device in {piece.tensor.device for piece in pieces}:
            self._boundary[device] = torch.cuda.current_stream(device).record_event()

    def run(self, image: ImageFile, pieces: Sequence[Piece]) -> None:
        """Copy ``pieces`` to their entries and wait for it."""
        target = self._targets.get(image)
        if target is None:
            target = self._targets[image] = _Target(image)
        for device in {piece.tensor.device for piece in pieces}:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream.wait_event(self._boundary[device])
            with torch.cuda.stream(stream):
                for piece in (piece for piece in pieces if piece.tensor.device == device):
                    offset = image.layout.entry(piece.entry).offset
                    source = piece.tensor.detach().reshape(-1).view(torch.uint8)[piece.byte_start : piece.byte_stop]
                    target.bytes[offset : offset + piece.nbytes].copy_(source, non_blocking=True)
            stream.synchronize()

    def close(self) -> None:
        """Unlock the images' pages."""
        for target in list(self._targets.values()):
            target.release()
        self._targets.clear()


class _Target:
    """An image's mapping as a page-locked tensor; unlocked by ``release`` or when the image is gone."""

    def __init__(self, image: ImageFile) -> None:
        self.bytes = torch.frombuffer(image.view(0, image.layout.total_bytes), dtype=torch.uint8)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(int(runtime.cudaHostRegister(self.bytes.data_ptr(), self.bytes.numel(), 0)))
        self.release = weakref.finalize(image, _unregister, self.bytes)


def _unregister(target: torch.Tensor) -> None:
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(int(runtime.cudaHostUnregister(target.data_ptr())))
