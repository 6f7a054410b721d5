"""NeMo's own NEST step, for comparison: run by an interpreter that has ``nemo_toolkit``, never by this library's.

    nemo-env/bin/python peer_nemo.py '{"threads": 1, "device": "cpu", ...}'

It keeps the rules of ``server.py``. A step is NeMo's denoising pre-training: mel features of a clean and of a noisy
signal, quantizer, block masking, encoder, decoder, masked loss, gradients, AdamW with Noam's schedule. The noisy signal
is made beforehand; this library mixes its own within the step. Nothing of this library is imported here.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

os.environ.setdefault("NEMO_LOGGING_LEVEL", "ERROR")

import torch

_NOISE = 0.05  # of full scale, beside 0.1 of the clean signal


def modules(sizes: dict[str, Any]) -> dict[str, torch.nn.Module]:
    """NeMo's modules for the sizes given."""
    from nemo.collections.asr.losses import MultiMLMLoss
    from nemo.collections.asr.modules import (
        AudioToMelSpectrogramPreprocessor,
        ConformerEncoder,
        MultiSoftmaxDecoder,
        RandomBlockMasking,
        RandomProjectionVectorQuantizer,
    )

    bins, classes, books = sizes["features"], sizes["classes"], sizes["books"]
    factor = sizes["encoder"]["subsampling_factor"]
    encoder = ConformerEncoder(feat_in=bins, **sizes["encoder"])
    return {
        "preprocessor": AudioToMelSpectrogramPreprocessor(
            sample_rate=sizes["sample_rate"], normalize="per_feature", window_size=0.025, window_stride=0.01,
            window="hann", features=bins, n_fft=512, log=True, dither=1e-5, pad_to=16,
        ),
        "quantizer": RandomProjectionVectorQuantizer(
            feat_in=bins, code_dim=sizes["code_dim"], num_classes=classes, num_books=books, dist_fn="l2", freeze=True,
            combine_time_steps=factor,
        ),
        "masking": RandomBlockMasking(
            feat_in=bins, block_size=sizes["block_size"], mask_prob=sizes["mask_prob"], freeze=True, allow_overlap=True
        ),
        "encoder": encoder,
        "decoder": MultiSoftmaxDecoder(
            feat_in=encoder._feat_out, num_classes=classes, num_decoders=books, use_bias=True
        ),
        "loss": MultiMLMLoss(combine_time_steps=factor, mask_threshold=0.8, num_decoders=books),
    }  # fmt: skip


class Peer:
    """A model, its optimizer, and a step."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from nemo.core.optim.lr_scheduler import NoamAnnealing

        self.device = torch.device(settings["device"])
        self.autocast = settings["precision"] == "bf16"
        self.parts = {name: part.train().to(self.device) for name, part in modules(settings).items()}
        self.parameters = [leaf for part in self.parts.values() for leaf in part.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=5.0, betas=(0.9, 0.98), weight_decay=0.0)
        width = settings["encoder"]["d_model"]
        self.schedule = NoamAnnealing(self.optimizer, d_model=width, warmup_steps=25000, min_lr=1e-6)

    def batch(self, rows: int, samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clean and noisy signals ``[B, N]`` and their lengths in samples."""
        draw = torch.Generator().manual_seed(1)
        clean = 0.1 * torch.empty(rows, samples).normal_(generator=draw)
        noisy = clean + _NOISE * torch.empty(rows, samples).normal_(generator=draw)
        length = torch.full((rows,), samples, dtype=torch.long)
        return clean.to(self.device), noisy.to(self.device), length.to(self.device)

    def step(self, clean: torch.Tensor, noisy: torch.Tensor, length: torch.Tensor) -> float:
        """One update; its loss in nats."""
        part = self.parts
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            features, _ = part["preprocessor"](input_signal=clean.clone(), length=length)
            disturbed, frames = part["preprocessor"](input_signal=noisy.clone(), length=length)
            with torch.no_grad():
                _, tokens = part["quantizer"](input_signal=features)
            masked, masks = part["masking"](input_feats=disturbed, input_lengths=frames)
            encoded, lengths = part["encoder"](audio_signal=masked, length=frames)
            scores = part["decoder"](encoder_output=encoded)
            loss = part["loss"](masks=masks, decoder_outputs=scores, targets=tokens, decoder_lengths=lengths)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return float(loss)

    def answer(self, request: dict[str, Any], sample_rate: int) -> dict[str, Any]:
        """The steps that were asked for."""
        batch = self.batch(request["rows"], round(request["seconds"] * sample_rate))
        gpu = self.device.type == "cuda"
        now = time.perf_counter if gpu else time.process_time
        seconds, losses = [], []
        for _ in range(request["steps"]):
            begun = now()
            losses.append(self.step(*batch))  # reading the loss waits for a GPU, but for the optimizer's last kernels
            if gpu:
                torch.cuda.synchronize(self.device)
            seconds.append(now() - begun)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = torch.cuda.max_memory_allocated(self.device) if gpu else resident
        return {"seconds": seconds, "losses": losses, "peak_bytes": peak, "graphs": 0}


def serve(settings: dict[str, Any]) -> None:
    """Answer each line of standard input with a line on standard output, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")  # what NeMo prints goes to standard error
    os.dup2(2, 1)
    torch.set_num_threads(settings["threads"])
    import nemo
    from nemo.utils import logging

    logging.setLevel(logging.ERROR)
    peer = Peer(settings)
    count = sum(leaf.numel() for leaf in peer.parameters)
    about = {"side": "NeMo", "nemo": nemo.__version__, "torch": torch.__version__, "parameters": count}
    answers.write(json.dumps(about) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(peer.answer(json.loads(line), settings["sample_rate"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
