"""What one pass decides about a job: its stage, why, and what is to be done. Values only.

The stages (``ending``, ``suspending``, ``active``) answer with a ``Decision``; ``conditions`` writes it
into the status.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outlast.jobstatus import Phase, TrainingJobStatus
from outlast_operator.model import Action, Happening

Truth = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class Word:
    """Why something is so: one word in CamelCase, and a sentence."""

    reason: str
    message: str = ""


@dataclass(frozen=True)
class Decision:
    """``status``: with what the stage keeps in it, and without conditions; ``why``: of the phase, and of Ready;
    ``ready`` None: as the phase has it; ``suspended``: of that condition, where there is more to say than the phase;
    ``waits``: wall times at which to look again.
    """

    phase: Phase
    why: Word
    status: TrainingJobStatus
    actions: tuple[Action, ...] = ()
    happenings: tuple[Happening, ...] = ()
    ready: Truth | None = None
    suspended: Word | None = None
    waits: tuple[float, ...] = ()
