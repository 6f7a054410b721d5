"""The original PureTorchSSLModel interface: an ``nn.Module`` around the functional core that computes nothing itself.

    from nest_fn import PureTorchSSLModel, create_optimizer, create_scheduler

    model = PureTorchSSLModel.from_config_file("config.yaml")
    loss = model.training_step(batch)

It holds the trees ``params`` and ``state`` as parameters and buffers named by their dotted paths, a seed, and a counter
of draws; ``nest_fn.model`` does all arithmetic. The core's functions accept ``model.params``, ``model.state`` and
``model.cfg`` directly.

Besides optimizers and loading, two things change a model: in training mode, ``forward`` and ``training_step`` write the
new batch statistics into the buffers, as ``torch.nn.BatchNorm1d`` does, and every draw increments the counter. Neither
happens under the transforms of ``torch.func``, where a model is a pure function of its parameters, buffers and
arguments.

Draw ``n`` of training uses ``split(fold_in(fold_in(key(seed), TRAIN), n), 2)[1]``, which is the model's key in step
``n`` of the functional trainer with that seed; evaluation has its own stream and count. The draws of a batch's rows are
keyed by 0..B-1. If ranks hold different rows, give the rows' numbers in the batch (``row``), or each rank its own seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from nest_fn import model as core
from nest_fn.checkpoint.model_files import check_trees
from nest_fn.config import Compat, Config
from nest_fn.errors import CheckpointError
from nest_fn.interop import nemo
from nest_fn.interop.port_keywords import KEYWORDS, config_from_keywords
from nest_fn.layers import random
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.tree import flatten, tree_map
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.losses import masked_cross_entropy, token_mask
from nest_fn.train.keys import TRAIN, VALID, init_key, root_key, split_step_key

from .batch_formats import as_batch, signal_parts
from .checkpoint_file import OPTIMIZER, WEIGHTS, model_of, read_file, weights_of, write_file
from .module_tree import collect_tree, register_tree, skeleton
from .torch_optim import create_optimizer, create_scheduler

__all__ = ["PureTorchSSLModel", "create_optimizer", "create_scheduler"]

_REFERENCE = ("preprocessor.", "encoder.pre_encode.", "decoder.decoder_layers.", "quantizer.proj.", "mask_processor.")
"""Prefixes of names that only the reference's ``state_dict`` has."""


