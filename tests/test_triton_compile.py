"""Every kernel the chooser can pick, compiled ahead of time for GPUs that are not here.

Gates: no spills, no local memory, registers, shared and tensor memory within the chip's limits, the
matrix instruction of the chip, and 16-byte asynchronous copies of X and W, or tensor copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from loraxs_kernels.backends.triton import autotune
from loraxs_kernels.backends.triton.plan import Gpu, Plan
from loraxs_kernels.backends.triton.specialise import ARGUMENTS
from tests.triton_ptx import allowed_tf32
from tools import triton_resources as table

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _layer(**case: Any) -> dict[str, Any]:
    return case


#: (rows, in, out, rank) and what else makes the kernel another one.
CASES: dict[str, dict[str, Any]] = {
    "r16": _layer(M=8192, K=4096, N=4096, rank=16),
    "r32": _layer(M=8192, K=4096, N=4096, rank=32),
    "r64": _layer(M=8192, K=4096, N=4096, rank=64),
    "r256": _layer(M=8192, K=4096, N=4096, rank=256),
    "16-bit core": _layer(M=8192, K=4096, N=4096, rank=64, core=BF16),
    "small layer": _layer(M=2048, K=768, N=768, rank=16),
    "medium": _layer(M=2048, K=2048, N=2048, rank=64),
    "odd rank": _layer(M=8192, K=4096, N=4096, rank=25),
    "odd sizes": _layer(M=4099, K=1504, N=2056, rank=12),
    "odd strides": _layer(M=2049, K=1001, N=737, rank=20),
    "bias": _layer(M=8192, K=4096, N=4096, rank=64, bias=True),
    "dropout": _layer(M=8192, K=4096, N=4096, rank=64, dropout=True),
    "update": _layer(M=8192, K=4096, N=4096, rank=64, update=True),
    "update dropout": _layer(M=8192, K=4096, N=4096, rank=64, update=True, dropout=True),
    "raw ids": _layer(M=8192, K=4096, N=4096, rank=64, adapters=64),
    "sorted ids": _layer(M=8192, K=4096, N=4096, rank=64, adapters=1000, sorted_ids=True),
    "ids r16": _layer(M=8192, K=4096, N=4096, rank=16, adapters=64),
    "one row": _layer(M=1, K=4096, N=4096, rank=64),
    "few rows": _layer(M=16, K=4096, N=4096, rank=16),
    "more rows": _layer(M=64, K=4096, N=11008, rank=64),
    "serving": _layer(M=32, K=4096, N=4096, rank=64, adapters=1000),
    "fp32": _layer(M=4096, K=2048, N=2048, rank=64, dtype=FP32),
    "fp32 r16": _layer(M=4096, K=2048, N=2048, rank=16, dtype=FP32),
    "fp32 r32": _layer(M=4096, K=2048, N=2048, rank=32, dtype=FP32),
    "fp32 few": _layer(M=16, K=2048, N=2048, rank=64, dtype=FP32),
    "fp32 ids": _layer(M=4096, K=2048, N=2048, rank=64, dtype=FP32, adapters=64),
    "fp32 dropout": _layer(M=4096, K=2048, N=2048, rank=64, dtype=FP32, dropout=True),
    "fp32 as tf32": _layer(M=4096, K=2048, N=2048, rank=64, dtype=FP32, tf32=True),
    "fp16": _layer(M=8192, K=4096, N=4096, rank=64, dtype=FP16),
    "block dropout": _layer(M=8192, K=4096, N=4096, rank=64, dropout=True, block=True),
    "atomic dR": _layer(M=8192, K=4096, N=4096, rank=64, atomic=True),
    "dR only": _layer(M=8192, K=4096, N=4096, rank=64, need_dx=False),
    "dX only": _layer(M=8192, K=4096, N=4096, rank=64, need_dR=False),
}


def _directions(case: dict[str, Any]) -> list[bool]:
    return [True] if {"need_dx", "need_dR", "atomic"} & case.keys() else [False, True]


ALL = [(name, backward) for name, case in CASES.items() for backward in _directions(case)]


@pytest.fixture
def operands(
    name: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> Iterator[table.Operands]:
    """Those of a case, with PyTorch's switches as it wants them."""
    case = dict(CASES[name])
    monkeypatch.setenv("LORAXS_ATOMIC_DR", "1" if case.pop("atomic", False) else "0")
    with allowed_tf32(case.pop("tf32", False)):
        yield table.operands(backward=backward, **case)


