"""From manifests to batches: the batch plan, noise clips, the data set, corpus tools."""
