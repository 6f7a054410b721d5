"""Continued pre-training: a run that begins from a model, its first validation, and what is not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn import Config, init, key
from nest_fn.checkpoint.folder import read_checkpoint
from nest_fn.checkpoint.model_files import save
from nest_fn.interop.take_over import take_over
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import main
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.keys import root_key, validation_key
from nest_fn.train.run.batch import prepare_batch
from nest_fn.train.step.evaluate import make_evaluate, validate
from tests.train.conftest import Corpus

Captured = pytest.CaptureFixture[str]


def words(corpus: Corpus, folder: Path, *more: str) -> list[str]:
    data = [f"data.train={corpus.train}", f"data.valid={corpus.valid}", f"data.noise={corpus.noise}",
            "data.batch_seconds=8", "data.num_workers=0", "trainer.device=cpu"]  # fmt: skip
    return ["pretrain", "--folder", str(folder), *data, *more]


def validations(folder: Path) -> dict[int, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["valid"] for line in lines if "valid" in line}


@pytest.fixture(scope="module")
def source(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("source") / "run"
    assert main(words(corpus, folder, "-c", "tiny", "trainer.max_steps=4", "trainer.seed=3")) == 0
    return folder


def test_the_first_validation_is_the_sources(source: Path, corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    steps = ["trainer.max_steps=3", "trainer.save_every=1", "trainer.keep_last=9"]
    command = words(corpus, tmp_path / "run", "--init", str(source), *steps)
    capsys.readouterr()
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "taken: encoder.subsampling, decoder, quantizer, masking, encoder.layers 0-1" in told
    found = validations(tmp_path / "run")
    assert found[0] == validations(source)[4] and found.keys() == {0, 3}
    trees, _, meta = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000001")
    assert float(trees["optimizer"]["updates"]) == 1 and meta["init"]
    assert json.loads((tmp_path / "run" / "data.json").read_text())["init"]["file"] == str(source)
    assert main(command) == 0 and "nothing is left to do" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "run"), "0"]) == 2
    assert "began from a model (--init)" in capsys.readouterr().err


def test_a_run_is_not_begun_twice_from_different_models(
    source: Path, corpus: Corpus, tmp_path: Path, capsys: Captured
) -> None:
    cfg = Config.preset("tiny")
    save(tmp_path / "other", *init(key(9), cfg), cfg)
    assert main(words(corpus, tmp_path / "run", "--init", str(tmp_path / "other"), "trainer.max_steps=1")) == 0
    assert main(words(corpus, tmp_path / "run", "-c", "tiny", "--init", str(source), "trainer.max_steps=1")) == 4
    assert "its run began from another model" in capsys.readouterr().err
    assert main(words(corpus, source, "--init", str(source))) == 2
    assert "lies in the run folder itself" in capsys.readouterr().err
    assert main(["pretrain", "--init", str(source)]) == 2
    assert "name its folder with --folder" in capsys.readouterr().err
    more = ["trainer.max_steps=9", "trainer.seed=3"]
    assert main(words(corpus, source, "-c", "tiny", "--init", str(tmp_path / "other"), *more)) == 4
    assert "its run began from its seed" in capsys.readouterr().err


def test_killed_before_its_first_checkpoint_it_no_longer_needs_the_file(
    source: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nest_fn.train.run import pretrain

    def killed(*_: Any) -> int:
        raise KeyboardInterrupt

    steps = ["-c", "tiny", "trainer.seed=3", "trainer.max_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train", killed)
        assert main(words(corpus, tmp_path / "cut", "--init", str(source), *steps)) == 130
    assert main(words(corpus, tmp_path / "cut", *steps)) == 0
    assert main(words(corpus, tmp_path / "whole", "--init", str(source), *steps)) == 0
    name = "checkpoints/step_00000002/params"
    (cut,), (whole,) = (list((tmp_path / run).glob(f"{name}.*")) for run in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()
    assert validations(tmp_path / "cut") == validations(tmp_path / "whole")


def evaluated(params: Any, state: Any, cfg: Config) -> dict[str, float]:
    """Validation by hand."""
    dataset, root = open_dataset(cfg.data, cfg.trainer.seed, split="valid"), root_key(cfg.trainer.seed)
    evaluate, masks = make_evaluate(cfg), validation_key(root)
    stream = (prepare_batch(raw, cfg, masks, torch.device("cpu"))[0] for raw in batches(dataset, epochs=1))
    return validate(evaluate, params, state, stream, masks)


def test_other_depth_other_classes_and_other_width(
    source: Path, corpus: Corpus, tmp_path: Path, capsys: Captured
) -> None:
    deeper = words(corpus, tmp_path / "deep", "-c", "tiny", "--init", str(source), "encoder.n_layers=3",
                   "num_classes=32", "trainer.max_steps=1", "preprocessor.dither=0.1")  # fmt: skip
    assert main(deeper) == 0
    told = capsys.readouterr().err
    assert "encoder.layers.2: is not in the file" in told and "encoder.layers 0-1" in told
    assert "decoder: 'decoder." in told and "quantizer: 'quantizer." in told
    assert "preprocessor.dither" in told
    trees = read_checkpoint(tmp_path / "deep" / "checkpoints" / "step_00000001")[0]
    assert trees["params"]["decoder"]["weight"].shape[0] != 0
    shallow = words(corpus, tmp_path / "flat", "-c", "tiny", "--init", str(source), "encoder.n_layers=1",
                    "trainer.max_steps=1")  # fmt: skip
    assert main(shallow) == 0 and "without a place here: encoder.layers 1" in capsys.readouterr().err
    wide = words(corpus, tmp_path / "wide", "-c", "tiny", "--init", str(source), "encoder.d_model=64")
    assert main(wide) == 4 and "no part of its encoder fits" in capsys.readouterr().err
    assert not (tmp_path / "wide").exists()


def test_parts_go_whole_and_the_decoder_with_its_codes() -> None:
    cfg, other = Config.preset("tiny"), Config.preset("tiny", ["code_dim=4"])
    ours, theirs = init(key(0), cfg), init(key(1), other)
    made = take_over(*ours, *theirs)
    assert [text.partition(":")[0] for text in made.fresh] == ["decoder", "quantizer"]
    mine, given, now = (flatten({"params": tree[0], "state": tree[1]}) for tree in (ours, theirs, made[:2]))
    for path, leaf in now.items():
        kept = ".decoder." in path or ".quantizer." in path
        assert torch.equal(leaf, (mine if kept else given)[path]), path
    same = take_over(*ours, *init(key(1), cfg))
    assert not same.fresh and not same.unused
