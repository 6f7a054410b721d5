"""What a run is heard and stopped by, for ``tests.show_faults``: pipes, disks under its words, signals, lost audio."""

from __future__ import annotations

import json
import re
import signal
from contextlib import suppress
from pathlib import Path

from tests.show_faults_disks import file_system
from tests.show_faults_stage import EVERY, STEPS, Ended, Row, Stage, ended

REPLICATED = "nothing: the run ends with the undisturbed one's bytes, `log.txt` is whole"
SAVED = "nothing: saved; started again, the run ends with the undisturbed one's bytes, `log.txt` is whole"


def _log(run: Path) -> list[str]:
    """Its lines without their times."""
    return [line.split(" ", 2)[2] for line in (run / "log.txt").read_text().splitlines()]


def _whole_log(run: Path) -> None:
    """Assert that each line of metrics stands in the log, once and in order."""
    told = [int(match[1]) for match in map(re.compile(r"step (\d+)/").match, _log(run)) if match]
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert told == lines, f"the log tells of steps {told}, metrics of {lines}"


def _goes_on(stage: Stage, name: str, fault: str, line: str) -> Row:
    """A whole run by a shell's line in which ``"$@"`` is the command."""
    run = stage.folder / name
    stage.train(run, prefix=["bash", "-c", line, "bash"]).expect(0, "")
    stage.same_end(run)
    _whole_log(run)
    return stage.row(fault, Ended(0, "\n".join(_log(run)), ""), REPLICATED)


def unheard(stage: Stage) -> list[Row]:
    """What a run says finds no place to go."""
    return [
        _goes_on(stage, "head", "`pretrain 2>&1 \\| head -3`", 'set -o pipefail; "$@" 2>&1 | head -3'),
        _goes_on(stage, "closed", "standard output and standard error closed", '"$@" >&- 2>&-'),
    ]


def unheard_disk(stage: Stage) -> Row:
    """The file system of a run's standard error is full."""
    with file_system(stage.folder / "disk_words", 16) as full:
        (full / "words").touch()
        with suppress(OSError):
            (full / "filler").write_bytes(bytes(1 << 16))
        row = _goes_on(stage, "full_words", "disk full under standard error", f'"$@" 2> {full / "words"}')
        assert (full / "words").stat().st_size == 0, "the disk was not full"
        return row


def hangup(stage: Stage) -> list[Row]:
    """A run's terminal goes, or its scheduler wants its end."""
    rows = []
    for name in ("SIGHUP", "SIGTERM", "SIGUSR2", "SIGXCPU"):
        run = stage.folder / name
        with stage.paused(run) as process:
            process.send_signal(signal.Signals[name])
        rows.append(stage.row(f"{name} in the middle", _stopped(stage, run, ended(process), 75), SAVED))
    run = stage.folder / "ignored"
    with stage.paused(run, prefix=["bash", "-c", 'trap "" HUP; exec "$@"', "bash"]) as process:
        process.send_signal(signal.SIGHUP)
    seen = ended(process).expect(0, f"step {STEPS}/{STEPS}")
    stage.same_end(run)
    return [*rows, stage.row("SIGHUP under nohup", seen, REPLICATED)]


def _stopped(stage: Stage, run: Path, seen: Ended, code: int) -> Ended:
    """Assert the exit code, a checkpoint of the last finished step, and that nothing is lost."""
    assert seen.code == code, f"exit code {seen.code}, not {code}: {seen.message()}"
    saved = re.search(r"saved at step (\d+); the same command goes on from there", seen.err)
    assert saved, f"not told: {seen.err[-2000:]}"
    assert EVERY <= int(saved[1]) < STEPS, f"saved at step {saved[1]}"
    stage.intact(run, int(saved[1]))
    stage.recovers(run)
    _whole_log(run)
    return seen


def removed_audio(stage: Stage) -> Row:
    """An audio file is removed in the middle of a run."""
    run, file = stage.folder / "removed", stage.folder / "a2.wav"
    content = file.read_bytes()
    with stage.paused(run) as process:
        file.unlink()
    seen = ended(process).expect(3, r"train\.jsonl:3: .*a2\.wav")
    file.write_bytes(content)
    return stage.row("audio file removed in the middle", _stopped(stage, run, seen, 3), SAVED)
