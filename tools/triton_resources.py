"""What the Triton kernels need, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from loraxs_kernels.backends.roles import Operands
from loraxs_kernels.backends.triton import plan as planning
from loraxs_kernels.backends.triton.launch import prepare, problem_of
from loraxs_kernels.backends.triton.plan import Gpu, Plan
from loraxs_kernels.backends.triton.specialise import Specialisation, compile_for

_KIB = 1024

#: Architectures, with the number of SMs of a typical chip and the shared memory a CTA may use.
GPUS = {
    80: Gpu(80, 108, 163 * _KIB),
    89: Gpu(89, 128, 99 * _KIB),
    90: Gpu(90, 132, 227 * _KIB),
    100: Gpu(100, 148, 227 * _KIB),
    120: Gpu(120, 170, 99 * _KIB),
}

#: The AMD target that is compiled too (for its syntax and its shared memory only).
GFX942 = Gpu(0, 304, 64 * _KIB)

#: Matrix instructions in PTX.
MATRIX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}


@dataclass(frozen=True)
class Resources:
    """What ``cuobjdump`` and the PTX say about one compiled kernel."""

    registers: int
    threads: int
    shared: int
    stack: int
    local: int
    spills: int
    matrix: frozenset[str]
    cp_async: tuple[int, ...]
    narrow_loads: int


def operands(
    M: int, K: int, N: int, rank: int, *, backward: bool = False,
    dtype: torch.dtype = torch.bfloat16, core: torch.dtype = torch.float32,
    dropout: bool = False, adapters: int = 0, sorted_ids: bool = False, update: bool = False,
    bias: bool = False, need_dx: bool = True, need_dR: bool = True, block: bool = False,
) -> Operands:  # fmt: skip
    """The operands of a pass of a layer ``K -> N``, as tensors without data.

    ``block``: with dropout, x is a block of columns of a wider matrix.
    """

    def meta(*shape: int, as_: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=as_, device="meta")

    R = meta(adapters, rank, rank, as_=core) if adapters else meta(rank, rank, as_=core)
    seed = meta(3 if block else 1, as_=torch.int64) if dropout else None
    ids = meta(M, as_=torch.int64) if adapters else None
    order = meta(M, as_=torch.int64) if sorted_ids else None
    offsets = meta(adapters + 2, as_=torch.int64) if sorted_ids else None
    p = 0.1 if dropout else 0.0
    A, B, W = meta(rank, K), meta(N, rank), None if update else meta(N, K)
    per_row: dict[str, Any] = {"seed": seed, "ids": ids, "order": order, "offsets": offsets}
    if not backward:
        return Operands(
            x=meta(M, K), w=W, base=meta(M, N) if update else None, a=A, core=R.mT, b=B,
            bias=meta(N) if bias else None, d=meta(M, N), side=meta(M, rank),
            scaling=1.0, dropout_p=p, **per_row,
        )  # fmt: skip
    return Operands(
        x=meta(M, N), w=W.mT if W is not None and need_dx else None, a=B.mT, core=R, b=A.mT,
        d=meta(M, K) if need_dx else None, q=meta(M, rank) if need_dR else None,
        dR=meta(*R.shape, as_=core) if need_dR else None, db=meta(N) if bias else None,
        scaling=1.0, dropout_p=p, mask_output=True, **per_row,
    )  # fmt: skip


def specialisation(o: Operands, gpu: Gpu, plan: Plan) -> Specialisation:
    """What the launcher would compile for these operands under ``plan``."""
    return prepare(o, gpu, plan).spec


def plans(o: Operands, gpu: Gpu) -> list[Plan]:
    """Each scheme's plan, the chosen one first."""
    return planning.candidates(problem_of(o), gpu)


def compile_kernel(spec: Specialisation, gpu: Gpu) -> Any:
    """The compiled kernel."""
    if gpu.arch == 0:
        return compile_for(spec, "hip", "gfx942", 64)
    return compile_for(spec, "cuda", gpu.arch, 32)


def _tool(name: str) -> str:
    return str(Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / name)


def resources(kernel: Any) -> Resources:
    """What a compiled kernel needs; for NVIDIA targets."""
    ptx, threads = kernel.asm["ptx"], kernel.metadata.num_warps * 32
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        sass = _run(_tool("nvdisasm"), "-c", file.name)

    def number(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        assert found is not None, usage
        return int(found[1])

    widths = re.findall(
        r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)? [^;]*?, (?:0x)?([0-9a-f]+)", ptx
    )
    return Resources(
        number("REG"), threads, kernel.metadata.shared, number("STACK"), number("LOCAL"),
        len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        frozenset(m for m in MATRIX.values() if re.search(rf"\b{re.escape(m)}", ptx)),
        tuple(sorted({int(w, 16) for w in widths})),
        len(re.findall(r"ld\.global(?:\.\w+)*\.(?:b|u)(?:8|16)\b", ptx)),
    )  # fmt: skip


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
