"""Mixing of noise, interfering speakers and reverberation into clean speech."""
