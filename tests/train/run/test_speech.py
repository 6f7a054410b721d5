"""Nothing said ends a run, and nothing said is lost: closed pipes, full disks, terminals that go, readers that stand.

Real pipes, terminals and signals. What a stream did not take stands in ``log.txt`` of the run folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from nest_fn.train.cli.main import main
from nest_fn.train.cli.stream import Console
from nest_fn.train.run.record.log_file import logged
from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import until, words

ROOT = Path(__file__).resolve().parents[3]
ENDLESS = ["trainer.max_steps=100000", "trainer.log_every=1", "trainer.valid_every=0", "trainer.save_every=6"]
DEAF = ["bash", "-c", 'trap "" HUP; exec "$@"', "bash"]  # what nohup does
SHORT = ["trainer.max_steps=12", "trainer.log_every=1", "trainer.valid_every=0"]


def log(run: Path) -> list[str]:
    """Its lines without their times."""
    lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
    stamped = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} (.*)", line) for line in lines]
    assert all(stamped), lines
    return [match[1] for match in stamped if match]


def logged_steps(run: Path) -> list[int]:
    """The steps that the log tells the loss of."""
    return [int(line.split()[1].split("/")[0]) for line in log(run) if re.match(r"step \d+/\d+  loss", line)]


def saved_steps(run: Path) -> list[int]:
    """Of its checkpoints."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def assert_whole(run: Path, steps: int = 12) -> None:
    """It went on to its end, and the log has every step."""
    assert saved_steps(run)[-1] == steps
    assert logged_steps(run) == list(range(1, steps + 1)) and log(run)[0].startswith("command: ")


def shell(line: str, argv: list[str]) -> int:
    """The exit code of a shell's line in which ``"$@"`` is the command."""
    command = ["bash", "-c", line, "bash", sys.executable, "-m", "nest_fn.train", *argv]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120).returncode


@pytest.mark.parametrize(
    "line",
    ['set -o pipefail; "$@" 2>&1 | head -3 > /dev/null', '"$@" 0>&- 1>&- 2>&-', '"$@" 2> /dev/full'],
    ids=["head", "closed", "full"],
)
def test_what_a_stream_does_not_take_is_in_the_log(corpus: Corpus, tmp_path: Path, line: str) -> None:
    assert shell(line, words(corpus, tmp_path / "run", *SHORT)) == 0
    assert_whole(tmp_path / "run")


def test_a_reader_that_stands_still(corpus: Corpus, tmp_path: Path) -> None:
    """A pipe that nobody reads takes some lines, and then no more; the run goes on."""
    command = [sys.executable, "-m", "nest_fn.train", *words(corpus, tmp_path / "run", *SHORT, "trainer.max_steps=60")]
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 2 * 4096)  # bytes, of which a line takes about 120
    assert subprocess.run(command, cwd=ROOT, stderr=writes, timeout=120).returncode == 0
    told = os.read(reads, 1 << 20).decode()
    os.close(reads)
    os.close(writes)
    assert "step 1/60" in told and "step 60/60" not in told
    assert_whole(tmp_path / "run", 60)


def _stopped_by_hangup(corpus: Corpus, run: Path, prefix: list[str]) -> int:
    argv = words(corpus, run, *ENDLESS)
    command = [*prefix, sys.executable, "-m", "nest_fn.train", *argv]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            until(run / "checkpoints" / "step_00000006" / "meta.json", process)
            process.send_signal(signal.SIGHUP)
            if prefix:
                until(run / "checkpoints" / "step_00000024" / "meta.json", process)
                process.send_signal(signal.SIGUSR2)
            return process.wait(60)
        finally:
            process.kill()


def test_a_hangup_saves_and_ends(corpus: Corpus, tmp_path: Path) -> None:
    assert _stopped_by_hangup(corpus, tmp_path, []) == 75
    last = saved_steps(tmp_path)[-1]
    assert last >= 6 and logged_steps(tmp_path)[-1] == last
    assert log(tmp_path)[-1] == f"asked to stop: saved at step {last}; the same command goes on from there"


def test_a_hangup_that_is_ignored_stays_ignored(corpus: Corpus, tmp_path: Path) -> None:
    """As under nohup; LSF's and Grid Engine's SIGUSR2 ends it then."""
    assert _stopped_by_hangup(corpus, tmp_path, DEAF) == 75
    assert saved_steps(tmp_path)[-1] == logged_steps(tmp_path)[-1] >= 24


@pytest.mark.parametrize("ignored", [False, True], ids=["hangup", "ignored"])
def test_a_terminal_that_is_closed(corpus: Corpus, tmp_path: Path, ignored: bool) -> None:
    """Its kernel sends SIGHUP; where that is ignored, every word to the terminal fails from then on (EIO)."""
    argv = words(corpus, tmp_path, *ENDLESS, *(["trainer.max_steps=40"] if ignored else []))
    terminal, other = os.openpty()
    command = [*(DEAF if ignored else []), sys.executable, "-m", "nest_fn.train", *argv]
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=lambda: os.login_tty(other)) as process:
        os.close(other)
        try:
            until(tmp_path / "checkpoints" / "step_00000006" / "meta.json", process)
            os.close(terminal)
            assert process.wait(60) == (0 if ignored else 75)
        finally:
            process.kill()
    assert saved_steps(tmp_path)[-1] == logged_steps(tmp_path)[-1]
    if ignored:
        assert_whole(tmp_path, 40)


