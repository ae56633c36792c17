"""What to do, as small functions over values: restart or give up, who sits where, when to snapshot, is this a hang.

Nothing here keeps a clock, and only ``RestartBudget`` keeps anything at all.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from outlast.snapshot.identity import Generation

# --- restart or give up ---------------------------------------------------------------------------------------------

SAME_ERROR_LIMIT = 3
"""As often the same error at the same step is the script's own."""


@dataclass(frozen=True)
class Verdict:
    """Restart after ``delay_s``, or give up because of ``reason``."""

    delay_s: float
    reason: str | None = None


@dataclass
class RestartBudget:
    """How many restarts are allowed: ``max_restarts`` within ``window_s``, with exponential backoff between those that
    bring nothing. An attempt that did a step nobody had done before ends the backoff. ``times``: the restarts that
    count; ``errors``: how often each (steps done, signature) was seen.
    """

    max_restarts: int
    window_s: float
    first_delay_s: float = 1.0
    longest_delay_s: float = 60.0
    times: deque[float] = field(default_factory=deque)
    errors: Counter[tuple[int, str]] = field(default_factory=Counter)
    _fruitless: int = 0

    def recall(self, times: Iterable[float], errors: Mapping[tuple[int, str], int]) -> None:
        """What counts from before: when there were restarts, and how often each error."""
        self.times, self.errors = deque(sorted(times)), Counter(errors)

    def restart(self, now: float, progressed: bool, error: tuple[int, str] | None) -> Verdict:
        """May the ranks be started again? ``error``: (steps done, signature) of a crash of the script's."""
        while self.times and self.times[0] <= now - self.window_s:
            self.times.popleft()
        if error is not None:
            self.errors[error] += 1
            if self.errors[error] >= SAME_ERROR_LIMIT:
                step, text = error
                times = f"{SAME_ERROR_LIMIT} times at the same place, after {step} steps"
                return Verdict(0.0, f"the script fails by itself: {text} ({times})")
        if len(self.times) >= self.max_restarts:
            return Verdict(0.0, self._used_up())
        self.times.append(now)
        self._fruitless = 0 if progressed else self._fruitless + 1
        if self._fruitless <= 1:
            return Verdict(0.0)
        return Verdict(min(self.longest_delay_s, self.first_delay_s * 2.0 ** (self._fruitless - 2)))

    def _used_up(self) -> str:
        if self.max_restarts == 0:
            return "no restart is allowed (recovery.maxRestarts)"
        many = "1 restart" if self.max_restarts == 1 else f"{self.max_restarts} restarts"
        return f"{many} within {self.window_s:.0f} s were allowed and used (recovery.maxRestarts)"


_ADDRESS = re.compile(r"0x[0-9a-fA-F]+|\b\d+\.\d+\.\d+\.\d+(:\d+)?\b|\d+")


def signature(kind: str, message: str) -> str:
    """An error's text without what differs from run to run (addresses, ports, counters), on one line."""
    line = message.strip().splitlines()[0] if message.strip() else ""
    return f"{kind}: {_ADDRESS.sub('#', line)}"[:300]


_CONNECTION = re.compile(
    r"connection (reset|closed|refused|aborted)|connection was|broken pipe|socket|ECONN|gloo|nccl|DistNetworkError"
    r"|DistBackendError|DistStoreError|TCPStore|peer closed|timed out waiting|remote process",
    re.IGNORECASE,
)


def is_collateral(kind: str, message: str) -> bool:
    """Whether an error only says that somebody else is gone: what a survivor of a collective raises."""
    return bool(_CONNECTION.search(f"{kind}: {message}"))


# --- who sits where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A node that can take a seat. ``holds``: the newest generation of each seat's images on it."""

    node: str
    domain: str
    holds: Mapping[int, Generation] = field(default_factory=dict)


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key that puts node-10 behind node-9."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)


def choose_seats(previous: Mapping[int, str], candidates: Sequence[Candidate], replicas: int) -> dict[int, str]:
    """A node for each seat, as far as there are nodes.

    Who has a seat keeps it. An empty one goes to who holds its newest images, else to a node of the domain that
    has the fewest seats, so that what fails together protects each other as little as possible.
    """
    free = {candidate.node: candidate for candidate in candidates}
    seats: dict[int, str] = {}
    for seat, node in previous.items():
        if seat < replicas and node in free:
            seats[seat] = node
    used = [free.pop(node).domain for node in seats.values()]
    _seat_holders(seats, free, used, replicas)
    empty = [seat for seat in range(replicas) if seat not in seats]
    order = _fewest_of_a_domain(free.values(), used) if seats else sorted(free, key=natural)
    seats.update(zip(empty, order, strict=False))
    return dict(sorted(seats.items()))