class PureTorchSSLModel(nn.Module):
    """NEST for pre-training: masked prediction of quantized clean speech from noisy speech (arXiv 2408.13106)."""

    cfg: Config
    seed: int
    counter: Tensor  # int64 [2]: draws in training, draws in evaluation

    def __init__(
        self, sample_rate: int = 16000, features: int = 80, window_size: float = 0.025, window_stride: float = 0.01,
        n_fft: int = 512, normalize: str = "per_feature", n_layers: int = 17, d_model: int = 512, n_heads: int = 8,
        subsampling: str = "dw_striding", subsampling_factor: int = 8, subsampling_conv_channels: int = 256,
        ff_expansion_factor: int = 4, conv_kernel_size: int = 9, dropout: float = 0.1, num_classes: int = 8192,
        num_books: int = 1, code_dim: int = 16, squeeze_single: bool = False, block_size: int = 40,
        mask_prob: float = 0.01, mask_threshold: float = 0.8, mask_position: str = "pre_conv", *,
        overrides: Sequence[str] = (), seed: int | None = None,
    ) -> None:  # fmt: skip
        """A new model. ``overrides`` set any key of the config, e.g. ``["encoder.xscaling=false"]``.

        ``window_size`` and ``window_stride`` are seconds, ``block_size`` is frames of 10 ms. As in the original there
        is no dither, and ``dropout`` is the rate of all dropout layers; overrides take precedence over both. ``seed``
        (None: ``trainer.seed``, 0) determines the initial values and all draws. Raises ``ConfigError``.
        """
        given = locals()
        cfg = config_from_keywords({name: given[name] for name in KEYWORDS}).override(*overrides)
        self._build(cfg, None, seed)

    @classmethod
    def from_config_file(
        cls, path: str | Path, overrides: Sequence[str] = (), seed: int | None = None
    ) -> PureTorchSSLModel:
        """A new model from a YAML file, with or without a ``model`` root. Raises ``ConfigError``."""
        return cls.from_config(Config.from_yaml(path, overrides), seed)

    @classmethod
    def from_config(cls, cfg: Config, seed: int | None = None) -> PureTorchSSLModel:
        """A new model with the same initial values as in the functional trainer."""
        model = cls.__new__(cls)
        model._build(cfg, None, seed)
        return model

    @classmethod
    def from_params(cls, params: Params, state: State, cfg: Config, seed: int | None = None) -> PureTorchSSLModel:
        """A model with copies of the given trees. Raises ``ValueError`` if they do not fit ``cfg``."""
        check_trees("from_params", params, state, cfg)
        return cls._of(tree_map(_copy, params), tree_map(_copy, state), cfg, seed)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, seed: int | None = None, compat: Compat | None = None
    ) -> PureTorchSSLModel:
        """Load a model, on the CPU, from a file of ``save_checkpoint`` or the port, or any that ``convert`` reads.

        ``seed`` replaces the file's seed and resets the counter of draws; ``compat`` replaces the file's ``compat``
        setting. Raises ``CheckpointError``.
        """
        content = read_file(path)
        params, state, cfg = model_of(content, str(path))
        model = cls._of(params, state, cfg if compat is None else cfg.override(f"compat={compat}"), seed)
        if seed is None:
            model._set_draws(content)
        return model

    @classmethod
    def _of(cls, params: Params, state: State, cfg: Config, seed: int | None) -> PureTorchSSLModel:
        model = cls.__new__(cls)
        model._build(cfg, (params, state), seed)
        return model

    def _build(self, cfg: Config, trees: tuple[Params, State] | None, seed: int | None) -> None:
        super().__init__()
        self.cfg = cfg
        self.seed = cfg.trainer.seed if seed is None else seed
        params, state = core.init(init_key(root_key(self.seed)), cfg) if trees is None else trees
        self._structure = skeleton(params), skeleton(state)
        register_tree(self, params, state)
        # A tensor, so that compiled graphs do not depend on its value.
        self.register_buffer("counter", torch.zeros(2, dtype=torch.int64), persistent=False)

    @property
    def params(self) -> Params:
        """The tree of parameters; its leaves are the model's own tensors."""
        return collect_tree(self, self._structure[0])

    @property
    def state(self) -> State:
        """The tree of what is saved but not trained; its leaves are the model's own buffers."""
        return collect_tree(self, self._structure[1])

    @overload
    def forward(self, input_signal: Tensor | None = None, *signals: Any, **more: Any) -> core.Output: ...
    @overload
    def forward(self, input_signal: Any) -> Tensor: ...
    def forward(
        self, input_signal: Any = None, input_signal_length: Tensor | None = None,
        processed_signal: Tensor | None = None, processed_signal_length: Tensor | None = None,
        noisy_input_signal: Tensor | None = None, noisy_input_signal_length: Tensor | None = None,
        processed_noisy_signal: Tensor | None = None, processed_noisy_signal_length: Tensor | None = None,
        apply_mask: bool = False,
    ) -> core.Output | Tensor:  # fmt: skip
        """Return ``(log_probs [B, T, C, K], encoded_len [B], masks [B, M, F], tokens [B, T, K])``, or a batch's loss.

        Pass the clean and the noisy signal either raw, as float or int16 ``[B, N]`` with lengths in samples, or
        processed, as features ``[B, M, F]`` with lengths in frames. ``masks`` is all 0 unless ``apply_mask``. Raises
        ``ValueError`` unless exactly one of the two, with its lengths, is given for each signal.

        ``model(batch)``, with a batch in a format of ``batch_formats.py`` as the only argument, is
        ``model.training_step(batch)``, for callers that use ``forward`` only, such as DistributedDataParallel and
        ``functional_call``.
        """
        if input_signal is not None and not isinstance(input_signal, Tensor):
            return self.training_step(input_signal)
        signals = signal_parts(
            "signal", "audio", input_signal, input_signal_length, processed_signal, processed_signal_length
        )
        signals |= signal_parts(
            "noisy signal", "noisy_audio", noisy_input_signal, noisy_input_signal_length, processed_noisy_signal,
            processed_noisy_signal_length,
        )  # fmt: skip
        batch = {name: value.to(self._device) for name, value in signals.items()}
        key = self._draw() if self.training or apply_mask else None
        output, state = core.forward(
            self.params, self.state, batch, self.cfg, key=key, train=self.training, apply_mask=apply_mask
        )
        self._remember(state)
        return output

    def training_step(self, batch: Any) -> Tensor:
        """The mean cross-entropy in nats over the masked tokens of a batch: a differentiable scalar.

        It is 0, with zero gradients, if nothing is masked. ``batch`` may have any format of ``batch_formats.py`` and is
        moved to the model's device. In evaluation mode there is no dropout and no statistics are written.
        """
        tensors = as_batch(batch, self._device)
        loss, (_, state) = core.loss(self.params, self.state, tensors, self.cfg, key=self._draw(), train=self.training)
        self._remember(state)
        return loss

    def validation_step(self, batch: Any) -> Tensor:
        """The loss in evaluation mode, whatever mode the model is in, without gradients; each call draws new masks."""
        with torch.no_grad():
            tensors = as_batch(batch, self._device)
            return core.loss(self.params, self.state, tensors, self.cfg, key=self._draw(VALID), train=False)[0]

    def compute_loss(self, log_probs: Tensor, encoded_len: Tensor, masks: Tensor, tokens: Tensor) -> Tensor:
        """The mean cross-entropy over masked tokens, from the outputs of ``forward``: a scalar, 0 if none is masked."""
        counted = token_mask(masks[:, 0] > 0.5, self.cfg.loss) & valid_mask(encoded_len, log_probs.shape[1])
        return masked_cross_entropy(log_probs, tokens, counted)

    def save_checkpoint(
        self, path: str | Path, optimizer: Optimizer | None = None, epoch: int = 0, step: int = 0
    ) -> None:
        """Write weights, config, epoch, step, seed, counter and, if given, the optimizer's state to one file.

        Raises ``CheckpointError`` if it cannot be written; an earlier file is then unchanged.
        """
        content = {
            WEIGHTS: dict(self.state_dict()),
            "config": self.cfg.to_dict(),
            "epoch": int(epoch),
            "step": int(step),
            "seed": self.seed,
            "counter": self.counter.tolist(),
        }
        write_file(path, content | ({OPTIMIZER: optimizer.state_dict()} if optimizer is not None else {}))

    def load_checkpoint(
        self, path: str | Path, optimizer: Optimizer | None = None, strict: bool = True
    ) -> dict[str, int]:
        """Load weights, seed, counter and the optimizer's state; return ``{"epoch": ..., "step": ...}``.

        The model keeps its config. ``strict=False`` ignores names that only the file or only the model has. Raises
        ``CheckpointError`` if the file does not fit or has no state for a given ``optimizer``.
        """
        content = read_file(path)
        if optimizer is not None and OPTIMIZER not in content:
            raise CheckpointError(f"{path}: has no state of an optimizer; leave optimizer= out.")
        try:
            self.load_state_dict(weights_of(content), strict)
            if optimizer is not None:
                optimizer.load_state_dict(content[OPTIMIZER])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: does not fit: {' '.join(str(error).split())}") from error
        self._set_draws(content)
        return {"epoch": content["epoch"], "step": content["step"]}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Like that of ``nn.Module``, for our dotted paths or the reference's names (told apart by their prefixes)."""
        if not any(name.startswith(_REFERENCE) for name in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        missing, unexpected = [], []
        if not strict:
            have = nemo.to_state_dict(self.params, self.state, self.cfg)
            missing = [name for name in have if name not in state_dict]
            unexpected = [name for name in state_dict if name not in have]
            state_dict = {name: state_dict.get(name, leaf) for name, leaf in have.items()}
        params, state = nemo.from_state_dict(state_dict, self.cfg)
        super().load_state_dict(flatten(params) | flatten(state), True, assign)
        return _IncompatibleKeys(missing, unexpected)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _draw(self, stream: int | None = None) -> Key:
        """The key of the next draw from ``stream``, which by default follows from the model's mode."""
        stream = (TRAIN if self.training else VALID) if stream is None else stream
        place = (TRAIN, VALID).index(stream)
        root = random.fold_in(root_key(self.seed, device=self._device), stream)
        key = random.fold_in(root, self.counter[place])
        if not _transformed():
            self.counter[place].add_(1)
        return split_step_key(key).model

    def _remember(self, state: State) -> None:
        """Write the new batch statistics into the buffers, in training mode."""
        if not self.training or _transformed():
            return
        with torch.no_grad():
            have, new = flatten(self.state["encoder"]), flatten(state["encoder"])
            for path, buffer in have.items():
                buffer.copy_(new[path])

    def _set_draws(self, content: Mapping[str, Any]) -> None:
        self.seed = content.get("seed", self.seed)
        if "counter" in content:
            self.counter.copy_(torch.tensor(content["counter"]))


def _copy(leaf: Tensor) -> Tensor:
    return leaf.detach().clone()


def _transformed() -> bool:
    # PyTorch 2.11 has no public test for active grad, vmap or jvp.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
