"""``PureTorchSSLModel``: the functional core behind a ``torch.nn.Module``."""
