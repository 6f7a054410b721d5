"""The fault catalogue (docs/faults.md), part C: configuration. What a person who has one is told.

Each file is refused with one message that names it and the key or the line, before anything is allocated or written.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.data.transfer import to_device
from nest_fn.train.step.step import init_train_state, make_step
from tests.train.conftest import voice
from tests.train.faults import Captured, config_of, write_entries

CPU = torch.device("cpu")


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
YAML: dict[str, tuple[str, str]] = {
    "C1 unknown key": ("encoder: {n_layer: 3}", "unknown key 'encoder.n_layer'; did you mean 'n_layers'"),
    "C1 unknown section": ("trainr: {max_steps: 3}", "unknown key 'trainr'; did you mean 'trainer'"),
    "C2 a key twice": ("trainer:\n  seed: 1\n  seed: 2", r"c\.yaml:3: key 'seed' stands twice"),
    "C2 no is text": ("trainer: {max_steps: no}", "'trainer.max_steps'"),
    "C2 sexagesimal is text": ("trainer: {max_steps: 1:30}", "'trainer.max_steps'"),
    "C2 NaN": ("optim: {lr: .nan}", "'optim.lr'.*finite"),
    "C2 out of range": ("optim: {weight_decay: -1}", "'optim.weight_decay' must be at least 0"),
    "C3 bomb": (BOMB, r"c\.yaml:\d+: aliases grow beyond"),
    "C3 depth": ("a: " + "[" * 5000, r"c\.yaml:1: nested deeper"),
    "C3 size": ("# " + "x" * 1_100_000, "larger than 1000000 bytes"),
    "C4 tag": ("a: !!python/object/apply:os.system [true]", r"c\.yaml:1: tag .* is not allowed"),
    "C5 empty": ("", "holds nothing"),
    "C5 scalar": ("just words", "holds a str"),
    "C6 heads": ("encoder: {d_model: 30, n_heads: 4}", "'encoder.n_heads'"),
    "C6 even kernel": ("encoder: {conv_kernel_size: 8}", "'encoder.conv_kernel_size'"),
    "C6 padding": ("preprocessor: {pad_to: 12}", "'preprocessor.pad_to'"),
    "C6 block": ("masking: {block_size: 4}", "'masking.block_size'"),
}


@pytest.mark.parametrize("case", YAML)
def test_config(tmp_path: Path, capsys: Captured, case: str) -> None:
    text, pattern = YAML[case]
    (tmp_path / "c.yaml").write_text(text)
    assert main(["pretrain", "-c", str(tmp_path / "c.yaml"), "--folder", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and str(tmp_path / "c.yaml") in told and "Traceback" not in told
    assert re.search(pattern, told), told
    assert not (tmp_path / "run").exists()


def test_c2_numbers_are_yaml_1_2(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "c.yaml").write_text("optim: {lr: 1e-4}\ntrainer: {seed: 010}\ndata: {root: no}\n")
    assert main(["config", "show", str(tmp_path / "c.yaml")]) == 0
    (tmp_path / "d.yaml").write_text(capsys.readouterr().out)
    cfg = Config.from_yaml(tmp_path / "d.yaml")
    assert (cfg.optim.lr, cfg.trainer.seed, cfg.data.root) == (1e-4, 10, "no")


@settings(max_examples=10)
@given(st.data())
def test_c6_a_config_that_is_accepted_trains(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_wav(folder / "a.wav", voice(np.random.Generator(np.random.Philox(1)), 1.5))
    write_entries(folder, [{"audio_filepath": "a.wav", "duration": 1.5}])
    choice = {
        "encoder.d_model": [8, 16], "encoder.n_heads": [1, 2, 4], "encoder.conv_kernel_size": [3, 9],
        "encoder.subsampling": ["dw_striding", "striding"], "encoder.subsampling_factor": [4, 8],
        "encoder.conv_norm_type": ["batch_norm", "layer_norm"], "encoder.use_bias": ["true", "false"],
        "mask_position": ["pre_conv", "post_conv"], "num_books": [1, 2], "num_classes": [16, 33],
        "masking.block_size": [8, 40], "masking.allow_overlap": ["true", "false"], "preprocessor.features": [40, 80],
        "optim.name": ["adamw", "adam", "sgd"], "trainer.precision": ["fp32", "bf16"], "trainer.clip_norm": [0, 1],
    }  # fmt: skip
    chosen = [f"{name}={data.draw(st.sampled_from(values), label=name)}" for name, values in choice.items()]
    cfg = config_of(folder, "masking.mask_prob=0.05", *chosen)
    ts, raw = init_train_state(random.key(0), cfg), next(batches(open_dataset(cfg.data, 0)))
    new, told = make_step(cfg)(ts, [to_device(raw, CPU)], random.key(1))
    assert new.step == 1 and bool(told["loss_sum"].isfinite()) and bool(told["grad_norm"].isfinite())
