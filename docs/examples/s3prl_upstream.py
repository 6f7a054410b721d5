"""A trained encoder as an upstream of s3prl: the SUPERB tasks with `-u customized_upstream -k runs/large`.

    cp docs/examples/s3prl_upstream.py S3PRL/s3prl/upstream/example/expert.py
    python run_downstream.py -m train -n nest -u customized_upstream -k runs/large -d phone_linear

The checkpoint may be any that nest_fn reads, the reference's too; `--upstream_trainable` trains the encoder. Tried with
s3prl 0.4.18, some of whose other upstreams want functions of torchaudio that 2.11 no longer has.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from nest_fn import abstract, features
from nest_fn.interop.convert import read_any
from nest_fn.layers.tree import fill, flatten


class UpstreamExpert(nn.Module):
    """Outputs of all blocks for waveforms at 16 kHz, in evaluation mode."""

    def __init__(self, ckpt: str, model_config: str | None = None, **_: object) -> None:
        super().__init__()
        params, state, self.cfg = read_any(ckpt)
        if self.cfg.sample_rate != 16000:
            raise ValueError(f"s3prl's audio has 16000 Hz, the model in {ckpt} wants {self.cfg.sample_rate}.")
        self.paths = [*flatten(params), *flatten(state)]
        trained = [nn.Parameter(leaf) for leaf in flatten(params).values()]
        self.leaves = nn.ParameterList(
            [*trained, *(nn.Parameter(x, requires_grad=False) for x in flatten(state).values())]
        )

    def get_downsample_rates(self, key: str) -> int:
        """Samples in one frame of the features."""
        return self.cfg.frames_per_token * self.cfg.preprocessor.hop_length

    def forward(self, wavs: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        """Waveforms `[N]` of any lengths -> one `[B, T, D]` for each block."""
        leaves = dict(zip(self.paths, self.leaves, strict=True))
        params, state = (fill(tree, leaves) for tree in abstract(self.cfg))
        lengths = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        layers, frames = features(params, state, pad_sequence(wavs, batch_first=True), lengths, self.cfg)
        return {"hidden_states": [layer[:, : int(frames.max())] for layer in layers]}
