"""What a run writes into its folder: settings, metrics, log, checkpoints, curves."""
