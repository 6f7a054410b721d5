"""What a run on a CPU must not wait for before its first step: PyTorch's compiler takes a second or two to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import words

PROGRAM = """
import sys
from nest_fn.train.cli.main import main
code = main(sys.argv[1:])
print(*sorted({"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "triton"} & set(sys.modules)))
sys.exit(code)
"""


def test_no_compiler_is_imported(corpus: Corpus, tmp_path: Path) -> None:
    argv = words(corpus, tmp_path / "run", "trainer.max_steps=1", "trainer.valid_every=1", "trainer.save_every=1")
    done = subprocess.run([sys.executable, "-c", PROGRAM, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