def _seat_holders(seats: dict[int, str], free: dict[str, Candidate], used: list[str], replicas: int) -> None:
    """Give empty seats to who holds their images, newest first; takes those nodes out of ``free``."""
    claims = [
        (generation, seat, candidate.node)
        for candidate in free.values()
        for seat, generation in candidate.holds.items()
        if seat < replicas and seat not in seats
    ]
    for _, seat, node in sorted(claims, key=lambda claim: (claim[0], natural(claim[2])), reverse=True):
        if seat not in seats and node in free:
            seats[seat] = node
            used.append(free.pop(node).domain)


def _fewest_of_a_domain(free: Iterable[Candidate], used: Sequence[str]) -> list[str]:
    """Nodes in the order in which they should take seats, when ``used`` are the domains of the taken ones."""
    counts = Counter(used)
    queues: dict[str, list[str]] = {}
    for candidate in free:
        queues.setdefault(candidate.domain, []).append(candidate.node)
    for nodes in queues.values():
        nodes.sort(key=natural, reverse=True)
    heap = [(counts[domain], natural(nodes[-1]), domain) for domain, nodes in queues.items()]
    heapq.heapify(heap)
    order = []
    while heap:
        count, _, domain = heapq.heappop(heap)
        order.append(queues[domain].pop())
        if queues[domain]:
            heapq.heappush(heap, (count + 1, natural(queues[domain][-1]), domain))
    return order


def leavers(seats: Mapping[int, str], free: Sequence[str], count: int) -> list[str]:
    """Which ``count`` nodes go when a job is made smaller: those without a seat, then those with the highest seats.

    ``free``: the nodes without a seat. Fewer than ``count`` when there are no more.
    """
    return [*sorted(free, key=natural), *(seats[seat] for seat in sorted(seats, reverse=True))][:count]


# --- when to snapshot -----------------------------------------------------------------------------------------------

LEAD_S = 0.35
"""From the decision to permit a snapshot until every rank knows: a tick, two calls, and some slack."""


def margin_steps(step_s: float | None, factor: int) -> int:
    """How many steps ahead of the ranks a permit must be; ``factor`` doubles with each permit that came too late."""
    ahead = 1 if not step_s else math.ceil(LEAD_S / step_s)
    return max(2, min(ahead, 200) + 1) * factor


def next_snapshot(
    every: int | None, first: int, last: int | None, interval_s: float, step_s: float | None, hurry: bool
) -> int:
    """The step before which the next snapshot is taken.

    ``first`` is the earliest that all ranks still hear of in time, ``last`` that of the snapshot before. ``every`` N
    means multiples of N; None follows ``interval_s``, seconds of training from one snapshot to the next. ``hurry``: as
    soon as possible.
    """
    if hurry:
        return first
    if every is not None:
        return -(-first // every) * every
    if last is None or not step_s:
        return first
    return max(first, last + max(1, math.ceil(interval_s / step_s)))


# --- is this a hang, is that a straggler ----------------------------------------------------------------------------

SHORTEST_HANG_S = 10.0
LONGEST_HANG_S = 1800.0


def hang_timeout(configured: float | None, step_s: float | None, longest_step_s: float) -> float:
    """Seconds without progress of any rank that are a hang; None is judged by the steps measured so far."""
    if configured is not None:
        return configured
    expected = max(20.0 * (step_s or 0.0), 5.0 * longest_step_s)
    return min(LONGEST_HANG_S, max(SHORTEST_HANG_S, expected))


def stragglers(own_seconds: Mapping[int, float]) -> dict[int, float]:
    """Ranks whose own part of a step takes much longer than the others', as rank -> multiple of the median.

    Much is 1.5 times the median and six robust standard deviations (1.4826 MAD, at least 5% of the median).
    """
    if len(own_seconds) < 3:
        return {}
    middle = median(own_seconds.values())
    if middle <= 0:
        return {}
    spread = 1.4826 * median(abs(value - middle) for value in own_seconds.values())
    limit = max(1.5 * middle, middle + 6 * max(spread, 0.05 * middle))
    return {rank: value / middle for rank, value in own_seconds.items() if value > limit}
