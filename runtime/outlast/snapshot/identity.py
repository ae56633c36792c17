"""Who a snapshot is: the identity of an attempt and of a generation.

A number alone does not identify an attempt (two controllers may both think they are next), so it carries a random
incarnation. Numbers order, incarnations identify.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Attempt:
    """One start of all ranks: a growing number and 16 random hexadecimal digits. Compare for equality."""

    number: int
    incarnation: str

    def __str__(self) -> str:
        return f"{self.number}-{self.incarnation}"

    @classmethod
    def parse(cls, text: str) -> Attempt:
        """Read ``str(attempt)`` back. Raises ValueError."""
        number, incarnation = text.strip().split("-")
        return cls(int(number), incarnation)


@dataclass(frozen=True, order=True)
class Generation:
    """One snapshot: the attempt that took it and the number of steps done then. Greater is newer.

    Training resumes from it with the step of index ``step``.
    """

    attempt: int
    step: int
    incarnation: str

    def __str__(self) -> str:
        return f"{self.attempt}-{self.incarnation}-{self.step}"

    @classmethod
    def parse(cls, text: str) -> Generation:
        """Read ``str(generation)`` back. Raises ValueError."""
        attempt, incarnation, step = text.strip().split("-")
        return cls(int(attempt), int(step), incarnation)

    @classmethod
    def of(cls, attempt: Attempt, step: int) -> Generation:
        return cls(attempt.number, step, attempt.incarnation)

    def taken_by(self, attempt: Attempt) -> bool:
        """Whether ``attempt`` took it."""
        return (self.attempt, self.incarnation) == (attempt.number, attempt.incarnation)

    def same_attempt(self, other: Generation) -> bool:
        """Whether one attempt took both."""
        return (self.attempt, self.incarnation) == (other.attempt, other.incarnation)
