"""Provoke the worst faults of docs/faults.md through the command line: what a person reads, and what is lost.

    python -m tests.show_faults [--out FILE.md] [--only WORD]

Every command runs in a process of its own, over a small corpus that is made on the spot. What was lost is not claimed
but looked for: the run is started again, and its last checkpoint compared byte by byte with that of a run which nothing
disturbed. Exit code 1 if any row is not as promised. It takes about three minutes; some rows need Linux, or root.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.show_faults_cases import CASES
from tests.show_faults_stage import Row, Skipped, Stage

WIDTH = 300  # characters of a message that are shown
HEAD = "| fault | what the command says last | exit code | what is lost |\n|---|---|---|---|"
Case = Callable[[Stage], Row | list[Row]]


def seen(case: Case, stage: Stage) -> Iterator[tuple[Row, bool]]:
    """The rows of a case, and whether they are as promised."""
    title = (case.__doc__ or case.__name__).partition(".")[0]
    try:
        rows = case(stage)
    except Skipped as reason:
        yield Row(title, f"not provoked here: {reason}", "", ""), True
    except AssertionError as error:
        found = str(error).partition("\n")[0].replace(f"{stage.folder}/", "")
        yield Row(title, f"**not as promised**: {found}", "", ""), False
    else:
        yield from ((row, True) for row in ([rows] if isinstance(rows, Row) else rows))


def shown(row: Row) -> str:
    """A line of the table; a long message loses its end."""
    message = row.message if len(row.message) <= WIDTH else row.message[:WIDTH].rpartition(" ")[0] + " ..."
    said = f"`{message}`" if row.code else message
    return f"| {row.fault} | {said} | {row.code} | {row.lost} |"


def main() -> int:
    """Print the table; 1 if a row is not as promised."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the table to a file, over its former self and to the end")
    parser.add_argument("--only", default="", help="only the cases with this word in their function's name")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in case.__name__]
    lines, good = [HEAD], True
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        stage = Stage(Path(folder).resolve())
        for case in cases:
            for row, as_promised in seen(case, stage):
                good &= as_promised
                lines.append(shown(row))
                print(lines[-1], flush=True)
    if args.out is not None:
        before = args.out.read_text().partition(HEAD)[0] if args.out.exists() else ""
        args.out.write_text(before + "\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
