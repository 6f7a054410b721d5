"""Other systems' files: NeMo, Lightning, the PyTorch port, torch.export and ONNX."""
