"""A trained encoder at work: feature extraction, probes, CTC."""
