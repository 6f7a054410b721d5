"""Every command that writes, at every kind of place that is taken: what was there survives, byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nest_fn import Config, init, key
from nest_fn.checkpoint.model_files import load, save, save_file
from nest_fn.config.writer import to_text
from nest_fn.errors import OutputError
from nest_fn.files.lock import Lock
from nest_fn.files.outputs import MARK, claim, written
from nest_fn.interop.nemo_archive import write_nemo
from nest_fn.train.cli.main import main
from nest_fn.train.ctc.model_files import Recogniser, save_recogniser
from nest_fn.train.ctc.recogniser import Design, init_head
from nest_fn.train.ctc.tokens import TokenList
from nest_fn.train.downstream.extract import extract
from nest_fn.train.downstream.inference import load_model, open_audio
from nest_fn.train.finetune import run as finetuning
from tests import fuzz_cli, unprivileged
from tests.train.conftest import Corpus

THESIS = "thesis.tex"
Captured = pytest.CaptureFixture[str]


class Writer(NamedTuple):
    """A command that writes to ``{out}``, and whether that is a folder."""

    words: str
    folder: bool


WRITERS = {
    "convert to a folder": Writer("convert {model} {out}", True),
    "convert to .nemo": Writer("convert {model} {out}.nemo", False),
    "convert to .pt": Writer("convert {model} {out}.pt", False),
    "convert to .safetensors": Writer("convert {model} {out}.safetensors", False),
    "export": Writer("export {model} {out}.pt2 --static", False),
    "export for transformers": Writer("export {model} {out} --format hf", True),
    "extract": Writer("extract {model} {valid} --out {out}", True),
    "tokenize": Writer("tokenize {model} {valid} --out {out}", True),
    "analyse": Writer("analyse {model} stability data.valid={valid} --out {out}", True),
    "finetune-ctc": Writer(
        "finetune-ctc {model} data.train={text} data.valid={text} trainer.max_steps=1 --tokens characters --out {out}",
        True,
    ),
    "transcribe": Writer("transcribe {recogniser} {valid} --out {out}.jsonl", False),
    "data scan": Writer("data scan {audio} {out}.jsonl", False),
    "data import": Writer("data import {cuts} --out {out}", True),
    "data shard": Writer("data shard {valid} --shards 2 --out {out}", True),
    "data synth": Writer("data synth {out} --minutes 0.05", True),
    "demo": Writer("demo --folder {out}", True),
    "bench": Writer("bench step --case tiny:1x1 --rounds 1 --device cpu --out {out}.json", False),
    "report": Writer("report {run} --utterances 0 --out {out}.html", False),
    "study": Writer("study {study} --folder {out}", True),
    "study as an array": Writer("study {study} --folder nowhere --array {out}.sh", False),
    "pretrain": Writer("pretrain -c tiny data.train={valid} trainer.max_steps=1 --folder {out}", True),
}
WITHOUT_OVERWRITE = ("demo", "pretrain", "study", "study as an array")
KEEPING = ("finetune-ctc", "transcribe")  # what was done before a failure is kept
QUICK = [n for n in WRITERS if n not in ("data synth", "bench", "export", "report", *WITHOUT_OVERWRITE)]


@pytest.fixture(scope="module")
def given(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Inputs of all commands: a tiny model, manifests, a folder of audio."""
    folder = tmp_path_factory.mktemp("given")
    cfg = Config.preset("tiny")
    save(folder / "model", *init(key(0), cfg), cfg)
    audio = Path(corpus.valid).parent
    lines = [json.loads(line) for line in Path(corpus.valid).read_text().splitlines()]
    texts = [line | {"text": "a", "audio_filepath": str(audio / line["audio_filepath"])} for line in lines]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(to_text(cfg.to_dict()))
    (folder / "study.yaml").write_text("config: tiny\narms: {a: []}\n")
    source = {"type": "file", "channels": [0], "source": texts[0]["audio_filepath"]}
    (folder / "cuts.jsonl").write_text(json.dumps({"id": "a", "sources": [source], "duration": 1.0}) + "\n")
    params, state = init(key(0), cfg)
    tokens = TokenList(("a", "b"))
    head = init_head(key(1), cfg, Design(1), tokens.size)
    save_recogniser(folder / "recogniser", Recogniser(params, state, head, cfg, Design(1), tokens), cfg.to_dict(), {})
    own = {
        "recogniser": str(folder / "recogniser"),
        "cuts": str(folder / "cuts.jsonl"),
        "run": str(folder / "run"),
        "study": str(folder / "study.yaml"),
    }
    return own | {
        "model": str(folder / "model"),
        "valid": corpus.valid,
        "audio": str(audio),
        "text": f"{folder}/text.jsonl",
    }


