"""Files without knowledge of NEST: atomic writes, locks, tensors, tar archives."""
