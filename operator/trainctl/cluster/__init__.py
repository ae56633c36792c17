"""What ``trainctl`` asks of a Kubernetes cluster: connections, refusals, resources, and a job's controller in its Pod.

Objects are the API server's JSON as dicts. ``connection`` imports the kubernetes package, so only commands that need a
cluster import it.
"""
