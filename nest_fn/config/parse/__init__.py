"""From text to typed values: YAML, overrides, references, NeMo's dialect, types."""
