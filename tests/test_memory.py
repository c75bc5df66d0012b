"""Memory of a training step, read from the process that makes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_STEP = """
import json, sys
import torch
from torch import nn
import loraxs_kernels as lxk
from bench.linear_cases import EagerLoRAXS
from loraxs_kernels.backends import packing

LAYERS, WIDTH, ROWS, RANK = 12, 512, 8192, 16

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

torch.manual_seed(0)
stack = nn.Sequential()
for _ in range(LAYERS):
    layer = lxk.LoRAXSLinear(WIDTH, WIDTH, RANK)
    if sys.argv[1] == "eager":
        base = nn.Linear(WIDTH, WIDTH, device="meta")
        base.weight, base.bias = layer.weight, layer.bias
        layer = EagerLoRAXS(base, layer.A, layer.R.detach(), layer.B, 1.0)
    stack += nn.Sequential(layer, nn.ReLU())

def step(rows):
    stack(torch.randn(rows, WIDTH)).square().mean().backward()

step(ROWS // 8)  # libraries set themselves up, gradients and packed copies are made
packed = packing.packed_bytes()[1]
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")
before = status("VmRSS")
step(ROWS)
extra = packing.packed_bytes()[1] - packed
print(json.dumps({"peak": status("VmHWM") - before, "packed": extra, "row": ROWS * WIDTH * 4}))
"""


def _measure(kind: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", _STEP, kind],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_a_step_needs_no_more_than_eager() -> None:
    """At most eager's peak and the packed copies made on the way; half an activation of slack."""
    ours, eager = _measure("ours"), _measure("eager")
    # ReLU saves its output either way: without that the test would compare nothing.
    assert eager["peak"] > 12 * eager["row"]
    assert ours["peak"] <= eager["peak"] + ours["packed"] + ours["row"] // 2
