"""CTC fine-tuning: the alphabet, the frozen encoder, and a corpus that can be learnt by heart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nest_fn import Config, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import main
from nest_fn.train.data.corpus.wav import write_wav
from nest_fn.train.downstream.ctc import Alphabet, alphabet_of, finetune
from nest_fn.train.errors import DataError

WORDS = {"ab": (400, 2500), "ba": (2500, 400), "b": (2500, 2500)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of two tones, one a letter, and a random model."""
    folder = tmp_path_factory.mktemp("ctc")
    lines = []
    for index in range(24):
        word = list(WORDS)[index % 3]
        time = np.arange(8000) / 16000
        tones = [9000 * np.sin(2 * np.pi * pitch * time) for pitch in WORDS[word]]
        noise = np.random.default_rng(index).normal(0, 200, 16000)
        write_wav(folder / f"{index}.wav", (np.concatenate(tones) + noise).astype(np.int16))
        lines.append({"audio_filepath": f"{index}.wav", "duration": 1.0, "text": word})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = settings(folder, 1)
    checkpoint.save(folder / "model", *init(key(0), cfg), cfg)
    return folder


def settings(folder: Path, steps: int) -> Config:
    data = [f"data.train={folder}/all.jsonl", f"data.valid={folder}/all.jsonl", "data.num_workers=0"]
    return Config.preset("tiny", [
        *data, "data.batch_seconds=24", "encoder.dropout=0", "encoder.dropout_att=0", "encoder.dropout_pre_encoder=0",
        "optim.sched.name=constant", "optim.lr=3e-3", f"trainer.max_steps={steps}", f"trainer.valid_every={steps}",
    ])  # fmt: skip


def test_alphabet() -> None:
    alphabet = alphabet_of(["ba", "cab"])
    assert alphabet.tokens == ("a", "b", "c")
    assert alphabet.encode("cab", "x") == [3, 1, 2]
    assert alphabet.decode([0, 3, 3, 0, 1, 1, 2, 0, 2]) == "cabb"
    with pytest.raises(DataError, match=r"line 7: text holds \['z'\]"):
        Alphabet(("a",)).encode("az", "line 7")


def test_learns_by_heart(corpus: Path) -> None:
    cfg = settings(corpus, 60)
    params, state = init(key(1), cfg)
    before = {path: leaf.clone() for path, leaf in flatten(params).items()}
    (_, rates, made), *_ = finetune(params, state, cfg)
    assert rates.cer < 0.1 and rates.wer < 0.2
    assert any(not torch.equal(leaf, before[path]) for path, leaf in flatten(made.params).items())
    assert all(torch.equal(leaf, before[path]) for path, leaf in flatten(params).items())


def test_frozen_encoder_stands_still(corpus: Path) -> None:
    cfg = settings(corpus, 3)
    params, state = init(key(1), cfg)
    (_, _, made), *_ = finetune(params, state, cfg, frozen_steps=3)
    for tree, other in ((params["encoder"], made.params["encoder"]), (state, made.state)):
        for path, leaf in flatten(tree).items():
            assert torch.equal(leaf, flatten(other)[path]), path


def test_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"data.train={corpus}/all.jsonl", f"data.valid={corpus}/all.jsonl"]
    steps = ["trainer.max_steps=2", "trainer.valid_every=1"]
    assert main(["finetune-ctc", str(corpus / "model"), *data, *steps, "--out", str(tmp_path / "out")]) == 0
    assert "step 2/2" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and {"cer", "wer", "loss"} <= lines[0].keys()
    (tmp_path / "no.jsonl").write_text(json.dumps({"audio_filepath": str(corpus / "0.wav"), "duration": 1.0}) + "\n")
    bad = [
        "finetune-ctc",
        str(corpus / "model"),
        f"data.train={tmp_path}/no.jsonl",
        data[1],
        "--out",
        str(tmp_path / "bad"),
    ]
    assert main(bad) == 3
    assert "has no 'text'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, told",
    [
        ("encoder.n_layers=7", "encoder.n_layers is 7, the checkpoint's model has "),
        ("sample_rate=8000", "sample_rate is 8000, the checkpoint's model has 16000"),
        ("trainer.precision=bf16", "trainer.precision has no effect on fine-tuning"),
        ("data.augment.prob=0.1", "data.augment.prob has no effect"),
    ],
)
def test_what_would_be_in_vain_is_refused(corpus: Path, tmp_path: Path, override: str, told: str,
                                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert main(["finetune-ctc", str(corpus / "model"), override, "--out", str(out)]) == 2
    assert f"error: finetune-ctc: {told}" in capsys.readouterr().err and not out.exists()
