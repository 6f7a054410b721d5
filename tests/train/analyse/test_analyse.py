"""``nest-fn analyse`` on a run: all analyses at once, what they write, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nest_fn import Config, init, key
from nest_fn.checkpoint.model_files import save
from nest_fn.train.analyse import analyse as module
from nest_fn.train.analyse.result import plain
from nest_fn.train.cli.analyse import ANALYSES as WHAT
from nest_fn.train.cli.main import main
from tests.train.conftest import Corpus

SMALL = ("num_classes=16", "encoder.d_model=16", "encoder.subsampling_conv_channels=4", "masking.force_block=true")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own jvp
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, and phones in its validation manifest."""
    folder = tmp_path_factory.mktemp("analyse")
    lines = [json.loads(line) for line in Path(corpus.valid).read_text().splitlines()]
    known = [
        line | {"phones": [["a", 0.0, 0.5], ["b", 0.5, 0.9]], "speaker": f"s{number % 2}", "label": "same",
                "audio_filepath": str(Path(corpus.valid).parent / line["audio_filepath"])}
        for number, line in enumerate(lines)
    ]  # fmt: skip
    (folder / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in known))
    words = ["pretrain", "-c", "tiny", f"data.train={corpus.train}", f"data.valid={folder}/valid.jsonl",
             f"data.noise={corpus.noise}", "trainer.max_steps=2", "trainer.save_every=1", "trainer.valid_every=2",
             "optim.sched.warmup_steps=1", *SMALL, "--folder", str(folder / "run")]  # fmt: skip
    assert main(words) == 0
    return folder / "run"


def found(folder: Path, name: str) -> dict[str, Any]:
    content = json.loads((folder / f"{name}.json").read_text())
    assert isinstance(content, dict)
    return content


def test_the_command_names_all_analyses() -> None:
    assert set(WHAT) == set(module.ANALYSES)


def test_all_analyses_of_a_run(run: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    words = ["analyse", str(run), "all", "--out", str(out), "--batches", "2", "data.max_batch_size=2"]
    assert main(words) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) >= len(WHAT)
    for name in WHAT:
        content = found(out, name)
        assert content["about"]
        assert all((out / file).is_file() for file in content["files"])
        with np.load(out / f"{name}.npz") as arrays:
            assert all(np.isfinite(arrays[entry]).all() for entry in arrays.files)
    layers = Config.preset("tiny").encoder.n_layers
    assert np.diag(found(out, "representations")["cka"]) == pytest.approx(np.ones(layers))
    assert sum(found(out, "gradients")["share_of_squared_norm"].values()) == pytest.approx(1.0)
    assert found(out, "path")["to"] == "step 1"
    phones = found(out, "codes")["phones"]
    assert phones["names"] == ["a", "b"] and 0 <= phones["targets"]["pnmi"] <= 1
    kept = found(out, "stability")["kept_by_snr"]
    assert 0 <= kept[0] <= kept[-1] <= 1 and 0 <= found(out, "stability")["kept_as_mixed"] <= 1
    probes = found(out, "probes")
    assert probes["phones"]["classes"] == 2 and probes["phones"]["held_back_by"] == "utterances"
    assert len(probes["phones"]["layers"]["learnt"]) == len(probes["phones"]["layers"]["untrained"]) == layers
    assert "1 classes in 4 utterances" in probes["label"]["not_probed"]
    hessian, gauss_newton = (found(out, "curvature")[name]["largest"] for name in ("hessian", "gauss_newton"))
    assert hessian == sorted(hessian, reverse=True) and min(gauss_newton) > -1e-4
    assert main(words) == 0
    assert "finished" in capsys.readouterr().out


def test_without_matplotlib_no_pictures_and_it_says_so(
    run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_extra", lambda _: False)
    assert main(["analyse", str(run), "stability", "--out", str(tmp_path / "out"), "--batches", "1"]) == 0
    assert "pip install 'nest-fn[analysis]'" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.png"))


def test_an_interrupted_call_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["analyse", str(run), "stability", "attention", "--out", str(tmp_path / "out"), "--batches", "1"]

    def killed(_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(module.ANALYSES, "stability", killed)
        assert main(words) == 130
    before = (tmp_path / "out" / "attention.npz").stat().st_mtime_ns
    assert main(words) == 0
    assert (tmp_path / "out" / "attention.npz").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "stability.json").is_file()


@pytest.mark.parametrize(
    "more, hint",
    [
        (["path"], "--against"),
        (["nonsense"], "want all, attention, codes"),
        (["trainer.device=cpu"], "want what to analyse before the settings"),
        (["codes", "optim.lr=1"], "optim.lr has no effect here"),
        (["probes"], "none of speaker, label, phones"),
        (["probes", "--labels", "digit"], "--labels digit: the line of"),
        (["attention", "--against", "{other}"], "--against"),
    ],
)
def test_mistakes_are_one_line(more: list[str], hint: str, corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    cfg, wider = Config.preset("tiny", SMALL), Config.preset("tiny", ["encoder.d_model=32", *SMALL[:1]])
    save(tmp_path / "model", *init(key(0), cfg), cfg)
    save(tmp_path / "other", *init(key(0), wider), wider)
    words = [word.format(other=tmp_path / "other") for word in more]
    code = main(
        ["analyse", str(tmp_path / "model"), *words, f"data.valid={corpus.valid}", "--out", str(tmp_path / "out")]
    )
    told = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(told) == 1 and hint in told[0]
    assert not (tmp_path / "out").exists()


def test_all_leaves_out_what_is_not_possible(
    corpus: Corpus, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = ("encoder.self_attention_model=rel_pos_local_attn", "encoder.att_context_size=[2,2]")
    cfg = Config.preset("tiny", [*SMALL, *local])
    save(tmp_path / "model", *init(key(0), cfg), cfg)
    few = {name: module.ANALYSES[name] for name in ("attention", "path", "stability")}
    monkeypatch.setattr(module, "ANALYSES", few)
    words = ["analyse", str(tmp_path / "model"), "all", f"data.valid={corpus.valid}", "--out", str(tmp_path / "out")]
    assert main([*words, "--batches", "1", "data.max_batch_size=1"]) == 0
    told = capsys.readouterr().out
    assert "left out attention" in told and "left out path" in told
    assert (tmp_path / "out" / "stability.json").is_file()


def test_a_model_without_manifests_wants_some(tmp_path: Path, capsys: Captured) -> None:
    cfg = Config.preset("tiny", SMALL)
    save(tmp_path / "model", *init(key(0), cfg), cfg)
    assert main(["analyse", str(tmp_path / "model"), "codes", "--out", str(tmp_path / "out")]) == 2
    assert "data.valid=FILE" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_null() -> None:
    assert plain({"a": (1, float("nan")), 2: [float("inf"), "x", None, True]}) == {
        "a": [1, None],
        "2": [None, "x", None, True],
    }
