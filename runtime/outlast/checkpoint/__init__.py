"""The object tier: snapshots made durable in object storage, lazily, and never trusted blindly.

Read first: ``store`` (the Protocol), ``manifest`` (what a checkpoint is, pure), ``archive`` (one job's checkpoints).
"""