def suffix(name: str) -> str:
    word = next(word for word in WRITERS[name].words.split() if "{out}" in word)
    return word.partition("{out}")[2]


def command(name: str, given: dict[str, str], out: Path) -> list[str]:
    """The words, for an output at exactly ``out``."""
    stem = str(out).removesuffix(suffix(name))
    return [word.format(out=stem, **given) for word in WRITERS[name].words.split()]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file, folder and link below, with its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = f"link {os.readlink(path)}" if path.is_symlink() else "folder" if path.is_dir() else "special"
        if path.is_file() and not path.is_symlink():
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = kind
    return found


def precious(place: Path) -> None:
    place.mkdir(parents=True)
    (place / THESIS).write_text("years of work")


@contextmanager
def _file(out: Path) -> Iterator[None]:
    out.write_text("years of work")
    yield


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    precious(out)
    yield


@contextmanager
def _live_run(out: Path) -> Iterator[None]:
    precious(out)
    (out / "checkpoints").mkdir()
    (out / "config.yaml").write_text("a: 1")
    lock = Lock(out / "lock")
    assert lock.take() is None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _link_to_a_folder(out: Path) -> Iterator[None]:
    precious(out.parent / "elsewhere")
    out.symlink_to("elsewhere")
    yield


@contextmanager
def _link_to_a_file(out: Path) -> Iterator[None]:
    (out.parent / THESIS).write_text("years of work")
    out.symlink_to(THESIS)
    yield


@contextmanager
def _dangling_link(out: Path) -> Iterator[None]:
    out.symlink_to("nowhere")
    yield


@contextmanager
def _current_folder(out: Path) -> Iterator[None]:
    precious(out)
    before = Path.cwd()
    os.chdir(out)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _pipe(out: Path) -> Iterator[None]:
    os.mkfifo(out)
    yield


PLACES: dict[str, Callable[[Path], object]] = {
    "a file": _file,
    "somebody's folder": _folder,
    "a live run": _live_run,
    "a link to a folder": _link_to_a_folder,
    "a link to a file": _link_to_a_file,
    "a dangling link": _dangling_link,
    "the current folder": _current_folder,
    "a pipe": _pipe,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRITERS)
