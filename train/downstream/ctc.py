"""Fine-tuning by CTC: a linear head over characters on a pre-trained encoder (Graves et al., ICML 2006).

The loss is torch's, the edit distance torchaudio's. The encoder may be frozen for the first steps; while it is frozen
it runs in evaluation mode: no dropout, and its running statistics do not change (Q38).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchaudio.functional as AF

from nest_fn.config import Config
from nest_fn.files.inputs import read_plain
from nest_fn.files.quoting import shown
from nest_fn.frontend import log_mel
from nest_fn.layers import random
from nest_fn.layers.linear import init_linear, linear
from nest_fn.layers.tree import device_of, flatten, global_norm, unflatten
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.model import encode
from nest_fn.train.data.dataset import Dataset, RawBatch, batches, load_batch, open_dataset
from nest_fn.train.data.transfer import to_device
from nest_fn.train.errors import DataError, UsageError
from nest_fn.train.step.optimizer import make_optimizer, scale
from nest_fn.train.step.schedule import make_schedule

BLANK = 0


class Alphabet(NamedTuple):
    """Output tokens: index 0 is the blank, index ``i + 1`` is ``tokens[i]``."""

    tokens: tuple[str, ...]

    def encode(self, text: str, where: str) -> list[int]:
        """Token indices of a text's characters. Raises ``DataError`` for one that is not in the alphabet."""
        place = {token: number + 1 for number, token in enumerate(self.tokens)}
        unknown = sorted(set(text) - place.keys())
        if unknown:
            raise DataError(f"{where}: text holds {unknown}, which are not among the {len(place)} tokens")
        return [place[letter] for letter in text]

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of greedily decoded indices: repeats merged, blanks dropped."""
        merged = [number for index, number in enumerate(numbers) if index == 0 or number != numbers[index - 1]]
        return "".join(self.tokens[number - 1] for number in merged if number != BLANK)


def read_tokens(path: str | Path) -> list[str]:
    """Read tokens, one per line. Raises ``UsageError`` if the file cannot be read, is empty or has duplicates."""
    try:
        tokens = read_plain(path).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"tokens {path}: {error.strerror or error}; give a file with one token a line.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"tokens {path}: is not UTF-8 text (byte {error.start}); save it so.") from error
    invalid = [token for token, count in Counter(tokens).items() if count > 1 or not token]
    if invalid or not tokens:
        why = f"{shown(invalid[0])} stands in it twice or is empty" if invalid else "holds no token"
        raise UsageError(f"tokens {path}: {why}; want one token a line, each once.")
    return tokens


class Rates(NamedTuple):
    """Validation loss, and character and word error rates against the reference texts."""

    loss: float
    cer: float
    wer: float


class Finetuned(NamedTuple):
    """The model after some steps: params and state in the layout of pre-training, and the CTC head."""

    params: Params
    head: Any
    state: State
    alphabet: Alphabet


def alphabet_of(texts: Sequence[str]) -> Alphabet:
    """All characters of the texts, sorted."""
    return Alphabet(tuple(sorted(set("".join(texts)))))


def finetune(
    params: Params, state: State, cfg: Config, *, frozen_steps: int = 0, tokens: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, Rates, Finetuned]]:  # fmt: skip
    """Train head and encoder on ``data.train``, whose lines have ``text``; yields step, validation rates and model.

    The number of steps, the validation interval, optimizer and schedule are those of the config's ``trainer`` and
    ``optim``. Raises ``DataError`` and ``UsageError`` before the first step, also for characters that are not tokens.
    """
    train = open_dataset(cfg.data, seed, split="train", sample_rate=cfg.sample_rate)
    valid = open_dataset(cfg.data, seed, split="valid", sample_rate=cfg.sample_rate)
    texts, valid_texts = _texts(train), _texts(valid)
    alphabet = Alphabet(tuple(tokens)) if tokens else alphabet_of(list(texts.values()))
    for name, text in (*texts.items(), *valid_texts.items()):
        alphabet.encode(text, name)
    return _steps(
        params,
        state,
        cfg,
        train,
        valid,
        valid_texts,
        texts,
        alphabet,
        frozen_steps,
        random.key(seed, device=device_of(params)),
    )


def _steps(
    params: Params, state: State, cfg: Config, train: Dataset, valid: Dataset, valid_texts: Mapping[str, str],
    texts: Mapping[str, str], alphabet: Alphabet, frozen_steps: int, key: Key,
) -> Iterator[tuple[int, Rates, Finetuned]]:  # fmt: skip
    """Train; yield after each validation."""
    head = init_linear(random.fold_in(key, 0), _width(cfg), len(alphabet.tokens) + 1)
    optimizer, schedule = make_optimizer(cfg.optim), make_schedule(cfg)
    leaves = {"head." + path: leaf for path, leaf in flatten(head).items()}
    leaves |= {"encoder." + path: leaf for path, leaf in flatten(params["encoder"]).items()}
    opt_state = None
    stream = batches(train)
    for step in range(cfg.trainer.max_steps):
        frozen = step < frozen_steps
        if step in (0, frozen_steps):
            opt_state = optimizer.init(_trainable(leaves, frozen))
        raw = next(stream)
        targets = [alphabet.encode(texts[name], name) if name else [] for name in raw["ids"]]
        step_key = random.fold_in(random.fold_in(key, 1), step)
        grads, state = _gradients(leaves, params, state, raw, targets, cfg, step_key, frozen)
        norm = global_norm(grads)
        if cfg.trainer.clip_norm > 0:
            grads = scale(grads, (cfg.trainer.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        updated, opt_state = optimizer.update(
            _trainable(leaves, frozen), grads, opt_state, schedule(step), donate=False
        )
        leaves = leaves | updated
        done = step + 1
        every = cfg.trainer.valid_every
        if (every > 0 and done % every == 0) or done == cfg.trainer.max_steps:
            tree = unflatten(leaves)
            made = Finetuned({**params, "encoder": tree["encoder"]}, tree["head"], state, alphabet)
            yield done, _evaluate(made, valid, valid_texts, cfg), made


def _gradients(
    leaves: dict[str, Tensor], params: Params, state: State, raw: RawBatch, targets: list[list[int]], cfg: Config,
    key: Key, frozen: bool,
) -> tuple[dict[str, Tensor], State]:  # fmt: skip
    trainable = {path: leaf.detach().requires_grad_() for path, leaf in _trainable(leaves, frozen).items()}
    tree = unflatten(leaves | trainable)
    log_probs, lengths, new_state = _log_probs(
        {**params, "encoder": tree["encoder"]}, tree["head"], state, raw, cfg, key, train=not frozen
    )
    value = _ctc(log_probs, lengths, targets)
    grads = torch.autograd.grad(value, list(trainable.values()), materialize_grads=True)
    return dict(zip(trainable, grads, strict=True)), new_state if not frozen else state


def _trainable(leaves: dict[str, Tensor], frozen: bool) -> dict[str, Tensor]:
    return {path: leaf for path, leaf in leaves.items() if not (frozen and path.startswith("encoder."))}


def _log_probs(
    params: Params, head: Any, state: State, raw: RawBatch, cfg: Config, key: Key | None, train: bool
) -> tuple[Tensor, Tensor, State]:
    """``[B, T, C]``, lengths in encoder frames, new state."""
    batch = to_device(raw, device_of(params))
    features_key, dropout_key = (None, None) if key is None else random.split(key, 2).unbind(0)
    mel, frames = log_mel(batch["audio"], batch["audio_len"], cfg.preprocessor, key=features_key, train=train)
    encoded, short, state = encode(
        params, state, mel, frames, cfg, key=dropout_key, train=train, rows=batch["utterance"]
    )
    return F.log_softmax(linear(head, encoded.transpose(1, 2)).float(), dim=-1), short, state


def _ctc(log_probs: Tensor, lengths: Tensor, targets: list[list[int]]) -> Tensor:
    """CTC loss per character, averaged over the utterances; rows without text are left out."""
    used = [row for row, target in enumerate(targets) if target]
    if not used:
        return log_probs.sum() * 0.0
    sizes = torch.tensor([len(targets[row]) for row in used], device=log_probs.device)
    flat = torch.tensor([number for row in used for number in targets[row]], device=log_probs.device)
    rows = torch.tensor(used, device=log_probs.device)
    return F.ctc_loss(log_probs[rows].transpose(0, 1), flat, lengths[rows], sizes, blank=BLANK, zero_infinity=True)


@torch.no_grad()
def _evaluate(made: Finetuned, valid: Any, texts: Mapping[str, str], cfg: Config) -> Rates:
    """Greedy decoding of the validation set in evaluation mode."""
    losses, letters, wrong_letters, words, wrong_words = [], 0, 0, 0, 0
    for number, planned in enumerate(valid.plan(0)):
        raw = load_batch(valid, planned, 0, number)
        log_probs, lengths, _ = _log_probs(made.params, made.head, made.state, raw, cfg, None, train=False)
        targets = [made.alphabet.encode(texts[name], name) if name else [] for name in raw["ids"]]
        losses.append(float(_ctc(log_probs, lengths, targets)))
        best = log_probs.argmax(dim=-1)
        for row, name in enumerate(raw["ids"]):
            if name:
                decoded = made.alphabet.decode(best[row, : int(lengths[row])].tolist())
                wrong_letters += AF.edit_distance(decoded, texts[name])
                wrong_words += AF.edit_distance(decoded.split(), texts[name].split())
                letters, words = letters + len(texts[name]), words + len(texts[name].split())
    return Rates(sum(losses) / len(losses), wrong_letters / max(letters, 1), wrong_words / max(words, 1))


def _texts(dataset: Any) -> dict[str, str]:
    """The text of every utterance by id. Raises ``DataError`` for a line without text."""
    found = {}
    for index in range(len(dataset.manifest)):
        text = dataset.manifest.fields(index).get("text")
        if not isinstance(text, str) or not text:
            raise DataError(f"{dataset.manifest.where(index)}: has no 'text'; CTC learns from transcripts")
        found[dataset.manifest.identity(index)] = text
    return found


def _width(cfg: Config) -> int:
    return cfg.encoder.feat_out if cfg.encoder.feat_out > 0 else cfg.encoder.d_model