def test_the_log_goes_on_over_resumes_and_a_refused_start_is_in_it(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(words(corpus, run, *SHORT, "trainer.max_steps=6")) == 0
    assert main(words(corpus, run, *SHORT, "encoder.dropout=0.2")) == 4
    assert main(words(corpus, run, *SHORT)) == 0
    lines = log(run)
    assert logged_steps(run) == list(range(1, 13)) and sum(line.startswith("command: ") for line in lines) == 3
    (refused,) = [number for number, line in enumerate(lines) if line.startswith("error: the run in this folder was")]
    assert lines.index("resumed at step 6, epoch 0, batch 6") > refused
    assert main(words(corpus, tmp_path / "new", "data.train=nowhere.jsonl")) == 3
    assert not (tmp_path / "new" / "log.txt").exists()


def test_a_log_that_cannot_be_written_ends_no_run(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "log.txt").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "command.txt").touch()
    assert main(words(corpus, run, *SHORT)) == 0
    assert saved_steps(run)[-1] == 12


FULL = """
import resource, sys
from pathlib import Path
from nest_fn.train.run.record.log_file import LogFile
log = LogFile(Path(sys.argv[1]))
log.begin()
log.write("one")
resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 3, resource.RLIM_INFINITY))
log.write("two\\nthree")
log.write("four")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write("five")
"""


def test_lines_that_the_disk_did_not_take_are_counted(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "log.txt")], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert log(tmp_path) == ["one", "(3 lines could not be written here)", "five"]


class _Silent:
    """A reporter that is not read."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, text: str) -> None:
        """Keep it."""
        self.told.append(text)

    def warn(self, text: str) -> None:
        """Keep it."""
        self.told.append(text)

    def progress(self, step: int, total: int, values: Any) -> None:
        """Nothing."""


def test_warnings_and_tracebacks_are_written_down(tmp_path: Path) -> None:
    reporter = _Silent()

    def run() -> None:
        with logged(reporter, tmp_path / "log.txt") as told:
            told.log.begin()
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.warn("of a library", stacklevel=1)
            told.say("caf\u00e9 \udcff")
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        run()
    lines = log(tmp_path)
    assert lines[0].startswith("warning: UserWarning: of a library (") and reporter.told[0] in lines[0]
    assert lines[1] == "caf\u00e9 \\udcff"
    assert lines[2] == "Traceback (most recent call last):" and lines[-1] == "ZeroDivisionError: a bug"


def _pipe() -> tuple[int, Any]:
    reads, writes = os.pipe()
    return reads, open(writes, "w", encoding="ascii")


def test_a_console_drops_what_is_not_taken() -> None:
    reads, stream = _pipe()
    console = Console(stream)
    console.write("caf\u00e9 \udcff\n")
    assert os.read(reads, 100) == b"caf\\xe9 \\udcff\n"
    os.close(reads)
    console.write("into a pipe without a reader\n")
    stream.close()
    console.write("into a closed file\n")
    Console(stream).write("into one that was closed before\n")
    Console(None).write("into none\n")


def test_a_console_counts_the_lines_that_nobody_read() -> None:
    reads, stream = _pipe()
    console = Console(stream, patience_s=0.01)
    lines = [f"line {number} {'x' * 90}\n" for number in range(2000)]
    for line in lines:
        console.write(line)
    os.set_blocking(reads, False)
    got = os.read(reads, 1 << 20).decode()
    assert 0 < got.count("\n") < 2000 and "".join(lines).startswith(got)
    console.write("read again\n")
    missing = 2000 - got.count("\n")
    assert os.read(reads, 1000).decode() == (
        f"({missing} lines are missing here, for nobody read them in time)\nread again\n"
    )
    os.close(reads)
    stream.close()


def _piped(line: str, argv: list[str]) -> tuple[int, str]:
    """The exit code of a command whose output goes where ``line`` sends it, and what came on standard error."""
    command = ["bash", "-c", f"set -o pipefail; {line}", "bash", sys.executable, "-m", "nest_fn.train", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


GONE, FULL_DISK = '"$@" | true', '"$@" > /dev/full'  # a reader that went away before the first word; no room


@pytest.mark.parametrize("line, code", [(GONE, 141), (FULL_DISK, 1)])
def test_results_that_cannot_be_printed(corpus: Corpus, line: str, code: int) -> None:
    """Quietly where nobody wants more; a full disk is a failure of the one thing that was asked for."""
    got, told = _piped(line, ["data", "stats", corpus.valid])
    assert got == code and "Traceback" not in told and "Exception ignored" not in told
    assert told == "" if line == GONE else told.startswith("error: standard output: No space left on device")


@pytest.mark.parametrize("line", [GONE, FULL_DISK, '"$@" >&-'])
def test_a_command_whose_product_is_a_file_goes_on(corpus: Corpus, tmp_path: Path, line: str) -> None:
    got, told = _piped(line, ["data", "scan", str(Path(corpus.train).parent), str(tmp_path / "all.jsonl")])
    assert got == 0 and told == ""
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 33
