"""Training: from manifests to batches, steps and checkpoints. Only objects in this package have a history."""
