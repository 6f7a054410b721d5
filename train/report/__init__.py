"""Runs as one HTML page that needs no network: what they did, in words, curves, sound and tables."""
