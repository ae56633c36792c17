"""What a snapshot contains: from a script's live objects to named leaves, and back.

``leaves``   the live tensors of protected objects, named, lazy or eager
``tree``     nested Python state as JSON with named tensors
``rng``      every random generator of the process
``replicas`` which leaves are equal on several ranks, so that each copies a part
``capture``  one snapshot, from the boundary to the sealed image
``reload``   the way back, from images to live objects
``ddp``      DistributedDataParallel's bucket order, which is state
``weights``  the trained weights, whole, and their digest
"""
