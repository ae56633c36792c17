"""Which cluster, as whom and in which namespace: what a person may say, as kubectl has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Where:
    """``None``: as the kubeconfig says, by its current context."""

    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None

    def over(self, other: Where) -> Where:
        """This, and where it says nothing the other."""
        return Where(
            self.namespace or other.namespace, self.context or other.context, self.kubeconfig or other.kubeconfig
        )
