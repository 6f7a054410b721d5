"""From text to plain values: YAML, overrides, references, NeMo's dialect, types."""
