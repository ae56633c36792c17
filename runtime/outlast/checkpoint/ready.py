"""What a forkserver imports for the keepers and ranks that it makes: the S3 store, and a client of it made once.

The first client of a process takes 0.1 s of a core, for imports of its own and for botocore's descriptions of the
service; forks share both. They would take that time when a job waits for its state, all at once.
"""

from __future__ import annotations

from botocore.exceptions import BotoCoreError

from outlast.checkpoint.s3 import core_session


def _make_one() -> None:
    """No network and no credentials are looked for. What is wrong in the configuration is said by who opens a store."""
    try:
        client = core_session().create_client("s3", "us-east-1", aws_access_key_id="none", aws_secret_access_key="none")
        client.close()
    except (BotoCoreError, ValueError):
        pass


_make_one()
