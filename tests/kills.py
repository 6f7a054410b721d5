"""Kill a run again and again: it must leave the same bytes as one that nobody disturbed (faults E2 and F3, level R1).

    python -m tests.kills --out runs/kills                          100 kills of a run of two minutes
    python -m tests.kills --out runs/kills2 --ranks 2 --kills 20    the same with two gloo ranks

Exit code 0 only if every resume went on and all bytes are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nest_fn.checkpoint.retention import newest_valid
from nest_fn.train.data.synth import CorpusSpec, write_corpus
from tests.kills_processes import PATIENCE, Attempt, Setting
from tests.kills_report import Kill, compare, leftovers, table

EARLY = 0.2  # share of kills at any time since the start of the process; the others while it trains
SAFE = 0.7  # of the progress that would just fit
JITTER = 4.0  # steps in whose time a late kill comes after the first write of its step
SMALL = (
    "encoder.n_layers=1 encoder.subsampling_conv_channels=8 data.batch_seconds=4 data.max_duration=4 "
    "data.num_workers=2 trainer.save_every=2 trainer.keep_last=3 trainer.valid_every=10 trainer.log_every=3"
).split()


class Pace(NamedTuple):
    """How fast a run is, in seconds."""

    wall: float
    startup: float  # before its first step
    step: float  # with its share of saves and validation


class Seen(NamedTuple):
    """What the files of a run tell at a moment when nothing writes to them."""

    checkpoint: int  # step of the newest whole one; 0: none
    damaged: int  # newer ones that are not whole
    names: frozenset[str]  # in the folder of checkpoints
    measured: int  # last step that metrics speak of
    validated: bool  # the last line is of validation
    half_line: bool
    lock: str


def look(run: Path) -> Seen:
    """Read a run's folder."""
    folder, lock, metrics = run / "checkpoints", run / "lock", run / "metrics.jsonl"
    names = frozenset(path.name for path in folder.iterdir()) if folder.exists() else frozenset()
    path, problems = newest_valid(folder)
    text = metrics.read_text() if metrics.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    last = json.loads(whole.splitlines()[-1]) if whole else {"step": 0}
    checkpoint = int(path.name.removeprefix("step_")) if path else 0
    return Seen(checkpoint, len(problems), names, last["step"], "valid" in last, whole != text,
                lock.read_text() if lock.exists() else "")  # fmt: skip


def phase(before: Seen, after: Seen, told: str, valid_every: int) -> str:
    """In what a run was interrupted, as far as its files tell."""
    new = after.names - before.names
    if any(name.endswith(".tmp") for name in new):
        return "save"
    if any(name.endswith((".gone", ".old")) for name in new):
        return "removal of old checkpoints"
    if "run folder " not in told:
        return "imports" if after.lock == before.lock else "data and resume"
    done = after.checkpoint
    owed = valid_every and done and done % valid_every == 0 and not (after.measured == done and after.validated)
    return "validation" if owed and after.measured <= done else "steps"


def disturb(
    setting: Setting, run: Path, steps: int, pace: Pace, wanted: int, rng: np.random.Generator
) -> tuple[list[Kill], str]:
    """Start, kill, start again; then let it end. The kills, and what went wrong, if anything did."""
    kills: list[Kill] = []
    while len(kills) < wanted:
        before = look(run)
        chance = rng.random(4)  # early or late, which step, how long after, whom
        attempt = Attempt(setting, run, steps)
        fault = _wait(attempt, run, before, chance, pace, steps - before.checkpoint, wanted - len(kills))
        victims, helped = attempt.kill(chance[3])
        if fault or attempt.process.returncode == 0:
            return kills, f"start {len(kills) + 1} {fault or 'was done before the last kill'}"
        kills.append(_record(run, before, attempt, bool(chance[0] < EARLY), victims, helped, setting.valid_every))
        print(f"kill {len(kills)} of {wanted}: {kills[-1].line()}", flush=True)
    last = Attempt(setting, run, steps)
    ended = last.wait(PATIENCE + 10 * pace.wall)
    last.kill(1.0)
    return kills, "" if ended and last.process.returncode == 0 else f"the last start {last.end()}"


def _wait(attempt: Attempt, run: Path, before: Seen, chance: np.ndarray, pace: Pace, steps: int, kills: int) -> str:
    """Until the moment of a kill, such that ``kills`` of them fit into ``steps``; what is wrong, if anything is.

    A late kill comes at a random time after the first write of a random step: how many steps lie between two kills does
    not depend on how fast the machine is at the moment.
    """
    if chance[0] < EARLY:
        seconds = 1.5 * chance[1] * pace.startup
    else:
        share = min(SAFE, 2 * SAFE * chance[1] / ((1 - EARLY) * kills + 1))
        room = max(0, steps - int(JITTER * kills))
        target = before.checkpoint + 1 + int(share * room)
        attempt.wait(PATIENCE + 10 * pace.wall, lambda: max(_written(run, before), default=0) >= target)
        if attempt.process.poll() is None and max(_written(run, before), default=0) < target:
            return f"hangs: {attempt.end()}"
        seconds = JITTER * chance[2] * pace.step
    return attempt.end() if attempt.wait(seconds) else ""