def test_what_stands_there_survives(
    name: str, place: str, given: dict[str, str], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / f"out{suffix(name)}"
    made = PLACES[place](out)
    with made:  # type: ignore[attr-defined]
        before = snapshot(tmp_path)
        for more in ([], ["--overwrite"]):
            if more and name in WITHOUT_OVERWRITE:
                continue
            code = main([*command(name, given, out), *more])
            told = capsys.readouterr().err.strip().splitlines()
            assert snapshot(tmp_path) == before
            assert code in (2, 4), told
            assert len(told) == 1 and told[0].startswith("error: ") and "out" in told[0], told


def test_every_command_that_writes_is_tried() -> None:
    for name, parser in fuzz_cli.commands().items():
        takes = fuzz_cli.arguments(parser)
        writes = "overwrite" in takes or {"array", "folder"} & {one for one in takes if takes[one].option_strings}
        assert not writes or any(writer.words.startswith(f"{name} ") for writer in WRITERS.values()), name


@pytest.mark.parametrize("name", [name for name in QUICK if name != "transcribe"])
def test_the_input_is_no_output(name: str, given: dict[str, str], tmp_path: Path, capsys: Captured) -> None:
    """Also under another name: by a link, or as a folder that holds it."""
    copied = tmp_path / f"model{suffix(name)}"
    params, state, cfg = load(given["model"])
    if suffix(name) in ("", ".jsonl"):
        save(tmp_path / "model", params, state, cfg)
        copied = tmp_path / "model"
    else:
        (write_nemo if suffix(name) == ".nemo" else save_file)(copied, params, state, cfg)
    before = snapshot(tmp_path)
    inputs = given | {"model": str(copied), "audio": str(copied)}
    for more in ([], ["--overwrite"]):
        assert main([*command(name, inputs, copied), *more]) in (2, 3)
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert snapshot(tmp_path) == before


def test_a_transcription_is_not_written_over_its_manifest(
    given: dict[str, str], tmp_path: Path, capsys: Captured
) -> None:
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(Path(given["text"]).read_text())
    (tmp_path / "link.jsonl").symlink_to(manifest)
    before = snapshot(tmp_path)
    for out in (manifest, tmp_path / "link.jsonl"):
        for more in ([], ["--overwrite"]):
            words = ["transcribe", given["recogniser"], str(manifest), "--out", str(out), *more]
            assert main(words) == 2 and snapshot(tmp_path) == before
            assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("name", QUICK)
def test_the_same_again_is_done_and_another_is_refused(
    name: str, given: dict[str, str], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / f"out{suffix(name)}"
    assert main(command(name, given, out)) in (0, 3)
    first = snapshot(tmp_path)
    assert main(command(name, given, out)) in (0, 3)  # 3: a scan tells of files that it left out
    assert snapshot(tmp_path) == first
    capsys.readouterr()
    mark = out / MARK if out.is_dir() else tmp_path / f".{out.name}.{MARK}"
    content = json.loads(mark.read_text())
    content["origin"]["version of the test"] = 1  # as of another model, manifest or setting
    mark.write_text(json.dumps(content))
    assert main(command(name, given, out)) == 2
    assert "was made of something else" in capsys.readouterr().err
    assert main([*command(name, given, out), "--overwrite"]) in (0, 3)
    again = snapshot(tmp_path)
    if name == "finetune-ctc":  # both tell the time
        first, again = ({path: kept for path, kept in files.items() if not path.endswith(("metrics.jsonl", "log.txt"))}
                        for files in (first, again))  # fmt: skip
    if "safetensors" in name:  # the package writes its texts in any order
        first, again = dict.fromkeys(first, ""), dict.fromkeys(again, "")
    assert again == first


@pytest.mark.parametrize("name", QUICK)
def test_overwriting_takes_nothing_that_came_later(
    name: str, given: dict[str, str], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / f"out{suffix(name)}"
    assert main(command(name, given, out)) in (0, 3)
    if out.is_dir():
        (out / "deep").mkdir()
        (out / "deep" / THESIS).write_text("years of work")
    else:
        out.write_bytes(out.read_bytes() + b"years of work")
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert main([*command(name, given, out), "--overwrite"]) == 2
    assert (THESIS if out.is_dir() else "was changed since") in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_what_comes_into_a_folder_during_the_work_is_not_ours(given: dict[str, str], tmp_path: Path) -> None:
    """Neither a list made at the end nor a folder written anew takes it for its own."""
    out = tmp_path / "out"
    model = load_model(given["model"])
    stream = extract(model, open_audio(given["valid"], model.cfg), out)
    next(stream)
    (out / THESIS).write_text("years of work")
    assert list(stream)
    assert main([*command("extract", given, out), "--overwrite"]) == 2
    assert (out / THESIS).read_text() == "years of work"


def test_fine_tuning_lists_its_own_files_alone(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", command("finetune-ctc", given, tmp_path / "out")
    real = finetuning.train

    def train(*args: Any) -> Any:
        (out / THESIS).write_text("years of work")
        return real(*args)

    monkeypatch.setattr(finetuning, "train", train)
    assert main(words) == 0
    assert THESIS not in json.loads((out / MARK).read_text())["files"]
    assert main([*words, "--overwrite"]) == 2
    assert (out / THESIS).read_text() == "years of work"


@pytest.mark.parametrize("folder", [False, True])
def test_the_place_is_looked_at_again_when_it_is_written(tmp_path: Path, folder: bool) -> None:
    def write(path: Path, text: str) -> None:
        if folder:
            path.mkdir()
        (path / "a" if folder else path).write_text(text)

    out = tmp_path / "out"
    with written(claim(out, {"of": 1}, folder=folder)) as temporary:
        write(temporary, "ours")
    place = claim(out, {"of": 2}, folder=folder, overwrite=True)
    (out / THESIS if folder else out).write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=THESIS if folder else "changed since"), written(place):
        raise AssertionError("must not be reached")
    assert snapshot(tmp_path) == before


def test_a_file_in_the_place_of_one_that_was_removed_is_not_taken_for_it(tmp_path: Path) -> None:
    """Its mark still lies beside it."""
    origin = {"of": 1}
    with written(claim(tmp_path / "out", origin, folder=False)) as temporary:
        temporary.write_text("ours")
    assert claim(tmp_path / "out", origin, folder=False).done
    (tmp_path / "out").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="changed since"):
            claim(tmp_path / "out", origin, folder=False, overwrite=overwrite)


def test_an_extraction_goes_on_with_smaller_batches(given: dict[str, str], tmp_path: Path) -> None:
    """As its message says where memory ran out."""
    words = command("extract", given, tmp_path / "out")
    assert main(words) == 0
    first = snapshot(tmp_path)
    assert main([*words, "--batch-seconds", "3", "--max-batch-size", "1"]) == 0
    assert snapshot(tmp_path) == first


def test_save_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    cfg = Config.preset("tiny")
    model = (*init(key(0), cfg), cfg)
    for write, name in ((save, "a"), (save_file, "a.pt"), (save_file, "a.safetensors"), (write_nemo, "a.nemo")):
        write(tmp_path / name, *model)
        with pytest.raises(OutputError, match="is there already"):
            write(tmp_path / name, *model)
        write(tmp_path / name, *model, overwrite=True)
        other = tmp_path / f"other{name}"
        precious(other) if name == "a" else other.write_text("years of work")
        with pytest.raises(OutputError, match="other"):
            write(other, *model, overwrite=True)
    assert (tmp_path / "othera" / THESIS).read_text() == (tmp_path / "othera.pt").read_text() == "years of work"
    (tmp_path / "a" / THESIS).write_text("years of work")
    with pytest.raises(OutputError, match="also holds thesis.tex"):
        save(tmp_path / "a", *model, overwrite=True)


def test_a_leftover_of_somebody_else_stays(tmp_path: Path) -> None:
    """``.a.old`` is the name that a former version has for a moment."""
    cfg = Config.preset("tiny")
    model = (*init(key(0), cfg), cfg)
    save(tmp_path / "a", *model)
    precious(tmp_path / ".a.old")
    with pytest.raises(OutputError):
        save(tmp_path / "a", *model, overwrite=True)
    assert (tmp_path / ".a.old" / THESIS).exists() and load(tmp_path / "a")


FULL = """
import resource, sys
import nest_fn.train.cli.main as cli
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", [name for name in QUICK if name not in KEEPING] + ["export"])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(name: str, given: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix(name)}"
    words = [sys.executable, "-c", FULL, *command(name, given, out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3])
    told = done.stderr.strip().splitlines()
    assert done.returncode in (1, 4) and len(told) == 1 and "out" in told[0] and "File too large" in told[0], told
    left = [path for path in tmp_path.rglob("*") if path != out]
    assert left in ([], [out / MARK]) and (left or not out.exists())  # the mark may still have found room


def test_a_folder_that_cannot_be_written_to(given: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    script = "import sys; from nest_fn.train.cli.main import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "closed" / "out"
    words = [*unprivileged.command_prefix(), sys.executable, "-c", script, *command("convert to a folder", given, out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3])
    if done.returncode == unprivileged.REFUSED:
        pytest.skip("root may not give up its capabilities here, and so writes into read-only folders")
    assert done.returncode == 2 and "closed cannot be written to" in done.stderr


def test_claim_touches_nothing(tmp_path: Path) -> None:
    place = claim(tmp_path / "a" / "b", {"command": "x"}, folder=True)
    assert not place.begun and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is no folder"):
        claim(tmp_path / "file" / "b", {"command": "x"}, folder=True)
