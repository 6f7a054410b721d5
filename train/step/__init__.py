"""One training step, pure: gradients, optimizer, schedule, metrics, evaluation."""
