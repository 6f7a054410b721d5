"""Checkpoints on disk: params, state and config in a folder or one file; which checkpoints of a run are kept."""