def _compile(o: table.Operands, gpu: Gpu, plans: list[Plan]) -> list[tuple[Plan, Any]]:
    """``(plan, compiled kernel)``, of each kernel once."""
    specs = {table.specialisation(o, gpu, plan): plan for plan in plans}
    return [(plan, table.compile_kernel(spec, gpu)) for spec, plan in specs.items()]


def _chosen(o: table.Operands, gpu: Gpu) -> list[Plan]:
    found = table.plans(o, gpu)
    assert found, "no plan fits this GPU"
    return found[:1]


def _gate(o: table.Operands, arch: int, plans: list[Plan]) -> None:
    gpu = table.GPUS[arch]
    vectors = table.problem_of(o).vectors
    for plan, kernel in _compile(o, gpu, plans):
        what = f"sm_{arch} {plan.describe()}"
        r = table.resources(kernel)
        assert r.spills == 0 and r.local == 0 and r.stack == 0, what
        assert r.registers <= 255 and r.registers * r.threads <= 65536, what
        assert r.shared <= gpu.shared, what
        # Beyond the 512 columns of tensor memory the compiler emits a trap in place of the kernel.
        assert (kernel.metadata.tmem_size or 0) <= 512, what
        # Without one of its 64 rows, wgmma and tcgen05 have no tile to work on.
        wanted = table.MATRIX[arch] if plan.BM >= 64 else "mma.sync"
        assert wanted in r.matrix, what
        assert plan.tma or 16 in r.cp_async or not vectors, what
        assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == plan.tma, what


@pytest.mark.parametrize("arch", list(table.GPUS))
@pytest.mark.parametrize(("name", "backward"), ALL)
def test_chosen_kernels(operands: table.Operands, arch: int) -> None:
    _gate(operands, arch, _chosen(operands, table.GPUS[arch]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", list(table.GPUS))
@pytest.mark.parametrize(("name", "backward"), ALL)
def test_all_schemes(operands: table.Operands, arch: int) -> None:
    """Also those that only a measurement would choose, and the other way of copying."""
    gpu = table.GPUS[arch]
    plans = table.plans(operands, gpu)
    if arch >= 90 and table.problem_of(operands).descriptors:
        plans.append(replace(plans[0], tma=not plans[0].tma))
    _gate(operands, arch, plans)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", list(table.GPUS))
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["r64", "few rows", "fp32"])
def test_what_is_measured(operands: table.Operands, arch: int) -> None:
    """The autotuner's other depths and groups, too."""
    gpu = table.GPUS[arch]
    _gate(operands, arch, autotune.neighbours(table.problem_of(operands), gpu))


@pytest.mark.parametrize(("name", "backward"), ALL)
def test_kernels_for_amd(operands: table.Operands) -> None:
    """They compile, and fit: what ROCm makes of registers is not gated."""
    for plan, kernel in _compile(operands, table.GFX942, _chosen(operands, table.GFX942)):
        assert kernel.metadata.shared <= table.GFX942.shared, plan.describe()
        assert "v_mfma" in kernel.asm["amdgcn"], plan.describe()


def _facts(o: Any) -> dict[str, tuple[str, int]]:
    gpu = table.GPUS[90]
    spec = table.specialisation(o, gpu, table.plans(o, gpu)[0])
    return dict(zip(ARGUMENTS, spec.arguments, strict=True))


def test_unaligned_operands_are_not_promised_to_be_aligned() -> None:
    """The facts told to the compiler are those of the tensors."""
    o = table.operands(M=300, K=1001, N=737, rank=25)
    facts = _facts(o)
    assert facts["x_row"] == ("i32", 1) and facts["x_col"] == ("one", 1)
    assert facts["K"] == ("i32", 1) and facts["a_row"] == ("i32", 1) and facts["M"] == ("i32", 4)
    o.x = torch.empty(300 * 1008 + 1, dtype=torch.bfloat16)[1:].view(300, 1008)[:, :1001]
    facts = _facts(o)
    assert facts["x_ptr"] == ("*bf16", 1) and facts["x_row"] == ("i32", 16)


def test_large_strides_are_64_bit() -> None:
    o = table.operands(M=300, K=4096, N=4096, rank=16)
    o.x = torch.empty_strided((300, 4096), (2**31 + 8, 1), dtype=torch.bfloat16, device="meta")
    assert _facts(o)["x_row"] == ("i64", 8)


def test_repeated_calls_share_a_kernel() -> None:
    """Neither the number of rows nor the scaling makes another kernel."""
    specs = set()
    for rows in (4096, 8192, 12288):
        o = table.operands(M=rows, K=4096, N=4096, rank=64)
        o.scaling = float(rows)
        specs.add(table.specialisation(o, table.GPUS[90], table.plans(o, table.GPUS[90])[0]))
    assert len(specs) == 1
