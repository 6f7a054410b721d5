"""Training: manifests to batches, batches to steps, steps to checkpoints. The only part where anything has a history."""
