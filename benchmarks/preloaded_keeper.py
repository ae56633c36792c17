"""A keeper with an object tier as a node's forkserver makes it: what that has imported is there when it begins.

torch is left out: keepers do not use it. Run like ``outlast.checkpoint.serving``, of which it is the rest.
"""

from __future__ import annotations

import sys

from outlast.agent.forkprotocol import DEFAULT_PRELOAD, preload
from outlast.checkpoint.serving import main
from outlast.snapshot.keeper import read_config

if __name__ == "__main__":
    preload(
        [
            name
            for name in DEFAULT_PRELOAD
            if name == "numpy" or name.startswith(("outlast.snapshot", "outlast.checkpoint"))
        ]
    )
    main(read_config(sys.argv))
