"""What comments, docstrings, messages and pages cite exists (docs/design.md, "Citations")."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
FAULTS = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
LEVELS = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
ANCHORS = re.findall(r'<a id="([^"]+)"></a>', REFERENCE)


def _list_of(item: str) -> str:
    return rf"{item}(?:(?:,|\sand|\sto)\s+{item})*"


_SECTION, _FAULT, _LEVEL = r"\d+(?:\.\d+)?", r"[A-H]\d{1,2}", r"R\d"
SECTIONS = re.compile(rf"(?:\b[Rr]eference|docs/reference\.md,)\s+({_list_of(_SECTION)})(?![\w.]*\d)")
ROWS = re.compile(rf"\b[Ff]aults?\s+({_list_of(_FAULT)})\b")
OF_LEVELS = re.compile(rf"\b[Ll]evels?\s+({_list_of(_LEVEL)})\b")
FOREIGN = re.compile(
    r"\b[Ss]pec(?:ification)?,?\s(?:sections?\s|appendix\s)?Q?\d|\breference(?:'s)?\sspecification|\(spec\)"
)


def dead(text: str) -> list[str]:
    """Citations in a text that lead nowhere."""
    found = [f"Q{n}" for n in re.findall(r"\bQ(\d+)\b", text) if f"q{n}" not in ANCHORS]
    for cited in SECTIONS.findall(text):
        found += [f"reference {n}" for n in re.findall(_SECTION, cited) if n not in ANCHORS]
    for cited in ROWS.findall(text):
        found += [f"faults {row}" for row in re.findall(_FAULT, cited) if f"\n| {row} |" not in FAULTS]
    for cited in OF_LEVELS.findall(text):
        found += [f"level {level}" for level in re.findall(_LEVEL, cited) if f"| **{level}** |" not in LEVELS]
    found += [f"#{place}" for place in re.findall(r"\breference\.md#([\w.-]+)", text) if place not in ANCHORS]
    found += [page for page in re.findall(r"\bdocs/[\w-]+\.md\b", text) if not (ROOT / page).exists()]
    return found + FOREIGN.findall(text)


def bare(text: str) -> list[str]:
    """Rows of docs/faults.md and levels of reproducibility without the word that says so."""
    return re.findall(rf"\b(?:{_FAULT}|{_LEVEL})\b", OF_LEVELS.sub("", ROWS.sub("", text)))


def _python() -> Iterator[tuple[str, str, bool]]:
    """Place, text, and whether it is prose, of every comment and string; not through the links in nest_fn."""
    for folder in ("layers", "nest_fn", "train", "configs", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path == Path(__file__).resolve() or any(parent.is_symlink() for parent in path.parents):
                continue
            source = path.read_text(encoding="utf-8")
            for token in tokenize.generate_tokens(io.StringIO(source).readline):
                comment = token.type == tokenize.COMMENT
                if comment or token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
                    prose = comment or token.string.startswith(('"""', 'r"""'))
                    yield f"{path.relative_to(ROOT)}:{token.start[0]}", token.string, prose


def _pages() -> Iterator[tuple[str, str]]:
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", *(ROOT / "configs").glob("*.yaml")]
    for path in sorted(paths):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")


def test_no_citation_is_dead() -> None:
    texts = [*((place, text) for place, text, _ in _python()), *_pages()]
    assert sum(len(SECTIONS.findall(text)) for _, text in texts) > 40  # the rule sees them
    found = [f"{place}: {what}" for place, text in texts for what in dead(text)]
    assert not found, "\n" + "\n".join(found)


def test_faults_and_levels_are_cited_as_such() -> None:
    found = [f"{place}: {what}" for place, text, prose in _python() if prose for what in bare(text)]
    assert not found, "\n" + "\n".join(found)


def test_anchors_are_unique_and_stand_where_they_say() -> None:
    assert len(ANCHORS) == len(set(ANCHORS))
    headings = re.findall(r'^#{2,3} <a id="([\d.]+)"></a>([\d.]+) ', REFERENCE, flags=re.MULTILINE)
    assert [anchor for anchor, _ in headings] == [a for a in ANCHORS if a[0].isdigit()]
    rows = re.findall(r'^\| <a id="q(\d+)"></a>Q(\d+) \|', REFERENCE, flags=re.MULTILINE)
    assert all(anchor == number for anchor, number in headings + rows)
    assert [int(number) for _, number in rows] == list(range(1, len(rows) + 1))
    assert {a for a in ANCHORS if re.fullmatch(r"q\d+", a)} == {f"q{number}" for number, _ in rows}


@pytest.mark.parametrize(
    "text",
    [
        "(Q99)",
        "reference 4.99",
        "Reference 1, 44",
        "faults A99",
        "faults A1, A99",
        "level R7",
        "docs/none.md",
        "docs/reference.md#q99",
        "docs/reference.md, 1.66",
        "(spec 4.2)",
        "spec Q23",
        "the reference specification",
    ],
)
def test_rule_fires(text: str) -> None:
    assert dead(text)


def test_rule_allows_what_resolves() -> None:
    text = "Q23, reference 4.2 and 5; faults A1 to A3, G4; levels R0, R1 (docs/reference.md, 1.6; since version 2.5)"
    assert not dead(text) and not bare(text)
    assert bare("as in A12") == ["A12"] and bare("the same (R2)") == ["R2"]
