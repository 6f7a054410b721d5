"""The README's picture, after ``make demo``: ``python docs/make_figure.py runs/demo docs/demo.png`` (extra report)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from nest_fn import Config, fold_in, key, log_mel
from nest_fn.masking import draw_mask
from nest_fn.train.data.audio_files.audio import read_audio


def main(run: Path, out: Path) -> None:
    """An utterance's features, what of them was masked, and the run's accuracy."""
    cfg = Config.preset("demo")
    entry = json.loads((run / "corpus" / "valid.jsonl").read_text().splitlines()[0])
    audio = torch.from_numpy(read_audio(str(run / "corpus" / entry["audio_filepath"]), 0.0, 6.0))[None]
    mel, frames = log_mel(audio, torch.tensor([audio.shape[1]]), cfg.preprocessor)
    mask = draw_mask(fold_in(key(5), torch.arange(1)), frames, mel.shape[2], cfg.masking, cfg.mask_block)[0]
    masked = mel[0].masked_fill(mask, float("nan"))
    lines = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "valid" not in line]
    valid = [line for line in lines if "valid" in line]
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 7), height_ratios=(1, 1, 1.3), layout="constrained")
    seconds = int(frames[0]) * 0.01
    for axis, image, title in (
        (top, mel[0], "log-mel of a synthetic utterance"),
        (middle, masked, "what the encoder sees"),
    ):
        axis.imshow(
            image[:, : int(frames[0])], origin="lower", aspect="auto", extent=(0, seconds, 0, 80), vmin=-3, vmax=3
        )
        axis.set(ylabel="mel bin", title=title)
    middle.set(xlabel="seconds")
    bottom.plot([line["step"] for line in train], [line["accuracy"] for line in train], lw=1, label="masked, training")
    bottom.plot(
        [line["step"] for line in valid],
        [line["valid"]["accuracy"] for line in valid],
        "o-",
        label="masked, validation",
    )
    guess = valid[-1]["valid"]["unigram_accuracy"]
    bottom.axhline(guess, color="gray", ls="--", label="always the commonest token")
    bottom.set(xlabel="step", ylabel="token accuracy", ylim=(0, None))
    bottom.legend()
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
