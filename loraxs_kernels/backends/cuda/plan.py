"""Which kernel of ``csrc/cuda`` a call gets, and how it is cut: arithmetic on sizes alone.

``Problem`` and ``Gpu`` are those of the Triton backend's ``plan.py``, and so is the unit of
``cost``, so that the two backends' plans can be compared (``backends/gpu.py``).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from loraxs_kernels import _native
from loraxs_kernels.backends.triton.plan import Gpu, Problem, ceil_div

#: What a tile pays to draw a ticket and to see a flag, in FLOPs of one SM: about a microsecond.
_HANDOVER = 4.0e6

#: Reading one row of X or W costs a tile about as much as multiplying it with so many of the other.
_ROW_COST = 24.0

#: A shrink slice is narrow: its products run at about this fraction of a square tile's speed.
_SHRINK_EFFICIENCY = 0.5

#: Few rows: steps along K that a part should at least have (its copies run three steps ahead), and
#: what starting and ending one costs, in steps.
_LEAST_STEPS = 4
_PART_OVERHEAD = 2.0

#: Few rows: up to so many, two CTAs share an SM (of 164 KB); beyond, one has enough bytes under
#: way, and the sums of twice as many parts (8 M N bytes each) would be half of W again.
_SHARING_ROWS = 16

#: Row blocks walked together, so that they share W in L2.
_GROUP = 8


@dataclass(frozen=True)
class Kernel:
    """One entry point, as ``csrc/cuda/kernel.h`` describes it; ``index``: its number there."""

    index: int
    name: str
    family: str
    element: str
    direction: str
    min_arch: int
    exact_arch: int
    aligned: int
    max_rows: int
    max_rank: int
    threads: int
    cluster: int
    shared: int
    bm: int
    bn: int
    bk: int
    br: int
    cr: int
    di: int
    dj: int
    dm: int
    db_columns: int
    maps: int


@dataclass(frozen=True)
class Plan:
    """A kernel and how its work is cut. ``chunks``: CTAs that share a tile of dR. ``parts``: CTAs
    that share a tile's K (few rows). ``group``: row blocks walked together."""

    kernel: str
    chunks: int = 1
    parts: int = 1
    group: int = _GROUP

    def describe(self) -> str:
        """One line for people."""
        cut = f", K in {self.parts} parts" if self.parts > 1 else ""
        return f"CUDA kernel {self.kernel.removeprefix('loraxs_')}{cut}"


@functools.cache
def kernels() -> tuple[tuple[str, ...], tuple[Kernel, ...]]:
    """The architectures the library holds code for ("8.0", "9.0a"), and its kernels.

    Raises:
        RuntimeError: the library is not there.
    """
    operators = _native.operators("cuda")
    if operators is None:
        raise RuntimeError(f"the CUDA library: {_native.load('cuda')}")
    table = json.loads(operators.kernels())
    found = tuple(Kernel(index=i, **entry) for i, entry in enumerate(table["kernels"]))
    return tuple(table["archs"].split()), found


def runs_on(kernel: Kernel, archs: tuple[str, ...], arch: int) -> bool:
    """Whether a GPU of compute capability ``arch`` / 10 can run the kernel, as it was built.

    PTX for 8.0 is always embedded: a GPU that the build did not name compiles it when it is loaded.
    Code for an architecture with a letter runs on that one alone.
    """
    if kernel.exact_arch:
        return arch == kernel.min_arch and f"{arch // 10}.{arch % 10}a" in archs
    return arch >= kernel.min_arch


def takes(kernel: Kernel, p: Problem, gpu: Gpu, *, vectors: bool) -> bool:
    """Whether the kernel can compute ``p`` on a GPU that can run it; ``vectors``: every matrix has
    lines of whole 16 bytes, not X and W alone."""
    rides = kernel.family in ("ride-along", "cluster")
    return (
        p.rank <= kernel.max_rank
        and (kernel.max_rows == 0 or kernel.max_rows >= p.M)
        and (p.vectors or not kernel.aligned)
        and (p.has_d or not rides)
        and not (p.per_row and rides)
        and (vectors or kernel.family != "cluster")
        and kernel.shared <= gpu.shared
        and not (p.mask_input or p.mask_output)
    )


