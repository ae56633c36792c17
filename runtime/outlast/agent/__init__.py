"""A node: the process that starts, watches and ends ranks, and what it needs for that.

``node_agent`` ``actor``   what the controller asks of a node, carried out; the thin Ray actor around it
``ranks`` ``rank_process`` ``ranklink`` ``rank_messages`` ``rank_news``   the ranks of one attempt, and what they say
``keeper_host`` ``keeper_calls``   the node's keeper: kept alive, and called
``forkserver`` ``forkchild`` ``forkclient`` ``forkprotocol``   processes forked from one that has imported torch
``clearing`` ``attempt_record`` ``portholder`` ``pidfiles`` ``isolation`` ``stacks`` ``reactor``   parts of these
"""
