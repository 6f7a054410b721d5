"""The folder in which the command line is fuzzed: good inputs, and files of every kind that are none."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nest_fn import Config, init, key, save_file
from nest_fn.config.parse.coerce import to_plain
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import main
from nest_fn.train.ctc.model_files import Recogniser, save_recogniser
from nest_fn.train.ctc.recogniser import Design, init_head
from nest_fn.train.ctc.tokens import TokenList
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.manifest import write_manifest

ODD = (
    "pipe", "socket", "zero", "full", "folder", "loop", "dangling", "missing", "empty", "binary", "truncated.wav",
    "truncated.pt", "hugeline", "hugeline.yaml", "bom.jsonl", "bom.yaml", "utf16.jsonl", "utf16.yaml", "crlf.jsonl",
    "crlf.yaml", "scalar.yaml", "list.yaml", "pipe.wav", "zero.wav", "no.wav", "text.wav", "model.pt", "m.jsonl",
    "a0.wav",
    "missing/deep/file", "a0.wav/below", "run", ".", "mixed", "read only",
)  # fmt: skip
_TINY = ("encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "data.batch_seconds=4", "data.max_duration=4",
         "trainer.max_steps=1", "data.num_workers=0")  # fmt: skip

_TWO = ("trainer.max_steps=2", "trainer.save_every=1")


class Stage:
    """Where a line is tried: the current folder."""

    odd = ODD

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        plain = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        self._contents = {str(path): path.read_bytes() for path in plain}
        self.keys = sorted({*flatten(to_plain(Config())), "data.train", "nonsense", "encoder", "a.b"})

    def good(self, command: str) -> dict[str, list[str]]:
        """Arguments with which a command works, by name."""
        model, data, out = ["model.pt"], ["m.jsonl"], ["out/new"]
        train = ["data.train=m.jsonl", "data.valid=m.jsonl", *_TINY]
        return {
            "pretrain": {"config": ["tiny"], "folder": out, "overrides": train},
            "replay": {"run": ["run"], "step": ["1"], "overrides": []},
            "verify": {"run": ["run"], "start": ["0"], "steps": ["2"], "overrides": []},
            "diff": {"first": ["run"], "second": ["run"], "overrides": []},
            "report": {"runs": ["run"], "out": ["out/new.html"], "utterances": ["0"]},
            "study": {"study": ["study.yaml"], "folder": out, "array": ["out/new.sh"]},
            "data scan": {"folder": ["audio"], "manifest": ["out/new.jsonl"]},
            "data import": {"source": ["cuts.jsonl"], "out": out},
            "data validate": {"manifest": data},
            "data stats": {"manifest": data},
            "data shard": {"manifest": data, "out": out, "shards": ["1"]},
            "data synth": {"out": out},
            "config show": {"config": ["tiny"]},
            "config diff": {"config": ["tiny"], "other": ["demo"]},
            "completion": {"shell": ["bash"]},
            "convert": {"source": model, "target": out},
            "export": {"checkpoint": model, "out": ["out/new.pt2"]},
            "extract": {"checkpoint": model, "source": data, "out": out},
            "tokenize": {"checkpoint": model, "source": data, "out": out},
            "probe": {"checkpoint": model, "label": ["speaker"], "train": data, "test": data},
            "finetune-ctc": {"checkpoint": model, "out": out, "overrides": train, "tokens": ["characters"]},
            "transcribe": {"checkpoint": ["recogniser"], "source": data, "out": ["out/new.jsonl"]},
            "analyse": {"run": model, "what": ["stability"], "overrides": ["data.valid=m.jsonl"], "out": out},
        }.get(command, {})

    def files(self) -> dict[str, tuple[int, int]]:
        """Every file and folder below, with its size and the time of its last change; those of the run are its own."""
        found = {}
        for where, folders, names in os.walk(self.folder):
            for name in (*folders, *names):
                path = os.path.join(where, name)
                look = os.lstat(path)
                known = name in names and not path.startswith(os.path.join(self.folder, "run", ""))
                found[path] = (look.st_size, look.st_mtime_ns) if known else (0, 0)
        return found

    def tidy(self, made: set[str], changed: list[str]) -> None:
        """Remove what a line made, and put back what it changed."""
        for path in changed:
            if path in self._contents:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(self._contents[path])
        for path in sorted(made):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(path)


@contextlib.contextmanager
def staged() -> Iterator[Stage]:
    """A stage in a temporary folder, which is the current one meanwhile."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as made:
        os.chdir(name)
        try:
            _good()
            made.bind("socket")
            _odd()
            yield Stage(Path(name))
        finally:
            os.chdir(here)


