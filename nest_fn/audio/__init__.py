"""Audio functions that know no model: torchaudio's where it loads, else the same from plain PyTorch."""
