"""Manifests, audio files and tar shards, and reading them in worker threads."""
