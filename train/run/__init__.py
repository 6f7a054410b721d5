"""The history of a run: loop, folder, checkpoints, failures, signals."""
