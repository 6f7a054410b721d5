"""``nest-fn demo``: synthetic speech, a small model, and what it learnt, in a few minutes on two cores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import retention
from nest_fn.config import Config
from nest_fn.config.writer import to_text
from nest_fn.files.atomic import anything, atomic_write
from nest_fn.files.outputs import begin, claim
from nest_fn.frontend import log_mel
from nest_fn.hidden_states import features
from nest_fn.layers.types import Params, State, Tensor
from nest_fn.model import init
from nest_fn.train.data.audio_files.audio import read_audio
from nest_fn.train.data.synth import PHONES, CorpusSpec, write_corpus
from nest_fn.train.downstream.linear_probe import (
    UNKNOWN,
    accuracy,
    choose,
    fit_linear_probe,
    frame_labels,
    stack_frames,
)
from nest_fn.train.errors import UsageError
from nest_fn.train.keys import init_key, root_key
from nest_fn.train.report.record import read_records
from nest_fn.train.report.write import make_report
from nest_fn.train.reporter import Reporter
from nest_fn.train.run.pretrain import pretrain
from nest_fn.train.run.record.run_folder import RunFolder

PHONE_NAMES = list(PHONES)
Maker = Callable[[Tensor, Tensor], list[Tensor]]
"""Audio ``[1, N]`` and its length to features of the frames of each layer, ``[T, D]``."""


def run_demo(cfg: Config, run: Path, seed: int, reporter: Reporter) -> int:
    """Make the corpus, pre-train, probe and report; the exit code of the training."""
    reporter.say("Synthetic speech: this shows that training works, not how good the features are on real speech.")
    origin = {"command": "demo", "seed": seed, "config": to_text(cfg.to_dict())}
    place = claim(run, origin, folder=True, overwrite=None)
    begin(place)
    manifests = write_corpus(run / "corpus", CorpusSpec(seed=seed))
    data = dataclasses.replace(
        cfg.data, train=(str(manifests["train"]),), valid=(str(manifests["valid"]),), noise=(str(manifests["noise"]),)
    )
    cfg = dataclasses.replace(cfg, data=data, trainer=dataclasses.replace(cfg.trainer, seed=seed))
    code = pretrain(cfg, RunFolder(run / "run"), reporter)
    if code:
        return code
    found = probe_run(cfg, run / "run", manifests)
    with atomic_write(run / "probe.json", 0, replaces=anything) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    for line in summary(run / "run", found):
        reporter.say(line)
    _write_report(run, reporter)
    return 0


def _write_report(run: Path, reporter: Reporter) -> None:
    """``report.html`` in the demo's folder, if matplotlib is there to draw it."""
    try:
        made = make_report(read_records([run / "run"]), (), 3, [run / "probe.json"], reporter)
    except UsageError as error:
        reporter.say(str(error))
        return
    with atomic_write(run / "report.html", len(made), replaces=anything) as temporary:
        temporary.write_text(made, encoding="utf-8")
    reporter.say(f"the report, to open in a browser: {run / 'report.html'}")


def probe_run(cfg: Config, run: Path, manifests: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Phone accuracy of linear probes on held-out speakers, clean and noisy: learnt features, untrained ones, log-mel.

    A probe sees speakers of the training set only, their clean and noisy speech together; its penalty, and the layer
    of the encoder, are chosen on some of these speakers that it has not seen.
    """
    path, _ = retention.newest_valid(run / "checkpoints")
    trees, _, _ = checkpoint_folder.read_checkpoint(path)  # type: ignore[arg-type]
    learnt = (trees["ema"] or trees["params"], trees["state"])
    untrained = init(init_key(root_key(cfg.trainer.seed)), cfg)
    makers: dict[str, Maker] = {
        "learnt": lambda audio, length: _encoder_features(*learnt, audio, length, cfg),
        "untrained": lambda audio, length: _encoder_features(*untrained, audio, length, cfg),
        "log-mel": lambda audio, length: [_mel_features(audio, length, cfg)],
    }
    train = [manifests["probe_train"], manifests["probe_train_noisy"]]
    tests = {"clean": manifests["probe_test"], "noisy": manifests["probe_test_noisy"]}
    return {name: _probe(maker, train, tests) for name, maker in makers.items()}


def _probe(maker: Maker, train: Sequence[Path], tests: dict[str, Path]) -> dict[str, float]:
    """The layer with the best accuracy on held-out training speakers, and its accuracy on the test sets."""
    x, y, speakers = _collect(maker, train)
    names = sorted(set(speakers))
    groups = torch.tensor([names.index(name) for name in speakers])
    best = choose(x, y, len(PHONE_NAMES), groups)
    probe = fit_linear_probe(x[best.layer], y, len(PHONE_NAMES), penalty=best.penalty)
    found = {"layer": float(best.layer), "held_back": best.accuracy}
    for name, manifest in tests.items():
        test_x, test_y, _ = _collect(maker, [manifest])
        found[name] = accuracy(probe, test_x[best.layer], test_y)
    return found


def _collect(maker: Maker, manifests: Sequence[Path]) -> tuple[list[Tensor], Tensor, list[str]]:
    """Features of every layer ``[frames, D]``, the phone and the speaker of every frame."""
    by_layer: list[list[Tensor]] = []
    labels: list[Tensor] = []
    speakers: list[str] = []
    for manifest in manifests:
        for line in manifest.read_text().splitlines():
            entry = json.loads(line)
            samples = read_audio(str(manifest.parent / entry["audio_filepath"]), 0.0, None)
            audio = torch.from_numpy(samples)[None]
            made = maker(audio, torch.tensor([audio.shape[1]]))
            label = frame_labels(entry["phones"], made[0].shape[0], PHONE_NAMES)
            known = label != UNKNOWN
            by_layer = by_layer or [[] for _ in made]
            for one, layer in zip(by_layer, made, strict=True):
                one.append(layer[known])
            labels.append(label[known])
            speakers += [entry["speaker"]] * int(known.sum())
    return [torch.cat(layer) for layer in by_layer], torch.cat(labels), speakers


@torch.no_grad()
def _encoder_features(params: Params, state: State, audio: Tensor, length: Tensor, cfg: Config) -> list[Tensor]:
    made, lengths = features(params, state, audio, length, cfg)
    return [layer[0, : int(lengths[0])] for layer in made]


def _mel_features(audio: Tensor, length: Tensor, cfg: Config) -> Tensor:
    mel, frames = log_mel(audio, length, cfg.preprocessor)
    factor = cfg.encoder.subsampling_factor
    return stack_frames(mel, factor)[0, : -(-int(frames[0]) // factor)]


def summary(run: Path, found: dict[str, dict[str, float]]) -> list[str]:
    """The end of the demo in words, honest about what did not work out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [line["valid"] for line in lines if "valid" in line][-1]
    told = [
        f"run folder {run}",
        f"masked accuracy {valid['accuracy']:.3f}; always the commonest token: {valid['unigram_accuracy']:.3f}",
        "phone accuracy of a linear probe, speakers never heard before (synthetic speech):",
        "                   clean   noisy",
    ]
    told += [f"  {name:<15} {scores['clean']:6.3f}  {scores['noisy']:6.3f}" for name, scores in found.items()]
    for other, kind in (("untrained", "clean"), ("untrained", "noisy"), ("log-mel", "noisy")):
        if found["learnt"][kind] <= found[other][kind]:
            told.append(f"on {kind} speech the learnt features did NOT beat {other} in this run")
    return told
