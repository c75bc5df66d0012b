"""One small launch of any kernel of the CUDA library, and what it should cost.

The counterpart of ``triton_ptx.execute_small``, for the table of ``tools/kernel_table.py``: one row
block, two column tiles (two clusters of them), four steps along K.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from loraxs_kernels.backends.cuda.plan import Kernel
from tests import cuda_few_rows, cuda_sm80, cuda_sm90
from tests.cuda_layer import ELEMENTS, Layer, Pass


@dataclass(frozen=True)
class Small:
    """``needed``: tensor FLOPs in whole tiles if nothing were computed twice; ``again``: what the
    scheme computes again, by design; ``least``: bytes, every operand once per tile."""

    done: Pass
    needed: int
    again: int
    least: int


@functools.cache
def execute_small(kernel: Kernel, rank: int) -> Small:
    """With a float32 R, dX and dR in the backward, no bias. It is counted on the PTX for the oldest
    architecture that has the kernel."""
    scheme = kernel.name.removeprefix("loraxs_").rsplit("_", 2)[0]
    columns, depth = 2 * kernel.bn * kernel.cluster, 4 * kernel.bk
    backward = kernel.direction == "backward"
    k, n = (columns, depth) if backward else (depth, columns)
    dtype = next(d for d in ELEMENTS if str(d).endswith(f".{kernel.element}"))
    case: Layer
    if kernel.family == "few-rows":
        case = cuda_few_rows.Case(kernel.bm, k, n, rank, dtype, parts=2)
    elif kernel.family == "cluster":
        case = cuda_sm90.Case(scheme.removeprefix("sm90_"), kernel.bm, k, n, rank, dtype, chunks=1)
    else:
        case = cuda_sm80.Case(scheme.removeprefix("sm80_"), kernel.bm, k, n, rank, dtype, chunks=1)
    _, p = case.problems()
    if backward:
        done = case.backward(p, torch.randn(kernel.bm, rank).to(dtype), need_db=False)
    else:
        done = case.forward(p, bias=None)
    assert done.facts.name == kernel.name
    return _costs(done)


def _costs(done: Pass) -> Small:
    if done.facts.family == "few-rows":
        least = cuda_few_rows.least(done) + cuda_few_rows.again(done)
        return Small(done, cuda_few_rows.flops(done), 0, least)
    if done.facts.family == "cluster":
        again = cuda_sm90.again(done)
        return Small(done, cuda_sm90.flops(done) - again, again, cuda_sm90.least(done))
    counted = cuda_sm80.flops(done)
    return Small(done, counted.needed, counted.again, cuda_sm80.least(done))
