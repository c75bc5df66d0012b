"""What the GPU kernels need and cost, Triton's and the CUDA library's side by side, and the gates.

    python -m tools.kernel_table                      every scheme and rank on every architecture
    python -m tools.kernel_table --arch 90 --rank 64  a part of the table
    python -m tools.kernel_table --count              and what is counted (sm_80, sm_90)

For GPUs that need not be there. The plans are those that the two choosers make for so many rows of
a 4096 x 4096 layer, each backend's cheapest first; ``*`` is the one that arithmetic prefers. Triton
kernels are compiled ahead of time, CUDA kernels read off the built library, for the architectures
it holds. ``--count`` executes the PTX on one row block, two column tiles (clusters) and four steps
along K: tensor FLOPs over those needed if nothing were computed twice, bytes over those that the
tiles must move, wavefronts of shared memory beyond those needed, in the loops along K.

The last line says whether all gates hold, and so does the exit status.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from loraxs_kernels import _native
from loraxs_kernels.backends import gpu as gpu_choice
from loraxs_kernels.backends.cuda import launch as cuda_launch
from loraxs_kernels.backends.cuda import plan as cuda_plan
from loraxs_kernels.backends.problem import problem_of
from loraxs_kernels.backends.roles import Operands
from loraxs_kernels.backends.triton.plan import Gpu, Plan, choose
from tools import cuda_resources, triton_resources
from tools.triton_resources import GPUS, MATRIX

#: The PTX names of the CUDA kernels' matrix instructions.
PTX_NAMES = {"HMMA": "mma.sync", "HGMMA": "wgmma"}
COUNTED = (80, 90)
_SIZE = 4096


@dataclass(frozen=True)
class Counted:
    """``exact``: the FLOPs are those of the scheme's formula."""

    flops: float
    bytes: float
    conflicts: int
    exact: bool


@dataclass(frozen=True)
class Line:
    """One kernel. ``limit``: shared memory of a CTA; ``wanted``: its matrix instruction."""

    plan: str
    chosen: bool
    registers: int
    threads: int
    shared: int
    local: int
    spills: int
    matrix: frozenset[str]
    limit: int
    wanted: str
    counted: Counted | None

    def broken(self) -> list[str]:
        """The gates that do not hold."""
        c = self.counted
        gates = {
            "local memory": self.local == 0,
            "spills": self.spills == 0,
            "registers": self.registers <= 255 and self.registers * self.threads <= 65536,
            "shared memory": self.shared <= self.limit,
            f"no {self.wanted}": self.wanted in self.matrix,
            "FLOPs": c is None or c.exact,
            "bytes": c is None or c.bytes <= 1.15,
            "bank conflicts": c is None or c.conflicts == 0,
        }
        return [name for name, holds in gates.items() if not holds]

    def __str__(self) -> str:
        c = self.counted
        counted = f"{c.flops:5.3f}  {c.bytes:5.3f}  {c.conflicts:9}" if c else f"{'-':>23}"
        name = self.plan + (" *" if self.chosen else "")
        return (
            f"{name:54}  {self.registers:4}  {self.threads:7}  {self.shared:6}  {self.local:5}  "
            f"{self.spills:6}  {counted}  {' '.join(sorted(self.matrix))}"
        )


HEAD = (
    f"arch  rows  pass      rank  {'plan':54}  regs  threads  shared  local  spills  FLOPs  bytes  "
    "conflicts  matrix"
)


def _triton_line(
    o: Operands, gpu: Gpu, plan: Plan, chosen: bool, rank: int, backward: bool, count: bool
) -> Line:
    spec = triton_resources.specialisation(o, gpu, plan)
    r = triton_resources.resources(triton_resources.compile_kernel(spec, gpu))
    counted = None
    if count:
        from tests.triton_ptx import cost, execute_small

        done = execute_small(plan, gpu.arch, rank, backward=backward)
        limit, flops = cost(done), done.run.report.tensor_flops
        counted = Counted(
            flops / limit.needed, done.moved() / limit.moved, done.conflicts(),
            flops == limit.needed + limit.redundant,
        )  # fmt: skip
    # Without one of its 64 rows, wgmma and tcgen05 have no tile to work on.
    wanted = MATRIX[gpu.arch] if plan.BM >= 64 else "mma.sync"
    return Line(
        f"Triton {plan.describe()}", chosen, r.registers, r.threads, r.shared, r.stack + r.local,
        r.spills, r.matrix, gpu.shared, wanted, counted,
    )  # fmt: skip


