"""``create_optimizer`` and ``create_scheduler`` of the original PureTorchSSLModel interface, as torch.optim objects.

They use the kernels of ``train/step/optimizer.py`` and the learning rates of ``train/step/schedule.py``, so that a loop
with these objects makes the same updates as the functional trainer, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nest_fn.config import Config
from nest_fn.train.step.schedule import Schedule, make_schedule


class ScheduleLR(LambdaLR):
    """The learning rates of a ``Schedule``; parameter groups with their own rate keep its ratio to ``peak``.

    torch's class multiplies a group's rate by a factor, which would round the scheduled rate a second time.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, peak: float, last_epoch: int = -1) -> None:
        self.peak = peak
        super().__init__(optimizer, schedule, last_epoch)

    def get_lr(self) -> list[Any]:
        """The rate of each group after ``last_epoch`` updates."""
        rates = [schedule(self.last_epoch) for schedule in self.lr_lambdas]
        return [
            rate * (base / self.peak if self.peak else 1.0) for rate, base in zip(rates, self.base_lrs, strict=True)
        ]


def create_optimizer(model: nn.Module, cfg: Config | Mapping[str, Any]) -> Optimizer:
    """The optimizer that ``optim`` describes (adamw, adam, sgd), over all parameters of ``model`` in one group.

    ``cfg`` is a ``Config`` or a plain mapping, complete or only its ``model`` section; numbers may be strings, since
    PyYAML reads ``1e-4`` as one. Parameters without a gradient are neither updated nor decayed. Raises ``ConfigError``
    and ``TypeError``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"create_optimizer: model is a {type(model).__name__}; pass a torch.nn.Module.")
    optim = _config(cfg).optim
    params = list(model.parameters())
    if optim.name == "sgd":
        return SGD(params, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, foreach=True)
    rule = AdamW if optim.name == "adamw" else Adam
    return rule(params, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)


def create_scheduler(
    optimizer: Optimizer, cfg: Config | Mapping[str, Any], num_training_steps: int | None = None, *, step: int = 0
) -> LambdaLR | None:
    """The schedule that ``optim.sched`` describes (reference 6.4), stepped after each update; None if it is constant.

    ``num_training_steps`` overrides ``sched.max_steps``. ``step`` is the number of updates already made, for a resumed
    run. As everywhere in this library, a config without ``sched`` has NEST's Noam schedule, and ``sched: null`` has
    none. Warns if Noam's peak is below ``min_lr``. Raises ``ConfigError`` and ``TypeError``.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"create_scheduler: optimizer is a {type(optimizer).__name__}; pass that of create_optimizer.")
    config = _config(cfg)
    sched = config.optim.sched
    if sched is None or sched.name == "constant":
        return None
    if num_training_steps is not None:
        config = config.override(f"optim.sched.max_steps={num_training_steps}")
    for remark in config.advice:
        if remark.startswith("optim."):
            warnings.warn(remark, stacklevel=2)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return ScheduleLR(optimizer, make_schedule(config), config.optim.lr, step - 1)


def _config(cfg: Config | Mapping[str, Any]) -> Config:
    if not isinstance(cfg, Config | Mapping):
        raise TypeError(f"cfg is a {type(cfg).__name__}; pass a Config, or a mapping with optim.")
    return cfg if isinstance(cfg, Config) else Config.from_dict(cfg)
