"""Recordings of any length: log-mel in blocks, and an encoder over windows whose frames are joined."""
