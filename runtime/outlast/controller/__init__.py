"""The controller of one job: a pure state machine that decides, policies that it asks, and a driver that acts.

Read ``outlast.messages`` first (what goes in and out), then ``machine`` (the phases), then the concepts it is made of:
``membership`` (who is here), ``faults`` (what went wrong first), ``recovery`` (how an attempt begins) and ``snapshots``
(how a generation comes to be committed). None of those does I/O or reads a clock; ``driver`` does, and so do the agents
(``outlast.agent``).
"""
