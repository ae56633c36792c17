"""What runs in a job's Pods: ``python -m outlast.pod.head`` and ``python -m outlast.pod.node``. See DESIGN.md.

Neither imports torch or ray itself. What they and the operator promise each other is ``outlast.kube``.
"""
