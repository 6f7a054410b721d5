"""File formats and file safety, independent of NEST: atomic writes, locks, tensors, tar archives."""
