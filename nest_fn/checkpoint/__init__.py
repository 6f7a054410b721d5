"""Checkpoints on disk: a folder or one file that holds params, state and config, and which of several are kept."""
