"""What runs a job on machines, whichever they are: processes by pid, Ray, launching the controller and asking it.

Used by ``outlast.local`` and ``outlast.pod``; it imports neither torch nor ray.
"""
