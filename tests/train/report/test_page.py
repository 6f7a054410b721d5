"""``nest-fn report``: one file that asks nobody for anything, of runs in any state."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
import wave
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nest_fn.train.cli.main import main
from tests.train.conftest import Corpus
from tests.train.report.test_record import line, made_up, run
from tests.train.run.test_pretrain import words
from tests.train.step.test_nonfinite import WILD

__all__ = ["run"]  # a fixture

Captured = pytest.CaptureFixture[str]
VOID = {"meta", "link", "img", "br", "image", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects addresses, identifiers and kinds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.kinds: list[str] = []
        self.addresses: list[str] = []
        self.identifiers: list[str] = []
        self.used: list[str] = re.findall(r"url\(#([^)]+)\)", text)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.kinds.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        self.identifiers += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}>"


def report(out: Path, *argv: object) -> tuple[str, Page]:
    """The page, checked."""
    assert main(["report", *map(str, argv), "--out", str(out)]) == 0
    text = out.read_text()
    page = Page(text)
    assert page.open == [] and "script" not in page.kinds
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    inner = [address[1:] for address in page.addresses if address.startswith("#")]
    assert len(page.identifiers) == len(set(page.identifiers)) and {*inner, *page.used} <= {*page.identifiers}
    return text, page


def sounds(page: Page) -> list[int]:
    """Samples of each sound of the page."""
    found = []
    for address in page.addresses:
        if address.startswith("data:audio/wav;base64,"):
            with wave.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as file:
                assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
                found.append(file.getnframes())
    return found


def test_a_finished_run(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (tmp_path / "probe.json").write_text('{"learnt": {"clean": 0.5}, "<b>": 1}')
    text, page = report(tmp_path / "a.html", run, "--analyses", tmp_path / "probe.json")
    assert page.kinds.count("svg") == 4 + 3 + 2 + 2 + 2 and page.kinds.count("audio") == 6
    assert sorted(sounds(page)) == [16000 * 5 // 4] * 2 + [24000] * 2 + [32000] * 2
    for words_ in ("Finished: 12 of 12", "as the preset tiny", "learnt.clean", "&lt;b&gt;", "nest-fn verify"):
        assert words_ in text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    again, _ = report(tmp_path / "b.html", run, "--analyses", tmp_path / "probe.json")
    assert again == text


def test_what_was_found_inside_is_drawn(run: Path, tmp_path: Path) -> None:
    """Probes and CKA by layer, and the noise floor beside the accuracy with what it bounds."""
    pytest.importorskip("matplotlib")
    inside = tmp_path / "inside"
    inside.mkdir()
    probe = {"classes": 2, "of": "frames", "fitted_on": 30, "held_back": 10, "held_back_by": "speakers",
             "commonest": 0.5, "log_mel": 0.6, "layers": {"learnt": [0.7, 0.8], "untrained": [0.6, 0.55]}}  # fmt: skip
    for name, content in {
        "stability": {"kept_as_mixed": 0.625, "snr_db": [0.0, 20.0, 40.0], "kept_by_snr": [0.25, 0.875, 1.0]},
        "probes": {"phones": probe, "label": {"not_probed": "1 classes"}},
        "representations": {"cka": [[1.0, 0.5], [0.5, 1.0]], "cka_with": "itself", "frames": 80},
    }.items():
        (inside / f"{name}.json").write_text(json.dumps({"about": "words", **content}))
    for name in ("probes_phones", "representations_cka", "other"):
        (inside / f"{name}.png").write_bytes(b"PNG")
    text, page = report(tmp_path / "a.html", run, "--utterances", "0", "--analyses", inside)
    assert "gets 62.5% of the targets right under the noise of validation, 25.0% at 0 dB, 87.5% at 20 dB: a" in text
    assert ">noise floor<" in text and "linear probe for phones: accuracy" in text and "untrained" in text
    assert "fitted on 30 frames, scored on 10 held back, of other speakers" in text
    assert "likeness of layers" in text and "<h2>Layers</h2>" in text
    assert page.kinds.count("img") == 1  # the pictures that the page does not draw itself
    plain, _ = report(tmp_path / "b.html", run, "--utterances", "0")
    assert "noise floor" not in plain and "<h2>Layers</h2>" not in plain


def test_two_runs_one_not_finite(run: Path, corpus: Corpus, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(words(corpus, tmp_path / "wild", *WILD)) == 5
    text, page = report(tmp_path / "a.html", run, tmp_path / "wild", "--utterances", "1")
    assert "2 runs compared" in text and "Ended with an error after 1 of " in text and "setting that differs" in text
    assert page.kinds.count("audio") == 2 and "there is no checkpoint yet" in text  # of the second one


def test_runs_of_which_little_is_there(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made_up(tmp_path / "new", [])
    text, page = report(tmp_path / "new.html", tmp_path / "new")
    assert (
        "It has recorded no metrics yet." in text and "there is no checkpoint yet" in text and "svg" not in page.kinds
    )
    lost = tmp_path / "lost"
    shutil.copytree(run, lost)
    config = (lost / "config.yaml").read_text()
    (lost / "config.yaml").write_text(re.sub(r"/[^ ]*/(train|valid)\.jsonl", r"/nowhere/\1.jsonl", config))
    text, page = report(tmp_path / "lost.html", lost)
    assert "not shown: " in text and "the data cannot be read here" in text and page.kinds.count("svg") > 5
    strange = [line(n, loss=float("nan"), grad_norm=float("inf")) for n in range(3)]
    made_up(tmp_path / "nan", strange, "command: <x>\nwarning: <script>")
    text, _ = report(tmp_path / "nan.html", tmp_path / "nan", "--utterances", "0")
    assert "&lt;script&gt;" in text


def test_a_report_is_made_anew_when_asked(run: Path, tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "a.html"
    text, _ = report(out, run, "--utterances", "0")
    assert main(["report", str(run), "--utterances", "1", "--out", str(out)]) == 2
    assert "was made of something else" in capsys.readouterr().err and out.read_text() == text
    assert main(["report", str(run), "--utterances", "1", "--out", str(out), "--overwrite"]) == 0
    assert out.read_text() != text


def test_mistakes(run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", str(tmp_path / "a.html")]
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "data.json").write_text('{"origin": {"command": "finetune-ctc"}}')
    for argv, told in (
        ([str(tmp_path), *out], "holds no run"),
        ([str(other), *out], "holds a run of another command"),
        (["a=b", *out], "want a run folder or several, got only settings"),
    ):
        assert main(["report", *argv]) == 2
        assert told in capsys.readouterr().err
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["report", str(run), *out]) == 2
    assert "nest-fn[report]" in capsys.readouterr().err and not (tmp_path / "a.html").exists()
