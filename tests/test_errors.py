"""Bad input to every public function: *what was asked, what came, what to do*, before anything is computed.

Lengths beyond the width cannot be refused without reading a tensor on the host: they count as the width
(``tests/nest_fn/test_model.py``). Settings that do not fit are refused by the config (``tests/config``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nest_fn import Config, encode, fold_in, forward, hidden_states, init, key, log_mel, loss, quantize, split
from nest_fn.checkpoint import model_files
from nest_fn.interop import nemo
from nest_fn.layers import random
from nest_fn.layers.attention import attention, init_attention
from nest_fn.layers.conv import conv, init_conv
from nest_fn.layers.conv_module import conv_module, init_conv_module
from nest_fn.layers.dropout import dropout, stochastic_depth
from nest_fn.layers.feed_forward import feed_forward, init_feed_forward
from nest_fn.layers.initializers import xavier_normal
from nest_fn.layers.linear import init_linear, linear
from nest_fn.layers.local_attention import local_attention
from nest_fn.layers.norm import batch_norm, group_norm, init_batch_norm_state, init_norm, layer_norm, scale_shift
from nest_fn.layers.subsampling import SubsamplingSpec, init_subsampling, subsample

K = key(0)
X, VALID, LENGTHS = torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.bool), torch.tensor([5, 3])
FEATURES, FRAMES = torch.zeros(2, 80, 104), torch.tensor([100, 60])
AUDIO, SAMPLES = torch.zeros(2, 16000), torch.tensor([16000, 8000])
SPEC = SubsamplingSpec("dw_striding", 2, 8, 4, 3)
Call = Callable[[], Any]


@functools.cache
def model(*overrides: str) -> tuple[Any, Any, Config]:
    cfg = Config.preset("tiny", overrides)
    return (*init(key(0), cfg), cfg)


def batch(**changed: Any) -> dict[str, Any]:
    """A good batch with some entries changed, or left out where ``None``."""
    good = {"audio": AUDIO, "audio_len": SAMPLES, "noisy_audio": AUDIO, "noisy_audio_len": SAMPLES}
    return {name: value for name, value in (good | changed).items() if value is not None}


def mel(audio: Any = AUDIO, lengths: Any = SAMPLES, **options: Any) -> Any:
    return log_mel(audio, lengths, model()[2].preprocessor, **options)


def seen(function: Any, given: Any, **options: Any) -> Any:
    params, state, cfg = model()
    return function(params, state, given, cfg, **options)


def encoded(features: Any = FEATURES, lengths: Any = FRAMES, **options: Any) -> Any:
    params, state, cfg = model()
    return encode(params, state, features, lengths, cfg, **options)


def attend(**changed: Any) -> Any:
    given: dict[str, Any] = {"positions": None, "valid": VALID} | changed
    return attention(init_attention(K, 8, 2), X, given["positions"], given["valid"], None, heads=2)


LAYERS: dict[str, tuple[Call, str]] = {
    "linear, width": (
        lambda: linear(init_linear(K, 6, 3), X),
        r"linear: x ends in 8 features, weight \[3, 6\] wants 6",
    ),
    "feed_forward, width": (lambda: feed_forward(init_feed_forward(K, 6, 9), X), "linear: x ends in 8 features"),
    "conv, rank": (
        lambda: conv(init_conv(K, 8, 4, (3,)), X[0]),
        r"conv: x is \[5, 8\], weight \[4, 8, 3\] with 1 groups wants 3 axes and 8",
    ),
    "conv, channels": (
        lambda: conv(init_conv(K, 8, 4, (3,), 2), X, groups=2),
        r"conv: x is \[2, 5, 8\].* with 2 groups wants 3 axes and 8 channels",
    ),
    "layer_norm, width": (lambda: layer_norm(init_norm(6), X), "layer_norm: x ends in 8 features, weight wants 6"),
    "group_norm, channels": (lambda: group_norm(init_norm(8), X, 2), r"group_norm: x is \[2, 5, 8\], want \[B, 8, T\]"),
    "group_norm, groups": (
        lambda: group_norm(init_norm(5), X, 3),
        "group_norm: 5 channels are no multiple of 3 groups; change one",
    ),
    "batch_norm, channels": (
        lambda: batch_norm(init_norm(8), init_batch_norm_state(8), X),
        r"batch_norm: x is \[2, 5, 8\], want \[B, 8, T\]",
    ),
    "batch_norm, rank": (
        lambda: batch_norm(init_norm(8), init_batch_norm_state(8), X[0]),
        r"batch_norm: x is \[5, 8\]",
    ),
    "scale_shift, channels": (lambda: scale_shift(init_norm(8), X), r"scale_shift: x is \[2, 5, 8\], want \[B, 8, T\]"),
    "conv_module, norm": (
        lambda: conv_module(*init_conv_module(K, 8, 3), X, VALID, context=(1, 1), norm="batchnorm"),
        "conv_module: no norm is called 'batchnorm'; use batch_norm, layer_norm",
    ),
    "attention, mask": (
        lambda: attend(valid=VALID[:1]),
        r"attention: x \[2, 5, 8\] wants a mask of valid frames \[B, T\], got \[1, 5\]",
    ),
    "attention, positions": (
        lambda: attend(positions=X[0]),
        r"attention: x \[2, 5, 8\] wants positions \[9, D\], got \[5, 8\]; make them",
    ),
    "attention, heads": (
        lambda: init_attention(K, 8, 3),
        "attention: width 8 is not a multiple of 3 heads; change one",
    ),
    "local_attention, positions": (
        lambda: local_attention(init_attention(K, 8, 2), X, X[0], VALID, heads=2, left=3, right=2),
        r"local_attention: x \[2, 5, 8\] wants positions \[6, D\], got \[5, 8\]",
    ),
    "dropout, key": (
        lambda: dropout(X, 0.1, train=True),
        "dropout: train=True with rate 0.1 needs key=; pass one, or train=False",
    ),
    "dropout, rate": (lambda: dropout(X, 1.0, key=K, train=True), r"dropout: rate must lie in \[0, 1\), got 1.0"),
    "stochastic_depth, key": (
        lambda: stochastic_depth(X, X, 0.1, train=True),
        "stochastic_depth: train=True with rate 0.1 needs key=",
    ),
    "subsample, features": (
        lambda: subsample(init_subsampling(K, SPEC), X[..., :4], LENGTHS, SPEC),
        r"subsample: x is \[2, 5, 4\], want \[B, F, 8\]",
    ),
    "initializer, rank": (
        lambda: xavier_normal(K, (3,)),
        r"fans: a weight has at least 2 axes, got \[3\]; biases take",
    ),
    "dropout_mask, rate": (
        lambda: random.dropout_mask(K, 1.5, (3,)),
        r"dropout_mask: rate must lie in \[0, 1\], got 1.5",
    ),
    "split, number": (lambda: split(K, -1), "split: n must be 0 or more, got -1"),
    "split, shape": (lambda: split(K[:1], 2), r"key: want int64 \[..., 2\] made by key\(seed\), got torch.int64 \[1\]"),
    "fold_in, key": (
        lambda: fold_in(torch.zeros(2), 1),
        r"key: want int64 \[..., 2\] made by key\(seed\), got torch.float32 \[2\]",
    ),
    "fold_in, number": (lambda: fold_in(K, 1.5), "fold_in: want an integer or an int64 tensor, got floats"),  # type: ignore[arg-type]
}

MODEL: dict[str, tuple[Call, str]] = {
    "init, key": (lambda: init(0, model()[2]), r"init: key: want int64 \[..., 2\] made by key\(seed\), got int"),  # type: ignore[arg-type]
    "init, many keys": (
        lambda: init(split(K, 3), model()[2]),
        r"init: key: want one key \[2\], got \[3, 2\]; pass one of them",
    ),
    "init, config": (
        lambda: init(K, "tiny"),  # type: ignore[arg-type]
        r"init: cfg is the text 'tiny'; pass a Config, such as Config.preset\('tiny'\)",
    ),
    "log_mel, config": (
        lambda: log_mel(AUDIO, SAMPLES, model()[2]),  # type: ignore[arg-type]
        "log_mel: cfg is a Config; pass the section preprocessor",
    ),
    "log_mel, numpy": (lambda: mel(AUDIO.numpy()), r"log_mel: audio is a ndarray; pass a tensor, torch.from_numpy"),
    "loss, numpy": (
        lambda: seen(loss, batch(audio=AUDIO.numpy()), key=K),
        r"batch: audio is a ndarray; pass a tensor, torch.from_numpy",
    ),
    "loss, swapped": (
        lambda: loss(*model()[1::-1], batch(), model()[2], key=K),
        "loss: params holds quantizer, as state does; pass params first and state second",
    ),
    "encode, config": (
        lambda: encode(*model()[:2], FEATURES, FRAMES, "tiny"),  # type: ignore[arg-type]
        "encode: cfg is the text 'tiny'",
    ),
    "encode, swapped": (
        lambda: encode(*model()[1::-1], FEATURES, FRAMES, model()[2]),
        "encode: params holds quantizer, as state does",
    ),
    "features, swapped": (
        lambda: hidden_states.features(*model()[1::-1], AUDIO, SAMPLES, model()[2]),
        "features: params holds quantizer, as state does",
    ),
    "quantize, params": (
        lambda: quantize(model()[0], FEATURES, model()[2]),
        "quantize: state holds decoder, as params does",
    ),
    "forward, part": (
        lambda: forward({"encoder": {}, "decoder": {}}, model()[1], batch(), model()[2]),
        "forward: params.encoder.subsampling is missing, params holds encoder, decoder; pass what init",
    ),
    "forward, no tree": (
        lambda: forward(None, model()[1], batch(), model()[2]),  # type: ignore[arg-type]
        "forward: params is a NoneType; pass the nested dict",
    ),
    "save, config": (
        lambda: model_files.check_trees("save", *model()[:2], "tiny"),  # type: ignore[arg-type]
        "save: cfg is the text 'tiny'",
    ),
    "log_mel, rank": (lambda: mel(AUDIO[0]), r"log_mel: audio wants \[B, N\], got \[16000\]; add a batch axis"),
    "log_mel, dtype": (
        lambda: mel(AUDIO.long()),
        "log_mel: audio wants float or int16 samples, got torch.int64; scale it",
    ),
    "log_mel, rows": (
        lambda: mel(AUDIO, SAMPLES[:1]),
        r"log_mel: x \[2, 16000\] has 2 rows, lengths are \[1\]; pass one length a row",
    ),
    "log_mel, dtype of lengths": (
        lambda: mel(AUDIO, SAMPLES / 2),
        r"log_mel: lengths are torch.float32; pass integers",
    ),
    "log_mel, list of lengths": (
        lambda: mel(AUDIO, [16000, 8000]),
        r"log_mel: lengths are a list; pass an int64 tensor \[B\]",
    ),
    "log_mel, key": (
        lambda: mel(train=True),
        "log_mel: train=True with dither 1e-05 .* needs key=; pass one, or train=False",
    ),
    "log_mel, dtype of key": (lambda: mel(train=True, key=torch.zeros(2)), r"log_mel: key: want int64 \[..., 2\]"),
    "quantize, rank": (
        lambda: quantize(model()[1], FEATURES[0], model()[2]),
        r"quantizer: features \[80, 104\] .* do not fit the projection \[8, 640\]; pass \[B, 80, F\]",
    ),
    "quantize, width": (
        lambda: quantize(model()[1], FEATURES[:, :40], model()[2]),
        r"quantizer: features \[2, 40, 104\] .* pass \[B, 80, F\]",
    ),
    "quantize, frames": (
        lambda: quantize(model()[1], FEATURES[..., :101], model()[2]),
        "quantizer: 101 frames are no multiple of combine_time_steps 8; pad them",
    ),
    "encode, rank": (lambda: encoded(FEATURES[0]), r"encode: features are \[80, 104\], want \[B, 80, F\]"),
    "encode, width": (lambda: encoded(FEATURES[:, :40]), r"encode: features are \[2, 40, 104\], want \[B, 80, F\]"),
    "encode, dtype": (lambda: encoded(FEATURES.long()), "encode: features are torch.int64; pass floats"),
    "encode, rows of lengths": (
        lambda: encoded(FEATURES, FRAMES[:1]),
        r"encode: x \[2, 80, 104\] has 2 rows, lengths are \[1\]",
    ),
    "encode, dtype of lengths": (
        lambda: encoded(FEATURES, FRAMES.float()),
        "encode: lengths are torch.float32; pass integers",
    ),
    "encode, key": (
        lambda: encoded(train=True),
        "encode: train=True with dropout or other chance needs key=; pass one, or train=False",
    ),
    "encode, many keys": (
        lambda: encoded(train=True, key=split(K, 2)),
        r"encode: key: want one key \[2\], got \[2, 2\]",
    ),
    "encode, names of rows": (
        lambda: encoded(train=True, key=K, rows=torch.zeros(2)),
        r"encode: names of rows are torch.float32 \[2\]; pass int64 \[2\]",
    ),
    "forward, no mapping": (
        lambda: seen(forward, (AUDIO, SAMPLES)),
        "batch: want a mapping with audio, audio_len, .*; got tuple",
    ),
    "forward, missing": (
        lambda: seen(forward, batch(audio_len=None)),
        "batch: audio_len missing; it has audio, noisy_audio",
    ),
    "forward, widths": (
        lambda: seen(forward, batch(noisy_audio=AUDIO[:, :8000])),
        r"batch: audio is \[2, 16000\], noisy_audio \[2, 8000\]; pad both",
    ),
    "forward, rank": (
        lambda: seen(forward, batch(audio=AUDIO[0], noisy_audio=AUDIO[0]), key=K),
        r"log_mel: audio wants \[B, N\]",
    ),
    "forward, rows of lengths": (
        lambda: seen(forward, batch(noisy_audio_len=SAMPLES[:1]), key=K),
        "has 2 rows, lengths are",
    ),
    "forward, key": (
        lambda: seen(forward, batch()),
        "forward: drawing a mask needs key=; pass one, or mask=, or apply_mask=False",
    ),
    "forward, many keys": (
        lambda: seen(forward, batch(), key=split(K, 2)),
        r"forward: key: want one key \[2\], got \[2, 2\]",
    ),
    "forward, dtype of key": (
        lambda: seen(forward, batch(), key=torch.zeros(2)),
        r"forward: key: want int64 \[..., 2\]",
    ),
    "forward, shape of mask": (
        lambda: seen(forward, batch(), mask=torch.zeros(2, 14).bool()),
        r"forward: mask is torch.bool \[2, 14\]; want bool \[2, 112\]",
    ),
    "forward, dtype of mask": (
        lambda: seen(forward, batch(), mask=torch.zeros(2, 112)),
        r"forward: mask is torch.float32 .* want bool \[2, 112\]",
    ),
    "loss, names of rows": (
        lambda: seen(loss, batch(row=torch.arange(3)), key=K),
        r"batch: row: names of rows are torch.int64 \[3\]; pass int64 \[2\]",
    ),
    "loss, weight": (
        lambda: seen(loss, batch(weight=torch.ones(3)), key=K),
        r"batch: weight is \[3\]; want one number a row, \[2\]",
    ),
    "loss, no row": (
        lambda: seen(loss, {name: value[:0] for name, value in batch().items()}, key=K),
        r"batch: audio is \[0, 16000\], no row; leave an empty batch out",
    ),
    "loss, key": (lambda: seen(loss, batch()), "needs key=; pass one, or train=False"),
    "loss, another config": (
        lambda: loss(*model()[:2], batch(), model("mask_position=post_conv")[2], key=K),
        r"want an embedding \[32\], got \[80\]; check",
    ),
    "from_state_dict, empty": (
        lambda: nemo.from_state_dict({}, model()[2]),
        r"state_dict: \d+ names do not fit the config: .* is missing",
    ),
    "from_state_dict, parts": (
        lambda: nemo.from_state_dict({}, model()[2], parts=("x",)),
        "state_dict: no part is called 'x'; the parts are encoder",
    ),
}


@pytest.mark.parametrize("name", [*LAYERS, *MODEL])
def test_bad_input_is_named(name: str) -> None:
    call, message = (LAYERS | MODEL)[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_good_input_passes() -> None:
    """What the table changes is all that is wrong with its calls."""
    mel(train=True, key=K)
    encoded(train=True, key=K, rows=torch.arange(2))
    seen(forward, batch(), key=K)
    seen(loss, batch(row=torch.arange(2), weight=torch.ones(2)), key=K)
    attend(positions=torch.zeros(9, 8))