def _used(k: cuda_plan.Kernel, gpu: Gpu) -> cuda_resources.Resources | None:
    """What the kernel's machine code for ``gpu`` needs; None if the library holds none."""
    found, arch = cuda_resources.find(), f"{gpu.arch // 10}.{gpu.arch % 10}"
    return found.get((k.name, arch)) or found.get((k.name, f"{arch}a"))


def _cuda_line(k: cuda_plan.Kernel, gpu: Gpu, chosen: bool, rank: int, count: bool) -> Line:
    r = _used(k, gpu)
    assert r is not None, k.name
    counted = None
    if count:
        from tests.cuda_small import execute_small

        small = execute_small(k, rank)
        done = small.done
        counted = Counted(
            done.flops / small.needed, done.moved / small.least, done.conflicts(),
            done.flops == small.needed + small.again,
        )  # fmt: skip
    matrix = frozenset(PTX_NAMES[i] for i in r.instructions & set(cuda_resources.MATRIX))
    return Line(
        f"CUDA {_name(k)}", chosen, r.registers, k.threads, r.static + k.shared, r.stack + r.local,
        r.spills, matrix, gpu.shared, "wgmma" if k.exact_arch else "mma.sync", counted,
    )  # fmt: skip


def _name(k: cuda_plan.Kernel) -> str:
    family = "unaligned ticket" if k.family == "ticket" and not k.aligned else k.family
    most = f", rank <= {k.max_rank}" if k.family == "cluster" else ""
    return f"{family} {k.bm}x{k.bn}x{k.bk}, {k.threads // 32} warps{most}"


def _cuda_kernels(o: Operands, gpu: Gpu) -> list[cuda_plan.Kernel]:
    """The candidates, and the build of the ticket kernel that takes any address and pitch."""
    if _native.load("cuda") is not None:
        return []
    problem, table = problem_of(o), cuda_plan.kernels()[1]
    by_name = {k.name: k for k in table}
    found = [by_name[plan.kernel] for plan in cuda_launch.candidates(o, problem, gpu)]
    if found and found[0].family != "few-rows":
        ours = str(o.x.dtype).removeprefix("torch."), cuda_launch.direction_of(o)
        found += [k for k in table if (k.element, k.direction) == ours and not k.aligned
                  and k.family == "ticket"]  # fmt: skip
    return found


def lines(gpu: Gpu, o: Operands, rank: int, backward: bool, count: bool) -> Iterator[Line]:
    """The kernels that can run ``o``."""
    problem, kernels = problem_of(o), _cuda_kernels(o, gpu)
    chosen: gpu_choice.Winner = choose(problem, gpu)
    if kernels:
        chosen = gpu_choice.cheapest(
            problem, kernels[0].element, kernels[0].direction, gpu, cuda_plan.kernels(),
            vectors=cuda_launch.all_vectors(o),
        )  # fmt: skip
    count = count and gpu.arch in COUNTED
    for plan in triton_resources.plans(o, gpu):
        yield _triton_line(o, gpu, plan, plan == chosen, rank, backward, count)
    name = chosen.kernel if isinstance(chosen, cuda_plan.Plan) else ""
    for k in kernels:
        if _used(k, gpu):  # else the driver compiles the PTX on such a GPU
            yield _cuda_line(k, gpu, k.name == name, rank, count)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="*", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--rank", type=int, nargs="*", default=[16, 64, 128, 256])
    parser.add_argument("--rows", type=int, nargs="*", default=[8192, 64, 16])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--count", action="store_true")
    args = parser.parse_args()
    why_not = _native.load("cuda")
    if why_not is not None:
        print(f"CUDA library: {why_not}")
    print(HEAD)
    total, broken = 0, []
    cases = itertools.product(args.arch, args.rows, args.rank, (False, True))
    for arch, rows, rank, backward in cases:
        o = triton_resources.operands(
            rows, _SIZE, _SIZE, rank, backward=backward, dtype=getattr(torch, args.dtype)
        )
        what = f"{arch:4}  {rows:4}  {'backward' if backward else 'forward':8}  {rank:4}"
        for line in lines(GPUS[arch], o, rank, backward, args.count):
            print(f"{what}  {line}", flush=True)
            total += 1
            broken += [f"{what}  {line.plan}: {gate}" for gate in line.broken()]
    print(*broken, sep="\n", end="\n" if broken else "")
    print(f"{total} lines, {len(broken)} gates broken")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
