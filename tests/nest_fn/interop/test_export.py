"""Exported graphs equal eager at lengths and batch sizes that the exporter never saw."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn import Config, encode, init, key, log_mel, save_file
from nest_fn.errors import ExportError
from nest_fn.interop.export import Widths, export_encoder, export_onnx, widths
from nest_fn.layers import random
from nest_fn.layers.tree import tree_map
from nest_fn.train.cli.main import main

SMALL = ["encoder.n_layers=1", "encoder.d_model=16", "encoder.n_heads=2", "encoder.subsampling_conv_channels=4"]
LOCAL = ["encoder.self_attention_model=rel_pos_local_attn", "encoder.att_context_size=[[3,2]]"]
Model = tuple[dict[str, Any], dict[str, Any], Config]
Pair = tuple[torch.Tensor, torch.Tensor]

# torch.export.load maps the file's bytes and tells itself that they are not writable.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


def model(*overrides: str) -> Model:
    cfg = Config.preset("tiny", [*SMALL, *overrides])
    params, state = init(key(0), cfg)
    # Running statistics and scales as of a trained model: no leaf may be mistaken for its initial value.
    move = lambda x: x + 0.3 if x.is_floating_point() else x  # noqa: E731
    return tree_map(move, params), tree_map(move, state), cfg


def features(cfg: Config, batch: int, frames: int) -> Pair:
    x = random.normal(key(frames), (batch, cfg.encoder.feat_in or 0, frames))
    return x, torch.tensor([max(1, frames - 11 * row) for row in range(batch)])


def audio(batch: int, samples: int) -> Pair:
    return random.normal(key(samples), (batch, samples)), torch.tensor([samples - 77 * row for row in range(batch)])


def eager(made: Model, signal: torch.Tensor, lengths: torch.Tensor) -> Pair:
    params, state, cfg = made
    if signal.ndim == 2:
        signal, lengths = log_mel(signal, lengths, cfg.preprocessor)
    encoded, lengths, _ = encode(params, state, signal, lengths, cfg)
    return encoded, lengths


def check(made: Model, run: Any, inputs: Pair, atol: float = 1e-5) -> None:
    encoded, lengths = run(*inputs)
    expected, expected_lengths = eager(made, *inputs)
    torch.testing.assert_close(encoded, expected, atol=atol, rtol=1e-5)
    assert torch.equal(lengths, expected_lengths)


def runtime(path: Path) -> Any:
    """The file in onnxruntime, as a function of tensors."""
    session = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed").InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == ["encoded", "encoded_lengths"]

    def run(signal: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        name = "features" if signal.ndim == 3 else "audio"
        return [torch.from_numpy(x) for x in session.run(None, {name: signal.numpy(), "lengths": lengths.numpy()})]

    return run


def test_program_from_features_equals_eager_at_any_length(tmp_path: Path) -> None:
    made = model()
    program = export_encoder(*made, tmp_path / "encoder.pt2")
    assert widths(made[2]) == Widths(9, 1)
    assert torch.equal(
        program.state_dict["params.layers.0.norm_out.weight"], made[0]["encoder"]["layers"][0]["norm_out"]["weight"]
    )
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    for batch, frames in [(1, 9), (1, 1600), (2, 57), (5, 112)]:
        check(made, loaded, features(made[2], batch, frames))
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded(*features(made[2], 1, 8))


def test_blocks_of_local_attention_make_a_constraint_on_the_width() -> None:
    made = model(*LOCAL, "encoder.subsampling_factor=2")
    assert widths(made[2]) == Widths(12, 6)
    run = export_encoder(*made).module()
    for batch, frames in [(1, 12), (3, 66)]:
        check(made, run, features(made[2], batch, frames))
    with pytest.raises((AssertionError, RuntimeError)):
        run(*features(made[2], 1, 67))


def test_program_from_audio_equals_eager_at_any_length() -> None:
    made = model()
    run = export_encoder(*made, source="audio").module()
    for batch, samples in [(1, 400), (1, 2400), (2, 2399), (3, 40000)]:  # 2400 samples: 16 frames, nothing to pad
        check(made, run, audio(batch, samples))


def test_one_shape_alone() -> None:
    made = model("encoder.reduction=pooling", "encoder.reduction_factor=2")
    run = export_encoder(*made, dynamic=False).module()
    check(made, run, features(made[2], 1, 1000))
    with pytest.raises(AssertionError, match="Guard failed"):
        run(*features(made[2], 1, 992))


@pytest.mark.slow
def test_pooling_is_refused_at_a_free_length() -> None:
    with pytest.raises(ExportError, match="with a free length.*dynamic=False"):
        export_encoder(*model("encoder.reduction=pooling", "encoder.reduction_factor=2"))


@pytest.mark.parametrize("source", ["features", pytest.param("audio", marks=pytest.mark.slow)])
def test_onnx_equals_eager_at_any_length(tmp_path: Path, source: Any) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    made = model()
    export_onnx(tmp_path / "encoder.onnx", *made, source=source)
    run = runtime(tmp_path / "encoder.onnx")
    for batch, frames in [(1, 9), (1, 1600), (2, 57), (5, 112)]:
        inputs = features(made[2], batch, frames) if source == "features" else audio(batch, 160 * frames)
        check(made, run, inputs, atol=1e-4)  # kernels of another library, on values of order 1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = model()
    save_file(tmp_path / "model.pt", *made)
    assert main(["export", str(tmp_path / "model.pt"), str(tmp_path / "encoder.pt2"), "--static"]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path}/encoder.pt2\n"
    check(made, torch.export.load(tmp_path / "encoder.pt2").module(), features(made[2], 1, 1000))
    assert main(["export", str(tmp_path / "model.pt"), str(tmp_path / "encoder.bin")]) == 2
    assert "encoder.bin: cannot be exported as '.bin'; choose .pt2 or .onnx." in capsys.readouterr().err


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    made = model()
    with pytest.raises(ExportError, match="source 'mel' is unknown; choose features or audio"):
        export_encoder(*made, source="mel")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"cannot be exported as '.onnx'; choose .pt2"):
        export_encoder(*made, tmp_path / "encoder.onnx")


def test_missing_extra_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError) as caught:
        export_onnx(tmp_path / "encoder.onnx", *model())
    wanted = "the package onnx is not installed: pip install 'nest-fn[export]', or write .pt2."
    assert str(caught.value) == f"{tmp_path}/encoder.onnx: {wanted}"
