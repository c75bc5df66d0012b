"""The Triton kernels on the CPU, in Triton's interpreter: in a process of its own.

The interpreter is switched on for a whole process, and there the compiler does not work.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "triton_interpreter"


FILES = sorted(f.name for f in FOLDER.glob("test_*.py"))


def _run(file: str, marks: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(FOLDER / file)],
        env=environment, cwd=FOLDER.parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file: str) -> None:
    _run(file, "not slow")


@pytest.mark.exhaustive
def test_every_pair_of_scheme_and_size() -> None:
    _run("test_schemes.py", "slow")
