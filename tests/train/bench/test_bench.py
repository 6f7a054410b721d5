"""The benchmark's own arithmetic and processes; its figures are not tested, for they are the machine's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.train.bench import report
from nest_fn.train.bench.laws import laws, slope, step_flops
from nest_fn.train.bench.rates import timed
from nest_fn.train.bench.server import answers
from nest_fn.train.bench.sides import Machine, Side, peer_settings
from nest_fn.train.bench.workload import Case, Shape, made_up_batch
from nest_fn.train.cli import bench
from nest_fn.train.cli.main import main
from nest_fn.train.errors import UsageError
from nest_fn.train.step.step import init_train_state, make_step

TINY, CPU = Case("tiny", Shape(2, 2.0)), torch.device("cpu")
ECHO = """
import json, sys
print(json.dumps({"side": "echo", "threads": json.loads(sys.argv[1])["threads"]}), flush=True)
for line in sys.stdin:
    if json.loads(line)["steps"] > 2:
        sys.exit("three are too many")
    print(json.dumps({"seconds": [1.0]}), flush=True)
"""


def test_slope_of_a_power() -> None:
    values = [1.0, 2.0, 5.0, 20.0]
    assert slope(values, [7.0 * value**1.5 for value in values]) == pytest.approx(1.5)


def test_arithmetic_of_a_step_grows_as_the_formula_says() -> None:
    """Twice the rows, twice all; the feed-forward modules of a layer by hand."""
    cfg = TINY.config()
    assert step_flops(cfg, Shape(4, 2.0)) / step_flops(cfg, Shape(2, 2.0)) == pytest.approx(2.0, rel=0.02)
    frames, width = 2 * 26, cfg.encoder.d_model  # 201 frames, padded to 208, subsampled by 8
    wider = Config.preset("tiny", [f"encoder.ff_expansion_factor={cfg.encoder.ff_expansion_factor + 1}"])
    # Two modules a layer, two products of D x D a module, two operations a product, and three for the gradients.
    by_hand = 3 * 2 * 2 * 2 * frames * width * width * cfg.encoder.n_layers
    assert step_flops(wider, TINY.shape) - step_flops(cfg, TINY.shape) == pytest.approx(by_hand)


def test_every_law_changes_one_thing() -> None:
    for law in laws():
        assert len(law.values) == len(law.cases) == len(set(law.cases))
    (length,) = [law for law in laws() if law.name == "length"]
    assert {case.shape.audio for case in length.cases} == {120.0}


def test_a_side_makes_the_steps_of_the_library() -> None:
    """Its losses are those of ``make_step`` on the same batch; each request goes on from the last."""
    cfg = TINY.config()
    request = {"rows": 2, "seconds": 2.0, "steps": 2}
    about, first, second = answers(cfg, CPU, [request, request])
    key = random.key(0)
    ts, step, batch = init_train_state(random.fold_in(key, 0), cfg), make_step(cfg), made_up_batch(cfg, TINY.shape)
    losses = []
    for number in range(4):
        ts, metrics = step(ts, [batch], random.fold_in(key, number))
        losses.append(float(metrics["loss_sum"]) / max(float(metrics["masked_tokens"]), 1.0))
    assert first["losses"] + second["losses"] == losses
    assert about["side"] == "nest_fn" and len(first["seconds"]) == 2 and first["peak_bytes"] > 0


def test_a_side_that_ends_is_one_message() -> None:
    side = Side([sys.executable, "-c", ECHO], {}, Machine("cpu", 3), {})
    try:
        assert side.about == {"side": "echo", "threads": 3}
        assert side.steps(Shape(1, 1.0), 2) == {"seconds": [1.0]}
        with pytest.raises(UsageError, match="three are too many"):
            side.steps(Shape(1, 1.0), 3)
    finally:
        side.close()


def test_the_peer_gets_the_sizes_of_the_preset() -> None:
    settings = peer_settings(Case("nest_large", Shape(2, 10.0)))
    assert (settings["encoder"]["n_layers"], settings["encoder"]["d_model"], settings["classes"]) == (17, 512, 8192)
    json.dumps(settings)
    with pytest.raises(UsageError, match="not NeMo's pre_conv step"):
        peer_settings(Case("nest_small", TINY.shape, ("mask_position=post_conv",)))


def test_the_command_names_the_sections_that_there_are() -> None:
    """Twice, since the help of a command imports no torch."""
    assert tuple(report.SECTIONS) == bench.SECTIONS


def test_clocks_return_results() -> None:
    result, seconds = timed(lambda: 7, CPU)
    assert result == 7 and seconds >= 0.0


@pytest.mark.parametrize(
    "words, said",
    [
        ("bench speed", "want some of step"),
        ("bench --case nest_small", "want a preset, rows"),
        ("bench --case tiny:0x5", "want a preset, rows"),
        ("bench --case huge:1x5", "unknown preset 'huge'"),
        ("bench --peer nemo", "go together"),
        ("bench step --case tiny:1x1 --rounds 1 --peer nemo --peer-python {python}", "No module named 'nemo'"),
    ],
)
def test_wrong_options(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, nothing written."""
    out = tmp_path / "figures.json"
    given = words.format(python=sys.executable).split()
    assert main([*given, "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert not out.exists()
