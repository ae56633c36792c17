"""What a run tells about itself: its story (``events``), its numbers (``metrics_log``), its time (``goodput``)."""