def _written(run: Path, before: Seen) -> list[int]:
    """Steps of all checkpoints, whole or begun, that are new."""
    folder = run / "checkpoints"
    names = set(os.listdir(folder)) - before.names if folder.exists() else set()
    return [int(number) for name in names for number in re.findall(r"step_(\d+)", name)]


def _record(
    run: Path, before: Seen, attempt: Attempt, early: bool, victims: str, helped: int, valid_every: int
) -> Kill:
    after, told = look(run), attempt.told()
    resumed, begun = re.search(r"resumed at step (\d+)", told), "run folder " in told
    return Kill(
        seconds=round(attempt.lived, 3),
        early=early,
        victims=victims,
        helped=helped,
        phase=phase(before, after, told, valid_every),
        resumed=int(resumed[1]) if resumed else 0 if begun else None,
        checkpoint=after.checkpoint,
        reached=max(after.checkpoint, after.measured, *_written(run, before)) if begun else after.checkpoint,
        damaged=after.damaged,
        half_line=after.half_line and not before.half_line,
        leftovers=leftovers(run),
    )


def undisturbed(setting: Setting, run: Path, steps: int) -> Pace:
    """Let a run go on to its end, and time it."""
    attempt = Attempt(setting, run, steps)
    code = attempt.process.wait()
    wall = time.monotonic() - attempt.started
    if code != 0:
        sys.exit(f"the run that nobody disturbs fails: {attempt.end()}")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    trained = sum(line["time"]["seconds"] for line in lines)
    return Pace(wall, max(wall - trained, 0.5), trained / steps)


def _manifests(args: argparse.Namespace) -> list[str]:
    """The data asked for, or two minutes of synthetic speech."""
    if args.train:
        given = {"train": args.train, "valid": args.valid, "noise": args.noise}
    else:
        spec = CorpusSpec(train_minutes=2, valid_minutes=0.2, noise_minutes=1, probe_train_minutes=0,
                          probe_test_minutes=0, min_seconds=1, max_seconds=3)  # fmt: skip
        made = write_corpus(args.out / "corpus", spec)
        given = {name: str(made[name]) for name in ("train", "valid", "noise")}
    return [f"data.{name}={path}" for name, path in given.items() if path]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for corpus, runs and logs; new")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the times of kills")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the undisturbed run; measured on a short one")
    parser.add_argument("--steps", type=int, help="of the undisturbed run, in place of --seconds")
    parser.add_argument("--train", help="manifest; with --valid and --noise in place of synthetic speech")
    parser.add_argument("--valid")
    parser.add_argument("--noise")
    parser.add_argument("--json", type=Path, help="all that was found, every kill by itself")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Both runs and their comparison; the exit code."""
    args = _arguments(argv)
    args.out = args.out.resolve()
    if (args.out / "undisturbed").exists():
        sys.exit(f"{args.out} holds an earlier experiment; choose another with --out.")
    args.out.mkdir(parents=True, exist_ok=True)
    setting = Setting(args.ranks, (*SMALL, *_manifests(args), *args.overrides))
    steps = args.steps
    if steps is None:
        tried = undisturbed(setting, args.out / "calibration", 150)
        steps = max(150, round((args.seconds - tried.startup) / tried.step))
    pace = undisturbed(setting, args.out / "undisturbed", steps)
    started = time.monotonic()
    rng = np.random.Generator(np.random.Philox(args.seed))
    kills, problem = disturb(setting, args.out / "killed", steps, pace, args.kills, rng)
    wall = time.monotonic() - started
    finished = (args.out / "killed" / "checkpoints" / f"step_{steps:08d}").exists()
    verdict = compare(args.out / "killed", args.out / "undisturbed", steps) if finished else None
    rows = {
        "run": f"{steps} steps of {1000 * pace.step:.0f} ms, {args.ranks} rank(s), {' '.join(SMALL + args.overrides)}",
        "wall time": f"{pace.wall:.0f} s undisturbed, {wall:.0f} s with all kills and restarts; seed {args.seed}",
    }
    print(table(kills, verdict, problem, rows, args.kills))
    good = verdict is not None and verdict.equal and not problem
    if args.json:
        found = {"steps": steps, "ranks": args.ranks, "seed": args.seed, "good": good, "problem": problem}
        found |= {"undisturbed": pace._asdict(), "wall": wall, "verdict": verdict and asdict(verdict)}
        args.json.write_text(json.dumps(found | {"kills": [asdict(kill) for kill in kills]}, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
