"""In eval, what comes out at valid frames depends on neither padding nor the rest of the batch."""

from __future__ import annotations

import pytest
import torch

from nest_fn import log_mel
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.subsampling import SubsamplingSpec, subsampled_length

from .registry import ALL, Example, Result, key, model, noise, tiny

PADDED = [example for example in ALL if "lengths" in example.inputs]
EXTRA = 24  # frames, a multiple of every subsampling factor here (Q26: stacking counts the batch's padding)


def run(example: Example, x: torch.Tensor, lengths: torch.Tensor) -> Result:
    return example.run(example.params, example.state, {"x": x, "lengths": lengths}, key(1), False)


def check_equal(one: Result, other: Result) -> None:
    """Equal lengths, and equal values below them."""
    assert one.lengths is not None
    assert torch.equal(one.lengths, other.lengths)
    for row, length in enumerate(one.lengths.tolist()):
        torch.testing.assert_close(one.y[row, :length], other.y[row, :length], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("example", [one for one in PADDED if one.padding], ids=repr)
def test_more_padding_changes_nothing(example: Example) -> None:
    x, lengths = example.inputs["x"], example.inputs["lengths"]
    padded = torch.cat((x, 100.0 * noise(x.shape[0], EXTRA, x.shape[2], seed=9)), dim=1)
    check_equal(run(example, x, lengths), run(example, padded, lengths))


@pytest.mark.parametrize("example", [one for one in PADDED if one.padding], ids=repr)
def test_values_in_padding_change_nothing(example: Example) -> None:
    x, lengths = example.inputs["x"], example.inputs["lengths"]
    zeros = torch.where(valid_mask(lengths, x.shape[1])[..., None], x, 0.0)
    assert not torch.equal(x, zeros)
    check_equal(run(example, x, lengths), run(example, zeros, lengths))


@pytest.mark.parametrize("example", PADDED, ids=repr)
def test_the_batch_changes_nothing(example: Example) -> None:
    x, lengths = example.inputs["x"], example.inputs["lengths"]
    whole = run(example, x, lengths)
    for row in range(x.shape[0]):
        alone = run(example, x[row : row + 1], lengths[row : row + 1])
        check_equal(alone, Result(whole.y[row : row + 1], whole.lengths[row : row + 1]))  # type: ignore[index]


@pytest.mark.parametrize("example", [one for one in PADDED if not one.padding], ids=repr)
def test_exceptions_are_real(example: Example) -> None:
    """Where padding is said to matter, as in the reference, it does."""
    x, lengths = example.inputs["x"], example.inputs["lengths"]
    padded = torch.cat((x, 100.0 * noise(x.shape[0], EXTRA, x.shape[2], seed=9)), dim=1)
    with pytest.raises(AssertionError):
        check_equal(run(example, x, lengths), run(example, padded, lengths))


@pytest.mark.parametrize("example", [one for one in PADDED if one.padding], ids=repr)
def test_an_empty_row_is_harmless(example: Example) -> None:
    """A row of length 0 (a batch filled up to a fixed size) is finite and leaves the others alone, in training too."""
    x, lengths = example.inputs["x"], example.inputs["lengths"]
    emptied = torch.where(torch.arange(len(lengths)) == 1, 0, lengths)
    result = run(example, x, emptied)
    assert result.y.isfinite().all()
    keep = torch.tensor([0, 2])
    whole = run(example, x, lengths)
    check_equal(
        Result(result.y[keep], result.lengths[keep]), Result(whole.y[keep], whole.lengths[keep])  # type: ignore[index]
    )  # fmt: skip
    trained = example.run(example.params, example.state, {"x": x, "lengths": emptied}, key(1), True)
    assert trained.y.isfinite().all()


def test_a_row_of_the_model_does_not_depend_on_the_others() -> None:
    """From waveform to loss, in eval: two rows together lose what each loses alone."""
    example = model()
    inputs = dict(example.inputs)
    width = inputs["audio"].shape[1]
    pad = {name: torch.nn.functional.pad(inputs[name], (0, 8000)) for name in ("audio", "noisy_audio")}
    mask = valid_mask(torch.tensor([56, 56, 56]), 112)

    def loss_of(given: dict[str, torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
        from nest_fn import loss

        return loss(example.params, example.state, given, tiny(), train=False, mask=frames)[0]

    whole = loss_of(inputs, mask)
    wider = loss_of(inputs | pad, torch.nn.functional.pad(mask, (0, 48)))
    torch.testing.assert_close(whole, wider, atol=1e-5, rtol=1e-5)
    alone = [loss_of({k: v[row : row + 1] for k, v in inputs.items()}, mask[row : row + 1]) for row in range(3)]
    torch.testing.assert_close(whole, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)
    assert width == 16000


def test_features_do_not_depend_on_padding() -> None:
    audio, lengths = 0.1 * noise(2, 16000), torch.tensor([16000, 9000])
    cfg = tiny().preprocessor
    one, counts = log_mel(audio, lengths, cfg)
    two, _ = log_mel(torch.nn.functional.pad(audio, (0, 4000), value=0.3), lengths, cfg)
    for row, count in enumerate(counts.tolist()):
        torch.testing.assert_close(one[row, :, :count], two[row, :, :count], atol=1e-4, rtol=1e-4)


def test_stacking_lengths_depend_on_the_batch_as_in_the_reference() -> None:
    """Q26: a row of 51 frames has 6 stacks of 8 in a batch 100 wide, and 7 alone."""
    spec = SubsamplingSpec("stacking", 8, 80, 16, 0)
    assert subsampled_length(51, spec, 100) == 6
    assert subsampled_length(51, spec, 51) == 7
