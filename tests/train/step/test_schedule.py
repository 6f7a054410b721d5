"""Learning rates against the numbers of the reference and formulas written out again (reference 6.4, 12)."""

from __future__ import annotations

import math

import pytest

from nest_fn.config import Config
from nest_fn.train.step.schedule import cosine, make_schedule, noam


@pytest.mark.parametrize(
    "k, wanted",
    [
        (0, 5.590170e-8),
        (1, 5.590170e-8),
        (2, 1.118034e-7),
        (3, 1.677051e-7),
        (25000, 1.3975425e-3),
        (50000, 9.882118e-4),
    ],
)
def test_noam_has_the_references_rates(k: int, wanted: float) -> None:
    assert noam(5.0, 512, 25000, 1e-6)(k) == pytest.approx(wanted, rel=1e-6)


def test_noam_holds_its_floor_after_warm_up_alone() -> None:
    rate = noam(1e-4, 512, 100, 1e-6)
    assert rate(1) == pytest.approx(1e-4 * 512**-0.5 * 100**-1.5) and rate(100) < 1e-6
    assert rate(101) == rate(10**9) == 1e-6
    assert noam(5.0, 512, 0)(4) == pytest.approx(5.0 * 512**-0.5 / 2)


@pytest.mark.parametrize(
    "k, wanted",
    [(0, 9.0909e-5), (9, 9.0909e-4), (10, 1e-3), (11, 9.996985e-4), (55, 5.05e-4), (100, 1e-5), (999, 1e-5)],
)
def test_cosine_has_the_references_rates(k: int, wanted: float) -> None:
    assert cosine(1e-3, 10, 100, 1e-5)(k) == pytest.approx(wanted, rel=1e-5)


def test_cosine_with_a_constant_part() -> None:
    rate = cosine(1e-3, 10, 100, 1e-5, constant=30)
    assert rate(0) == 0 and rate(5) == pytest.approx(5e-4) and rate(10) == pytest.approx(1e-3)
    assert rate(40) == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi / 2)))
    assert rate(70) == rate(99) == pytest.approx(1e-5)


def test_cosine_that_is_all_warm_up() -> None:
    rate = cosine(1.0, 4, 4)
    assert [rate(k) for k in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rate(4) == 0
    with pytest.raises(ValueError, match="warm-up and constant part take 7 of 6 steps"):
        cosine(1.0, 5, 6, constant=2)


def _config(*overrides: str) -> Config:
    return Config.preset("nest_large", list(overrides))


def test_what_the_config_says() -> None:
    assert make_schedule(_config())(25000) == pytest.approx(1.3975425e-3)
    assert make_schedule(_config("optim.sched.d_model=128"))(25000) == pytest.approx(2 * 1.3975425e-3)
    ratio = _config("optim.sched.warmup_steps=null", "optim.sched.warmup_ratio=0.1", "trainer.max_steps=1000")
    assert make_schedule(ratio)(100) == pytest.approx(5.0 * 512**-0.5 * 100**-0.5)
    plain = _config("optim.sched.name=constant", "optim.lr=0.003")
    assert make_schedule(plain)(0) == make_schedule(plain)(10**6) == 0.003
    assert make_schedule(_config("optim.sched=null", "optim.lr=0.004"))(7) == 0.004
    wave = _config("optim.sched.name=cosine", "optim.lr=1e-3", "optim.sched.warmup_steps=10", "trainer.max_steps=100",
                   "optim.sched.min_lr=1e-5")  # fmt: skip
    assert [make_schedule(wave)(k) for k in range(200)] == [cosine(1e-3, 10, 100, 1e-5)(k) for k in range(200)]
