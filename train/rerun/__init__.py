"""A finished run's steps made again, and where two runs part: verify, diff."""
