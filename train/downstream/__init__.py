"""Uses of a trained encoder: feature extraction, probes, CTC fine-tuning."""
