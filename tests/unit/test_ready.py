"""What forkservers import of the object tier must do nothing but that: they have one thread and no configuration yet."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

LOOK = """
import socket, threading
socket.socket.connect = lambda *a: (_ for _ in ()).throw(SystemExit("it looks for something in the network"))
import outlast.checkpoint.ready
from outlast.checkpoint.s3 import core_session
print(threading.active_count(), "s3" in str(sorted(map(str, core_session().get_component("data_loader")._cache))))
"""


@pytest.mark.parametrize(
    "settings",
    [{}, {"AWS_PROFILE": "nobody"}, {"AWS_CONFIG_FILE": "damaged"}, {"AWS_ENDPOINT_URL": "localhost:9000"}],
)
def test_it_shares_what_is_parsed_and_stumbles_over_no_configuration(
    tmp_path: pathlib.Path, settings: dict[str, str]
) -> None:
    (tmp_path / "damaged").write_text("[profile\nx")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | settings
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    threads, parsed = done.stdout.split()
    assert threads == "1"
    if not settings:
        assert parsed == "True"
