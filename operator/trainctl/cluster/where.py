"""Which cluster, as whom and in which namespace: what a person may say, as kubectl has it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from outlast.errors import RequestError

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Where:
    """``None``: as the kubeconfig says, by its current context."""

    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None

    def __post_init__(self) -> None:
        if self.namespace:
            check_namespace(self.namespace)

    def over(self, other: Where) -> Where:
        """This, and where it says nothing the other."""
        return Where(
            self.namespace or other.namespace, self.context or other.context, self.kubeconfig or other.kubeconfig
        )


def check_namespace(name: str) -> None:
    """Raises RequestError for what can name no namespace: it is put into paths as it is."""
    if not _LABEL.fullmatch(name):
        raise RequestError(
            f'"{name}" is no name of a namespace: at most 63 of a-z, 0-9 and -, with a letter or digit at either end'
        )
