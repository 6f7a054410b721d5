"""Utterances of any length from nothing to two seconds, loud or silent, through the whole loss (faults A11, A13, A14).

The loss and all gradients stay finite, no token is made of what is not there, and an utterance without samples is an
error where manifests are read and a row without weight in the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nest_fn import Config, fold_in, init, key, loss
from nest_fn.config.training import DataConfig
from nest_fn.layers.tree import fill, flatten
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.errors import DataError
from nest_fn.train.step.step import training_loss
from tests.train.faults import Captured, train
from tests.train.run.test_pretrain import metrics

SMALL = ["encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "masking.mask_prob=0.1"]
KINDS = {
    "as it comes": [],
    "post_conv": ["mask_position=post_conv"],
    "bf16": ["trainer.precision=bf16"],
    "legacy": ["compat=legacy"],
    "no normalisation": ["preprocessor.normalize=null"],
    "layer norm, two books": ["encoder.conv_norm_type=layer_norm", "num_books=2"],
}
EDGES = [0, 1, 2, 159, 160, 161, 256, 257, 399, 400, 1279, 1280, 1281, 2559, 2560, 15999, 16000, 31999, 32000]
LENGTH = st.sampled_from(EDGES) | st.integers(0, 32000)
SOUND = st.sampled_from(["noise", "silence", "constant", "one sample"])
WIDTH = 32000  # samples, of the batches that mix lengths


def _sound(kind: str, count: int) -> NDArray[np.int16]:
    if kind == "noise":
        return np.random.Generator(np.random.Philox(count)).integers(-9000, 9000, count).astype(np.int16)
    sound = np.full(count, 32767 if kind == "constant" else 0, np.int16)
    sound[: kind == "one sample"] = -32768
    return sound


def _tokens(length: int, legacy: bool) -> int:
    """Whole frames of 10 ms, with ``legacy`` one more if there is any sound; eight a token, the last one begun."""
    frames = length // 160 + (legacy and length > 0)
    return -(-frames // 8)


def _finite(cfg: Config, run: Any) -> dict[str, torch.Tensor]:
    """The metrics of ``run(params, state)``, after a look at its loss, its gradients and its state."""
    params, state = init(key(0), cfg)
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(params).items()}
    value, (told, new) = run(fill(params, leaves), state)
    grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    assert bool(value.isfinite())
    assert all(bool(leaf.isfinite().all()) for leaf in (*grads, *flatten(new).values()))
    if not told["masked_tokens"]:
        assert float(value.detach()) == 0 and not any(bool(grad.any()) for grad in grads)
    return told


@settings(max_examples=20)
@given(length=LENGTH, sound=SOUND, kind=st.sampled_from(list(KINDS)))
@example(length=0, sound="silence", kind="as it comes")
@example(length=1, sound="one sample", kind="post_conv")
@example(length=256, sound="noise", kind="legacy")
@example(length=257, sound="noise", kind="legacy")
def test_alone(length: int, sound: str, kind: str) -> None:
    """A signal of just so many samples, as the model's own user gives it."""
    cfg = Config.preset("tiny", [*SMALL, *KINDS[kind]])
    audio, lengths = torch.from_numpy(_sound(sound, length))[None], torch.tensor([length])
    batch = {"audio": audio, "audio_len": lengths, "noisy_audio": audio, "noisy_audio_len": lengths}
    if kind == "legacy" and length <= 256:
        with pytest.raises(ValueError, match=r"reflects 256 samples at each end, audio has \d+; pad it"):
            _finite(cfg, lambda params, state: loss(params, state, batch, cfg, key=key(length)))
        return
    told = _finite(cfg, lambda params, state: loss(params, state, batch, cfg, key=key(length)))
    assert int(told["valid_tokens"]) == _tokens(length, kind == "legacy")


ROW = st.tuples(LENGTH, SOUND, SOUND, st.sampled_from([0, 1]))  # samples, what they hold, its noise, weight


@settings(max_examples=12)
@given(rows=st.lists(ROW, min_size=1, max_size=4), kind=st.sampled_from(list(KINDS)))
@example(rows=[(0, "noise", "noise", 1)], kind="as it comes")
@example(rows=[(0, "noise", "noise", 1), (1, "noise", "noise", 1), (160, "silence", "noise", 1)], kind="legacy")
@example(rows=[(0, "noise", "noise", 0), (32000, "noise", "silence", 0)], kind="bf16")
@example(rows=[(1, "noise", "noise", 1), (32000, "silence", "noise", 1)], kind="post_conv")
def test_among_others(rows: list[tuple[int, str, str, int]], kind: str) -> None:
    """Rows of all lengths in a batch of the trainer, mixed with noise and with each other, some without weight."""
    cfg = Config.preset("tiny", [*SMALL, *KINDS[kind], "data.augment.prob=1"])
    audio, noise = np.zeros((2, len(rows), WIDTH), np.int16)
    for row, (length, sound, other, _) in enumerate(rows):
        audio[row, :length], noise[row, : length // 2] = _sound(sound, length), _sound(other, length // 2)
    lengths = torch.tensor([length for length, *_ in rows])
    raw = {
        "audio": torch.from_numpy(audio), "audio_len": lengths, "noise": torch.from_numpy(noise),
        "noise_len": lengths // 2, "row": torch.arange(len(rows)), "utterance": torch.arange(len(rows)) + 7,
        "weight": torch.tensor([float(weight) for *_, weight in rows]),
    }  # fmt: skip
    told = _finite(cfg, lambda params, state: training_loss(cfg)(params, state, raw, fold_in(key(1), len(rows))))
    wanted = sum(weight * _tokens(length, kind == "legacy") for length, _, _, weight in rows)
    assert int(told["valid_tokens"]) == wanted


@pytest.mark.parametrize("entry", [{}, {"duration": 1e-5}, {"duration": 1.5}, {"duration": 0.1, "offset": 0.01}])
@pytest.mark.parametrize("samples", [0, 160])
def test_no_samples_are_an_error(tmp_path: Path, samples: int, entry: dict[str, float]) -> None:
    """A file without any, or a part of one that holds none; never a row of zeros that counts."""
    write_wav(tmp_path / "a.wav", np.full(samples, 100, np.int16))
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": "a.wav", **entry}) + "\n")
    config = DataConfig(train=(str(tmp_path / "m.jsonl"),), min_duration=0.0, min_audio=0.0, num_workers=0)
    if samples and not entry:
        assert next(batches(open_dataset(config, 0)))["audio_len"].tolist()[0] == samples
        return
    with pytest.raises(DataError, match=r"m\.jsonl:1: "):
        next(batches(open_dataset(config, 0)))


def test_silence_can_be_left_out(six: Path, capsys: Captured) -> None:
    """A run tells of it once and goes on, though no error would be allowed; if all is silent, nothing is learnt."""
    for number in (1, 4):
        write_wav(six / f"a{number}.wav", np.zeros(24000, np.int16))
    rules = ["data.skip_silent=true", "data.max_bad_fraction=0", "trainer.log_every=1", "trainer.save_every=0"]
    assert train(six, *rules, steps=4) == 0
    told = capsys.readouterr().err
    assert told.count("every sample is 0") == 1 and "data.skip_silent" in told
    for number in range(6):
        write_wav(six / f"a{number}.wav", np.zeros(24000, np.int16))
    assert train(six, *rules, f"--folder={six / 'silent'}", steps=2) == 0
    assert [line["loss"] for line in metrics(six / "silent")] == [0.0, 0.0]
