"""In which order tests run, and when they stop: the quick ones first, whole runs last, none after a time that is given.

OUTLAST_TESTS_UNTIL (seconds since 1970): whole runs and clusters that would begin later are skipped, and say so. A slow
machine so tells what it could not show, instead of being ended in the middle of it.
"""

from __future__ import annotations

import os
import time

import pytest

WHOLE_RUNS = ("test_log_shipping", "test_export", "test_run_requests", "test_runs", "test_durable", "test_elastic",
              "test_store_outages")  # fmt: skip
"""Files of tests/integration, in the order in which they run, after all others of it."""
UNTIL = float(os.environ.get("OUTLAST_TESTS_UNTIL", "inf"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come last, but before clusters."""
    items.sort(key=_place)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > UNTIL and (_is_whole_run(item) or "e2e" in item.path.parts):
        pytest.skip("the time that was given is spent (OUTLAST_TESTS_UNTIL)")


def _is_whole_run(item: pytest.Item) -> bool:
    return item.path.stem in WHOLE_RUNS


def _place(item: pytest.Item) -> tuple[bool, int]:
    found = _is_whole_run(item)
    return "e2e" in item.path.parts, 1 + WHOLE_RUNS.index(item.path.stem) if found else 0
