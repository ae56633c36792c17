"""Text that every machine has: the Python standard library's own sources, in a fixed order."""

from __future__ import annotations

import pathlib
import sysconfig

import numpy as np
import torch

PACKAGES = ("", "asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging",
            "multiprocessing", "unittest", "urllib", "xml/dom", "xml/etree")  # fmt: skip


def load_corpus() -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) bytes as uint8 arrays, several megabytes in all; every 20th file is held out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [file for package in PACKAGES for file in sorted((root / package).glob("*.py"))]
    held_out = [file.read_bytes() for file in files[7::20]]
    training = [file.read_bytes() for number, file in enumerate(files) if number % 20 != 7]
    return np.frombuffer(b"".join(training), np.uint8), np.frombuffer(b"".join(held_out), np.uint8)


class ByteWindows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Sequences of ``context`` bytes and the bytes that follow each of them; every position starts a sequence."""

    def __init__(self, text: np.ndarray, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return len(self.text) - self.context - 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = torch.from_numpy(self.text[index : index + self.context + 1].astype(np.int64))
        return window[:-1], window[1:]

    def batch(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self[index] for index in indices]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    def frequency_entropy(self, training: np.ndarray) -> float:
        """Cross-entropy in nats a byte of this text under the training text's byte frequencies."""
        counts = np.bincount(training, minlength=256) + 1
        log_frequency = np.log(counts / counts.sum())
        return float(-log_frequency[self.text].mean())
