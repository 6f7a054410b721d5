"""Runs the code of the guided tour and writes what it printed and drew into its pages (extra report).

    python docs/run_tour.py FOLDER              # some minutes; FOLDER, a new one, keeps the corpus and the runs
    python docs/run_tour.py FOLDER study.md     # this page only, after those before it

The pages of ``docs/tour/`` run one after another in one folder. In a ``sh`` block every line is a command of nest-fn, a
``yaml`` block is written to the file that its first line names, a ``python`` block is executed; a ``text`` block after
a block is what it printed. Pictures that a page shows are taken from the folder; those that a comment
``<!-- picture NAME of REPORT: LABEL -->`` names are cut out of a report. A page ends with a digest of its code, so that
outputs of other code are noticed (``tests/docs/test_tour.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from nest_fn.train.cli.main import main as nest_fn_main

TOUR = Path(__file__).resolve().parent / "tour"
PAGES = ("pretraining.md", "inside.md", "study.md")
_BLOCK = re.compile(r"^```(sh|yaml|python)\n(.*?)^```\n(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL)
_DIGEST = re.compile(r"<!-- outputs of code (\w+) -->\n\Z")
_CUT = re.compile(r"<!-- picture (\S+) of (\S+): (.*?) -->")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([\w.-]+)\)")
_SCALE = 1.4  # pixels for each point of a picture of a report
_MOST = 16  # lines of an output that a page shows


class Ran(NamedTuple):
    """A page that was executed."""

    text: str  # with its outputs
    names: dict[str, Any]  # of its Python
    outputs: list[str]  # of its blocks


def code_digest(text: str) -> str:
    """A digest of the code of a page."""
    code = "".join(match[2] for match in _BLOCK.finditer(text))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def recorded_digest(text: str) -> str | None:
    """The digest of the code that made the outputs in a page."""
    found = _DIGEST.search(text)
    return found[1] if found else None


def run_page(text: str, smaller: Mapping[str, str] | None = None) -> Ran:
    """Execute a page in the working directory; ``smaller`` replaces texts of its code. Raises what the code raises."""
    names: dict[str, Any] = {"__name__": "__tour__"}
    outputs: list[str] = []

    def run(match: re.Match[str]) -> str:
        kind, code = match.groups()
        made = code
        for old, new in (smaller or {}).items():
            made = made.replace(old, new)
        outputs.append(_output(kind, made, names))
        shown = _shortened(outputs[-1])
        return f"```{kind}\n{code}```\n" + (f"\n```text\n{shown}```\n" if shown else "")

    done = _BLOCK.sub(run, _DIGEST.sub("", text))
    return Ran(f"{done.rstrip()}\n\n<!-- outputs of code {code_digest(text)} -->\n", names, outputs)


def _output(kind: str, code: str, names: dict[str, Any]) -> str:
    """What a block prints."""
    if kind == "yaml":
        Path(code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.redirect_stderr(told):
        if kind == "python":
            exec(compile(code, "<tour>", "exec"), names)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words and (words[0] != "nest-fn" or nest_fn_main(words[1:])):
                    raise RuntimeError(f"{line}\n{told.getvalue()}")
    return told.getvalue()


def _shortened(output: str) -> str:
    """Beginning and end of a long output."""
    lines = output.splitlines(keepends=True)
    half = _MOST // 2
    return "".join(lines if len(lines) <= _MOST else [*lines[:half], "...\n", *lines[-half:]])


def pictures(text: str) -> Iterator[Path]:
    """The pictures of an executed page, in the working directory, those out of reports cut out first."""
    for name, report, label in _CUT.findall(text):
        drawn = re.findall(
            rf'<svg[^>]*aria-label="{re.escape(label)}.*?</svg>', Path(report).read_text(encoding="utf-8"), re.DOTALL
        )
        head, drawing = drawn[0].split(">", 1)
        wide = float(re.findall(r'viewBox="\S+ \S+ (\S+)', head)[0])
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        paper = '<rect width="100%" height="100%" fill="white"/>'  # the page around it may be dark
        svg = f'{head} {spaces} width="{_SCALE * wide:.0f}">{paper}{drawing}\n'
        Path(name).write_text(svg, encoding="utf-8")
    yield from (Path(name) for name in _PICTURE.findall(text))


def main(folder: Path, names: Sequence[str] = PAGES) -> None:
    """Execute pages in a folder and write them anew, with their pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "tour", "savefig.dpi": 110, "font.size": 9.0, "axes.titlesize": 9.5}
    with contextlib.chdir(folder):
        for name in names:
            ran = run_page((TOUR / name).read_text(encoding="utf-8"))
            for picture in pictures(ran.text):
                shutil.copyfile(picture, TOUR / picture)
            (TOUR / name).write_text(ran.text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or PAGES)
