"""What the GPU kernels need: registers, shared memory, spills, instructions.

    python -m tools.kernel_table                      every scheme and rank on every architecture
    python -m tools.kernel_table --arch 90 --rank 64  a part of the table
    python -m tools.kernel_table --count              and FLOPs and bytes, counted (sm_80, sm_90)

Compiled ahead of time, for GPUs that need not be there: the plans are those that the chooser makes
for 8192 rows of a 4096 x 4096 layer, the alignment facts those of the launcher. Below them stand
the kernels of the CUDA library, if it is built, for the architectures it holds. ``--count``
executes the PTX on one row block, two column tiles and four steps along K: tensor FLOPs over those
needed if nothing were computed twice, and bytes over those that the tiles must move.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from loraxs_kernels import _native
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
    bias: bool = False, need_dx: bool = True, need_dR: bool = True,
) -> Operands:  # fmt: skip
    """The operands of a pass of a layer ``K -> N``, as tensors without data."""

    def meta(*shape: int, as_: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=as_, device="meta")

    R = meta(adapters, rank, rank, as_=core) if adapters else meta(rank, rank, as_=core)
    seed = meta(1, as_=torch.int64) if dropout else None
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
    """Every plan the chooser and the autotuner consider."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="*", default=list(GPUS))
    parser.add_argument("--rank", type=int, nargs="*", default=[16, 64, 128, 256])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--count", action="store_true")
    args = parser.parse_args()
    print("Plans for 8192 rows of a 4096 x 4096 layer; * is the one that is chosen.")
    print(f"arch  pass      rank  {'plan':46}  regs  shared  spills  FLOPs  bytes  matrix")
    for arch in args.arch:
        for rank in args.rank:
            for backward in (False, True):
                _rows(GPUS[arch], rank, backward, getattr(torch, args.dtype), args.count)
    _cuda_rows(args.arch, args.dtype)


def _counted(plan: Plan, arch: int, rank: int, backward: bool) -> str:
    from tests.triton_ptx import cost, execute_small

    if arch not in (80, 90):
        return f"{'-':>5}  {'-':>5}"
    done = execute_small(plan, arch, rank, backward=backward)
    limit = cost(done)
    flops = done.run.report.tensor_flops / limit.needed
    return f"{flops:5.3f}  {done.moved() / limit.moved:5.3f}"


def _rows(gpu: Gpu, rank: int, backward: bool, dtype: torch.dtype, count: bool) -> None:
    o = operands(8192, 4096, 4096, rank, backward=backward, dtype=dtype)
    for i, plan in enumerate(plans(o, gpu)):
        r = resources(compile_kernel(specialisation(o, gpu, plan), gpu))
        counted = _counted(plan, gpu.arch, rank, backward) if count else f"{'-':>5}  {'-':>5}"
        direction = "backward" if backward else "forward"
        name = plan.describe() + (" *" if i == 0 else "")
        print(
            f"{gpu.arch:4}  {direction:8}  {rank:4}  {name:46}  {r.registers:4}  {r.shared:6}  "
            f"{r.spills:6}  {counted}  {' '.join(sorted(r.matrix))}",
            flush=True,
        )


def _cuda_rows(archs: list[int], dtype: str) -> None:
    """The CUDA library's kernels, in the same columns; their rank is the largest they take."""
    why_not = _native.load("cuda")
    if why_not is not None:
        print(f"CUDA library: {why_not}")
        return
    from loraxs_kernels.backends.cuda.plan import kernels
    from tools.cuda_resources import MATRIX as MATRIX_SASS
    from tools.cuda_resources import find

    table = {k.name: k for k in kernels()[1]}
    for (name, arch), r in find().items():
        k, number = table[name], int(re.sub(r"\D", "", arch))
        if number not in archs or k.element != dtype:
            continue
        scheme = name.removeprefix("loraxs_").rsplit("_", 2)[0].replace("_", " ")
        shown = f"CUDA {scheme} {k.bm}x{k.bn}x{k.bk}, {k.threads // 32} warps"
        print(
            f"{number:4}  {k.direction:8}  {k.max_rank:4}  {shown:46}  {r.registers:4}  "
            f"{r.static + k.shared:6}  {r.spills:6}  {'-':>5}  {'-':>5}  "
            f"{' '.join(sorted(r.instructions & set(MATRIX_SASS)))}"
        )


if __name__ == "__main__":
    main()
