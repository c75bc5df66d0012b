"""The command line and the environment."""

from __future__ import annotations

import os
import subprocess
import sys


def test_info() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loraxs_kernels", "info"], capture_output=True, text=True, check=True
    )
    for word in ("reference", "onednn", "triton", "packed copies", "float16"):
        assert word in done.stdout


def test_backend_of_the_environment() -> None:
    code = (
        "import torch, loraxs_kernels as l\n"
        "t = torch.randn\n"
        "l.lora_xs_linear(t(2, 4), t(3, 4), t(2, 4), t(2, 2), t(3, 2))\n"
    )
    for name, status in (("reference", 0), ("cuda", 1)):
        environment = {**os.environ, "LORAXS_BACKEND": name}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert status == 0 or "cuda" in done.stderr
