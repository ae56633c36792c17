"""A rank's side of the job: its link to the agent, its snapshots, its batches.

``link``        messages to and from the node's agent
``snapshots``   permits obeyed at boundaries, windows kept until the optimizer's next step, results reported
``batches``     micro-batches of global steps out of any loader, with the position consumed
``environment`` what decides bits besides code and data
``sources``     where a restore reads each rank's image from
``gate`` ``slowdown``  where an injected fault stops a rank, or slows it
"""