def candidates(
    p: Problem, element: str, direction: str, gpu: Gpu,
    library: tuple[tuple[str, ...], tuple[Kernel, ...]], *, vectors: bool,
) -> list[Plan]:  # fmt: skip
    """The plans for ``p``, cheapest first; empty if no kernel takes it. ``vectors``: see
    :func:`takes`.

    Up to 64 rows the time goes into reading W, and the kernel made for that is the only candidate.
    """
    archs, table = library
    usable = [
        k for k in table
        if k.element == element and k.direction == direction
        and runs_on(k, archs, gpu.arch) and takes(k, p, gpu, vectors=vectors)
    ]  # fmt: skip
    few = [k for k in usable if k.family == "few-rows"]
    if few:
        usable = [min(few, key=lambda k: k.max_rows)]
    elif any(k.aligned for k in usable):
        usable = [k for k in usable if k.aligned]
    made = [(cost(p, gpu, k, plan := _cut(p, gpu, k)), plan) for k in usable]
    return [plan for _, plan in sorted(made, key=lambda pair: pair[0])]


def _cut(p: Problem, gpu: Gpu, k: Kernel) -> Plan:
    """Enough CTAs for each product, and no more."""
    tiles = p.adapters * ceil_div(p.rank, k.di) * ceil_div(p.rank, k.dj)
    chunks = max(1, min(gpu.sms // tiles, ceil_div(p.M, 4 * k.dm))) if p.need_dR else 1
    parts = _parts(p, gpu, k) if k.family == "few-rows" and p.has_d and p.has_w else 1
    return Plan(k.name, chunks, parts)


def _slots(k: Kernel, gpu: Gpu) -> int:
    """Few rows: CTAs that run at once."""
    return gpu.sms * (2 if k.bm <= _SHARING_ROWS else 1)


def _parts(p: Problem, gpu: Gpu, k: Kernel) -> int:
    """Parts of K: those with which the last CTA ends first."""
    steps, tiles = ceil_div(p.K, k.bk), ceil_div(p.N, k.bn)
    most = max(1, steps // _LEAST_STEPS)

    def time(parts: int) -> float:
        waves = ceil_div(tiles * parts, _slots(k, gpu))
        return waves * (steps / parts + _PART_OVERHEAD)

    return min(range(1, most + 1), key=time)


def matrix_rate(kernel: Kernel, arch: int) -> float:
    """The speed of the kernel's matrix instruction, over that of the GPU's fastest.

    Assumed, from what is published of these chips: mma.sync reaches about 0.62 of wgmma's speed on
    sm_90. On sm_100, where tcgen05.mma is the fastest, half of that is assumed. Elsewhere mma.sync
    is the fastest there is. With few rows it does not matter: memory is what is waited for.
    """
    if kernel.exact_arch or kernel.family == "few-rows" or arch // 10 not in (9, 10, 11):
        return 1.0
    return 0.62 if arch // 10 == 9 else 0.31


def cost(p: Problem, gpu: Gpu, k: Kernel, plan: Plan) -> float:
    """FLOPs of the busiest SM, at the speed of the GPU's fastest matrix instruction; a handover
    counts as what could be computed meanwhile."""
    row_blocks = ceil_div(p.M, k.bm)
    col_tiles = ceil_div(p.N, k.bn) if p.has_d else 0
    width = k.bn if p.has_w else 0
    rank, rate = ceil_div(p.rank, 16) * 16, matrix_rate(k, gpu.arch)
    step = 2.0 * k.bm * p.K / rate
    # The CTAs of a cluster share what they read of X.
    tile = step * width * (1.0 + _ROW_COST / k.bm + _ROW_COST / (k.bn * k.cluster))
    tile += 2.0 * k.bm * k.bn * rank / rate
    if k.family == "ride-along":
        # The narrow product shares X's tile: it costs its FLOPs, no more.
        return ceil_div(row_blocks * col_tiles, gpu.sms) * (tile + step * k.br)
    if k.family == "cluster":
        # The CTAs of a cluster have a tile each, and a part of Q each.
        clusters = row_blocks * ceil_div(col_tiles, k.cluster)
        return ceil_div(clusters, gpu.sms // k.cluster) * (tile + step * k.br + _HANDOVER)
    shrink = step * rank / _SHRINK_EFFICIENCY
    if k.family == "few-rows":
        items = col_tiles * plan.parts
        waves = ceil_div(items, _slots(k, gpu))
        return ceil_div(items, gpu.sms) * tile / plan.parts + waves * _HANDOVER + shrink / gpu.sms
    waves = ceil_div(row_blocks * col_tiles, gpu.sms)
    return waves * (tile + _HANDOVER) + max(row_blocks / gpu.sms, 0.5) * shrink
