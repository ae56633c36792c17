"""What runs in a job's Pods: ``python -m outlast.pod.head`` and ``python -m outlast.pod.node``. See DESIGN.md.

Neither imports torch or ray itself. What they and the operator promise each other is ``outlast.kube``.

The kernel keeps a signal that is not handled from a container's first process: told to go while it still imports, it
would not hear of it. So it ends at once, as any other process would; ``process.run`` has handlers of its own.
"""

import os
import signal
import threading

if os.getpid() == 1 and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
