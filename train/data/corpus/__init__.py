"""Audio where it lies: manifests, files, shards, and reading them by threads."""
