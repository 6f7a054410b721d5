"""A fine-tuning run: its settings, its loop with checkpoints and curves, and the best model."""
