"""Every example runs, and does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def _run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _torchrun(script: str) -> str:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return _run(*command, str(EXAMPLES / script))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built")
@pytest.mark.parametrize("script", ["ddp.py", "fsdp.py"])
def test_training_on_two_processes(script: str) -> None:
    printed = _torchrun(script)
    first, last = map(float, re.findall(r"loss (\S+) -> (\S+)", printed)[0])
    assert 0 < last < first / 4, printed
    if script == "fsdp.py":
        loaded = float(re.findall(r"without FSDP: (\S+)", printed)[0])
        assert loaded < first / 4, printed
