"""What the reference refuses, fails on, or accepts by mistake (``encoder_errors``, ``quant_errors``), and we."""

from __future__ import annotations

import pytest
import torch

from nest_fn import Config, ConfigError, abstract, init, key, quantize
from tests.reference_cases import load

ENCODER = load("encoder_errors").config["results"]
QUANTIZER = load("quant_errors").config["results"]

# The stored name, our settings, and our answer: None where the setting works.
ANSWERS = {
    "vggnet": (["subsampling=vggnet"], None),  # Q25, mended
    "striding_conv1d": (["subsampling=striding_conv1d"], r"fails in the reference \(Q25\) and is not offered; use"),
    "conv_norm_type=groupnorm4": (["conv_norm_type=groupnorm4"], "must be one of batch_norm.*got 'groupnorm4'"),
    "chunked_limited [9,3]": (
        ["att_context_style=chunked_limited", "att_context_size=[9,3]"],
        "left must be a multiple of the chunk",
    ),
    "local attention, unlimited context": (["self_attention_model=rel_pos_local_attn"], "must be above 0"),
    "even kernel": (["conv_kernel_size=8"], "must be odd"),
    "subsampling_conv_chunking_factor=-1": (["subsampling_conv_chunking_factor=-1"], r"must be 1; .*\(Q22, Q24\)"),
    # The reference says nothing and halves twice, so that its factor is 4.
    "subsampling_factor=6": (["subsampling_factor=6"], "must be a power of two for 'dw_striding'; got 6"),
    "pos_emb_max_len=4": (["pos_emb_max_len=4"], None),
}


def test_every_stored_answer_has_one_of_ours() -> None:
    assert ANSWERS.keys() == ENCODER.keys()


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_encoder_settings(name: str) -> None:
    settings, message = ANSWERS[name]
    overrides = [f"encoder.{setting}" for setting in settings]
    if message is None:
        abstract(Config.preset("tiny", overrides))
        return
    with pytest.raises(ConfigError, match=message):
        Config.preset("tiny", overrides)


def test_the_quantizer_names_what_the_reference_trips_over() -> None:
    """Q9: frames that do not fill a token. Q11: cosine with float64 codebooks, which works here."""
    assert QUANTIZER["l2_T_not_multiple_of_8"].startswith("RuntimeError")
    assert QUANTIZER["cosine_default_float64_codebooks"].startswith("RuntimeError")
    cfg = Config.preset("tiny", ["quantizer.dist_fn=cosine"])
    _, state = init(key(0), cfg)
    assert quantize(state, torch.ones(1, 80, 16), cfg).shape == (1, 2, 1)
    with pytest.raises(ValueError, match="20 frames are no multiple of combine_time_steps 8"):
        quantize(state, torch.ones(1, 80, 20), cfg)
