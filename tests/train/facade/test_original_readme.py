"""The code blocks of the original PureTorchSSLModel README, run on real audio.

Where that file is absent, ``test_ssl_model.py`` and ``test_facade_files.py`` cover its statements one by one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nest_fn import Config, PureTorchSSLModel, create_optimizer
from nest_fn.train.data.audio_files.audio import read_audio

SHARED = Path(__file__).parents[4] / "shared"
README, DATA = SHARED / "seed.md", SHARED / "data"

pytestmark = [
    pytest.mark.skipif(not README.exists() or not DATA.is_dir(), reason="needs ../shared/seed.md and ../shared/data"),
    # The example's lr 1e-4 is Noam's factor; create_scheduler says so.
    pytest.mark.filterwarnings("ignore:.*optim.lr 0.0001 with noam peaks at"),
]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def adapted(code: str, folder: Path) -> str:
    """The import line and the file names changed; without a GPU, the device's name too."""
    code = code.replace("from ssl_model import", "from nest_fn import")
    for name in ("config.yaml", "checkpoint.pt"):
        code = code.replace(f'"{name}"', repr(str(folder / name)))
    return code if torch.cuda.is_available() else code.replace("'cuda'", "'cpu'")


def clip(line: dict[str, Any], samples: int) -> torch.Tensor:
    """The beginning of a recording, float in [-1, 1]."""
    audio = read_audio(DATA / line["audio_filepath"], duration=samples / 16000, tolerance=10.0)
    return torch.from_numpy(audio).float() / 2**15


def real_batches() -> list[tuple[torch.Tensor, ...]]:
    """Read speech and rain at some 6 dB below it, as ``(audio, audio_len, noise, noise_len, noisy, noisy_len)``."""
    pytest.importorskip("soundfile")
    speech, noise = (
        [json.loads(line) for line in (DATA / name).read_text().splitlines()[:4]]
        for name in ("librispeech_valid.jsonl", "noise.jsonl")
    )
    made = []
    for pair in (slice(0, 2), slice(2, 4)):
        clean = torch.stack([clip(line, 32000) for line in speech[pair]])
        added = torch.stack([clip(line, 32000) for line in noise[pair]])
        added = added * 0.5 * clean.norm(dim=1, keepdim=True) / added.norm(dim=1, keepdim=True).clamp(min=1e-3)
        lengths = torch.tensor([32000, 24000])
        made.append((clean, lengths, added, lengths, clean + added, lengths))
    return made


def write_config(folder: Path) -> None:
    """The README's YAML, with a smaller encoder so that its code runs in seconds."""
    (text,) = blocks("yaml")
    tree = yaml.safe_load(text)
    small = {"n_layers": 2, "d_model": 32, "n_heads": 4, "subsampling_conv_channels": 16}
    tree["model"]["encoder"] |= small
    tree["model"]["num_classes"] = 64
    tree["model"]["optim"]["sched"]["d_model"] = 32
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def test_every_block_runs_on_real_audio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path)
    batches = real_batches()
    clean_audio, clean_len, noise, noise_len, noisy_audio, noisy_len = batches[0]
    dicts = [dict(zip(("audio", "audio_len", "noisy_audio", "noisy_audio_len"), (*b[:2], *b[4:]), strict=True))
             for b in batches]  # fmt: skip
    names: dict[str, Any] = {
        "dataclass": dataclass, "torch": torch, "dataloader": dicts, "clean_audio": clean_audio, "clean_len": clean_len,
        "audio": clean_audio, "audio_len": clean_len, "noise": noise, "noise_len": noise_len,
        "noisy_audio": noisy_audio, "noisy_len": noisy_len, "noisy_audio_len": noisy_len,
    }  # fmt: skip
    found = blocks("python")
    assert len(found) == 8
    for number, code in enumerate(found[:5]):
        exec(compile(adapted(code, tmp_path), f"seed.md, block {number}", "exec"), names)
        if number == 1:
            assert sum(leaf.numel() for leaf in names["model"].parameters()) == 112_964_608  # NEST-Large
    printed = capsys.readouterr().out
    assert re.fullmatch(r"(Loss: \d\.\d{4}\n){2}Resuming from epoch 10, step 1000\n", printed)
    assert names["log_probs"].shape == (2, 26, 64, 1)
    assert names["encoded_len"].tolist() == [25, 19]
    assert not names["masks"].any() and names["masks"].shape == (2, 80, 208)
    assert names["tokens"].shape == (2, 26, 1)

    model, values = names["model"], []
    for number, code in enumerate(found[5:]):
        exec(compile(adapted(code, tmp_path), f"seed.md, batch {number}", "exec"), names)
        one = names["AudioNoiseBatch"](*batches[0]) if number == 0 else names["batch"]
        model.counter.zero_()
        model.load_checkpoint(tmp_path / "checkpoint.pt")
        values.append(model.training_step(one))
    assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])


def test_the_yaml_as_it_stands() -> None:
    """Numbers that PyYAML takes for texts, and every key with its value."""
    (text,) = blocks("yaml")
    raw = yaml.safe_load(text)
    assert raw["model"]["optim"]["lr"] == "1e-4"
    cfg = Config.from_dict(raw)
    assert cfg.encoder.n_layers == 17
    assert (cfg.optim.lr, cfg.optim.betas, cfg.optim.weight_decay) == (1e-4, (0.9, 0.999), 1e-3)
    sched = cfg.optim.sched
    assert sched is not None and (sched.name, sched.d_model, sched.warmup, sched.min_lr) == ("noam", 512, 25000, 1e-6)
    group = create_optimizer(torch.nn.Linear(1, 1), raw).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.9, 0.999), 1e-3)


@pytest.mark.slow
def test_training_on_real_audio_lowers_the_loss() -> None:
    """Forty steps on one batch: through files, mixing, batches and the original README's loop."""
    cfg = Config.preset("tiny", ["optim={name: adamw, lr: 3e-3, sched: null}", "masking.mask_prob=0.03"])
    model = PureTorchSSLModel.from_config(cfg)
    optimizer, batch = create_optimizer(model, cfg), real_batches()[0]
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        value = model.training_step(batch)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.5
