"""Pieces of a page as HTML text: everything in one file, without scripts, for screens of any width and for paper."""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
import wave
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STYLE = """
:root { color-scheme: light; --ink: #1d232b; --soft: #5b6470; --line: #dfe3e8; --paper: #fff; --good: #1f7a42;
  --bad: #b02a4c; --accent: #1f5fa8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem clamp(0.8rem, 3vw, 2.5rem) 3rem; background: var(--paper); }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 0.3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 0.6rem; padding-top: 0.6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; overflow-wrap: anywhere; }
p, ul { margin: 0.4rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: 0.88rem; }
.verdict { list-style: none; padding: 0; }
.verdict li { padding: 0.3rem 0 0.3rem 0.8rem; border-left: 4px solid var(--line); margin: 0.25rem 0;
  overflow-wrap: anywhere; }
.verdict .good { border-color: var(--good); }
.verdict .bad { border-color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 0.8rem 1.6rem; }
figure { margin: 0.4rem 0; min-width: 0; break-inside: avoid; }
.wide { overflow-x: auto; }
.wide svg { min-width: 38rem; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.4rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.9rem 0.25rem 0;
  border-bottom: 1px solid var(--line); }
td { overflow-wrap: anywhere; }
td:first-child { overflow-wrap: normal; min-width: 4.5rem; }
th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, pre { font: 0.85rem/1.4 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere;
  white-space: pre-wrap; }
pre { background: #f4f5f7; padding: 0.6rem 0.8rem; margin: 0.4rem 0; border-radius: 4px; }
details > summary { cursor: pointer; color: var(--accent); margin: 0.4rem 0; }
.sound { display: flex; flex-wrap: wrap; gap: 0.4rem 1.5rem; align-items: center; margin: 0.3rem 0; }
.sound label { display: flex; align-items: center; gap: 0.5rem; font-size: 0.88rem; color: var(--soft); }
audio { height: 2.2rem; width: min(17rem, 70vw); }
img { max-width: 100%; height: auto; }
@media print {
  body { background: none; font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  audio, .sound { display: none; }
  .figures { grid-template-columns: 1fr 1fr; }
  .wide svg { min-width: 0; }
  h2 { break-after: avoid; }
  table, li { break-inside: avoid; }
}
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole file."""
    held = _own_identifiers("\n".join(body))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An icon of no bytes, or else a browser asks the server of the page for one.
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{held}\n</main>\n</body>\n</html>\n"
    )


def _own_identifiers(body: str) -> str:
    """Each picture with identifiers that no other one of the page has."""
    numbers = itertools.count(1)

    def renamed(found: re.Match[str]) -> str:
        prefix = f"p{next(numbers)}-"
        drawn = re.sub(r' id="', f' id="{prefix}', found[0])
        return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", drawn)

    return re.sub(r"<svg .*?</svg>", renamed, body, flags=re.DOTALL)


def text(value: object) -> str:
    """A value as text of a page."""
    return html.escape(str(value))


def section(title: str, *parts: str) -> str:
    """A heading with what follows it; nothing if nothing does."""
    held = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{text(title)}</h2>\n{held}\n</section>" if held else ""


def paragraph(words: str, soft: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=soft' if soft else ''}>{text(words)}</p>"


def figure(svg: str, caption: str = "", wide: bool = False) -> str:
    """A picture with its caption; a ``wide`` one keeps its size on a narrow screen, where it scrolls."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure{' class=wide' if wide else ''}>{svg}{below}</figure>"


def figures(*each: str) -> str:
    """Pictures side by side where there is room."""
    held = "".join(each)
    return f'<div class="figures">{held}</div>' if held else ""


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A table; the columns ``numbers`` are set to the right. Nothing if it has no row."""
    rows = list(rows)
    if not rows:
        return ""

    def cells(kind: str, row: Sequence[object]) -> str:
        shown = (
            f"<{kind}{' class=number' if place in numbers else ''}>{text(cell)}</{kind}>"
            for place, cell in enumerate(row)
        )
        return f"<tr>{''.join(shown)}</tr>"

    top = f"<thead>{cells('th', head)}</thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{"".join(cells("td", row) for row in rows)}</tbody></table></div>'


def details(summary: str, *parts: str) -> str:
    """What is shown when it is asked for."""
    held = "".join(parts)
    return f"<details><summary>{text(summary)}</summary>{held}</details>" if held else ""


def sound(label: str, samples: NDArray[np.float32], rate: int) -> str:
    """A player of samples ``[N]`` in -1..1 at ``rate`` Hz, as a 16-bit WAV within the page."""
    whole = np.clip(np.rint(samples * 32767), -32768, 32767).astype("<i2")
    with io.BytesIO() as file:
        with wave.open(file, "wb") as written:
            written.setnchannels(1)
            written.setsampwidth(2)
            written.setframerate(rate)
            written.writeframes(whole.tobytes())
        data = base64.b64encode(file.getvalue()).decode()
    player = f'<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>'
    return f"<label>{text(label)} {player}</label>"


def number(value: Any) -> str:
    """A number for a table: whole ones with separators, others with four digits; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
