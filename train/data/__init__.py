"""From manifests to batches: the batch plan, noise clips, the dataset, corpus tools."""