def _good() -> None:
    os.mkdir("audio")
    draw = np.random.Generator(np.random.Philox(1))
    lines = []
    for number in range(3):
        samples = draw.normal(0, 2000, 16000 + 1600 * number).astype(np.int16)
        for folder in (".", "audio"):
            write_wav(f"{folder}/a{number}.wav", samples)
        known = {"speaker": f"s{number % 2}", "text": "ab"}
        lines.append({"audio_filepath": f"a{number}.wav", "duration": len(samples) / 16000, **known})
    write_manifest("m.jsonl", lines)
    source = {"type": "file", "channels": [0], "source": "a0.wav"}
    write_manifest("cuts.jsonl", [{"id": "a", "sources": [source], "duration": 1.0}])
    data = ", ".join(["data.train=m.jsonl", "data.valid=m.jsonl", *_TINY])
    Path("study.yaml").write_text(f"config: tiny\noverrides: [{data}]\nseeds: [0]\narms: {{a: []}}\n")
    cfg = Config.preset("tiny", _TINY[:2])
    params, state = init(key(0), cfg)
    save_file("model.pt", params, state, cfg)
    design, tokens = Design(0), TokenList(("a", "b"))
    made = Recogniser(params, state, init_head(key(1), cfg, design, tokens.size), cfg, design, tokens)
    save_recogniser("recogniser", made, cfg.to_dict(), {})
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        assert main(["pretrain", "-c", "tiny", "--folder", "run", "data.train=m.jsonl", *_TINY, *_TWO]) == 0, (
            told.getvalue()
        )


def _odd() -> None:
    for name in ("pipe", "pipe.wav"):
        os.mkfifo(name)
    for name, target in (("zero", "/dev/zero"), ("zero.wav", "/dev/zero"), ("full", "/dev/full"), ("loop", "loop"),
                         ("dangling", "nowhere")):  # fmt: skip
        os.symlink(target, name)
    os.mkdir("folder")
    os.mkdir("mixed")
    shutil.copy("a0.wav", "mixed/good.wav")
    os.mkfifo("mixed/pipe.wav")
    os.symlink("/dev/zero", "mixed/zero.wav")
    os.mkdir("mixed/folder.wav")
    Path("mixed/empty.wav").touch()
    Path("empty").touch()
    Path("no.wav").touch()
    Path("binary").write_bytes(bytes(range(256)) * 64)
    Path("text.wav").write_text("no audio")
    Path("truncated.wav").write_bytes(Path("a0.wav").read_bytes()[:5000])
    Path("truncated.pt").write_bytes(Path("model.pt").read_bytes()[:5000])
    line, text = Path("m.jsonl").read_text(), "encoder: {n_layers: 1}\n"
    Path("hugeline").write_bytes(b'{"audio_filepath": "' + b"a" * 5_000_000 + b'"}\n')
    Path("hugeline.yaml").write_text("encoder: {subsampling: " + "x" * 900_000 + "}\n")
    Path("bom.jsonl").write_text("\ufeff" + line)
    Path("bom.yaml").write_text("\ufeff" + text)
    Path("utf16.jsonl").write_text(line, encoding="utf-16")
    Path("utf16.yaml").write_text(text, encoding="utf-16")
    Path("crlf.jsonl").write_bytes(line.replace("\n", "\r\n").encode())
    Path("crlf.yaml").write_bytes(text.replace("\n", "\r\n").encode())
    Path("scalar.yaml").write_text("7\n")
    Path("list.yaml").write_text("[1, 2]\n")
    os.mkdir("read only", mode=0o555)
    os.mkdir("out")
