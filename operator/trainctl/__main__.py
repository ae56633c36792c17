"""``python -m trainctl``: the same as the ``trainctl`` command."""

from trainctl.main import run

run()
