"""Training: manifests to batches, batches to steps, steps to checkpoints. Only here does anything have a history."""
