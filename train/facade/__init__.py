"""``PureTorchSSLModel``: a ``torch.nn.Module`` around the functional core."""
