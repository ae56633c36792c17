"""A keeper with an object tier: what ``outlast.snapshot.keeper`` is, for a job that has checkpoints.

Run as ``python -m outlast.checkpoint.serving CONFIG``, or ``main(config)`` in a forked child.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from outlast.checkpoint.tier import StoreTier
from outlast.snapshot.keeper import KeeperConfig, read_config, run


def main(config: Mapping[str, Any]) -> None:
    """Be a keeper until SIGTERM; its files stay. ``config``: the fields of `KeeperConfig`."""
    run(KeeperConfig.from_json(config), StoreTier())


if __name__ == "__main__":
    main(read_config(sys.argv))
