"""Every kernel the chooser can pick, compiled ahead of time for GPUs that are not here.

Gates: no spills, no local memory, registers and shared memory within the chip's limits, the matrix
instruction of the chip, and 16-byte asynchronous copies of X and W.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from loraxs_kernels.backends.triton.plan import Gpu
from tools import kernel_table as table

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

#: (rows, in, out, rank) and what else makes the kernel another one.
CASES: dict[str, dict[str, Any]] = {
    "r16": dict(M=8192, K=4096, N=4096, rank=16),
    "r32": dict(M=8192, K=4096, N=4096, rank=32),
    "r64": dict(M=8192, K=4096, N=4096, rank=64),
    "r256": dict(M=8192, K=4096, N=4096, rank=256),
    "16-bit core": dict(M=8192, K=4096, N=4096, rank=64, core=BF16),
    "small layer": dict(M=2048, K=768, N=768, rank=16),
    "medium": dict(M=2048, K=2048, N=2048, rank=64),
    "odd rank": dict(M=8192, K=4096, N=4096, rank=25),
    "odd sizes": dict(M=4099, K=1504, N=2056, rank=12),
    "odd strides": dict(M=2049, K=1001, N=737, rank=20),
    "bias": dict(M=8192, K=4096, N=4096, rank=64, bias=True),
    "dropout": dict(M=8192, K=4096, N=4096, rank=64, dropout=True),
    "update": dict(M=8192, K=4096, N=4096, rank=64, update=True),
    "update dropout": dict(M=8192, K=4096, N=4096, rank=64, update=True, dropout=True),
    "raw ids": dict(M=8192, K=4096, N=4096, rank=64, adapters=64),
    "sorted ids": dict(M=8192, K=4096, N=4096, rank=64, adapters=1000, sorted_ids=True),
    "ids r16": dict(M=8192, K=4096, N=4096, rank=16, adapters=64),
    "one row": dict(M=1, K=4096, N=4096, rank=64),
    "few rows": dict(M=16, K=4096, N=4096, rank=16),
    "more rows": dict(M=64, K=4096, N=11008, rank=64),
    "serving": dict(M=32, K=4096, N=4096, rank=64, adapters=1000),
    "fp32": dict(M=4096, K=2048, N=2048, rank=64, dtype=FP32),
    "fp32 r16": dict(M=4096, K=2048, N=2048, rank=16, dtype=FP32),
    "fp32 few": dict(M=16, K=2048, N=2048, rank=64, dtype=FP32),
    "fp32 ids": dict(M=4096, K=2048, N=2048, rank=64, dtype=FP32, adapters=64),
    "fp32 dropout": dict(M=4096, K=2048, N=2048, rank=64, dtype=FP32, dropout=True),
    "dR only": dict(M=8192, K=4096, N=4096, rank=64, need_dx=False),
    "dX only": dict(M=8192, K=4096, N=4096, rank=64, need_dR=False),
}
