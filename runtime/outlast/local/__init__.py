"""A TrainingJob on one machine: one local Ray, agents as nodes, faults on purpose, and nothing left behind.

Read ``supervisor`` first: it is the process that ``trainctl run`` starts. ``raycluster`` and ``nodes`` are what it
starts, ``faults`` (pure), ``faultgate`` and ``injury`` what it breaks, ``report`` (pure) what it leaves.
"""
