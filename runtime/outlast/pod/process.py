"""The first process of a container: it adopts orphans, reaps them, and ends with a status that says how it went."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from outlast.errors import OutlastError
from outlast.hosting import processes
from outlast.pod.console import Console


def run(work: Callable[[], Awaitable[int]], console: Console) -> int:
    """Do ``work`` in an event loop of its own; the exit status. An error that people can do something about is said."""

    async def main() -> int:
        return await work()

    processes.become_subreaper()
    try:
        return asyncio.run(main())
    except (OutlastError, OSError) as error:
        console.say("failed", reason=str(error) or type(error).__name__)
        return 1
    finally:
        console.close()
