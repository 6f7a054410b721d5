"""File formats of other systems: NeMo, Lightning, the PyTorch port, torch.export and ONNX."""
