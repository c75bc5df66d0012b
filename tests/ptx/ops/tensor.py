"""``mma.sync``: matrix products of a warp.

Rounding: the products and the accumulator of one instruction are summed in float64 and rounded
once to fp32 (or fp16); successive instructions follow in program order. A GPU keeps fewer bits
inside an instruction and truncates; that is not modelled.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tests.ptx.machine import RECONVERGE, Active, Function, Program
from tests.ptx.numeric import Array
from tests.ptx.ops import op, unknown
from tests.ptx.ops.operands import gathered, writer
from tests.ptx.parser import Instruction, Vec

TF32_MASK = np.uint32(0xFFFFE000)


def widen(kind: str, words: Array) -> Array:
    """32-bit registers to float64 elements, on a new last axis (1 or 2 elements per register)."""
    if kind == "tf32":  # the hardware reads the upper 19 bits
        return (words & TF32_MASK).view(np.float32)[..., None].astype(np.float64)
    words = np.ascontiguousarray(words)
    if kind == "f16":
        return words.view(np.float16).reshape(*words.shape, 2).astype(np.float64)
    low = (words << np.uint32(16)).view(np.float32)
    high = (words & np.uint32(0xFFFF0000)).view(np.float32)
    return np.stack([low, high], -1).astype(np.float64)


@cache
def positions_a(k: int, per: int) -> tuple[Array, Array]:
    """Row and column in the 16×k matrix A of (register, lane, element)."""
    regs = 16 * k // (32 * per)
    reg, lane, e = np.meshgrid(np.arange(regs), np.arange(32), np.arange(per), indexing="ij")
    return lane // 4 + 8 * (reg % 2), (lane % 4) * per + e + 4 * per * (reg // 2)


@cache
def positions_b(k: int, per: int) -> tuple[Array, Array]:
    """Row (k) and column (n) in the k×8 matrix B of (register, lane, element)."""
    regs = 8 * k // (32 * per)
    reg, lane, e = np.meshgrid(np.arange(regs), np.arange(32), np.arange(per), indexing="ij")
    return (lane % 4) * per + e + 4 * per * reg, lane // 4


@cache
def positions_c() -> tuple[Array, Array]:
    """Row and column in the 16×8 matrix C of (register, lane), fp32."""
    reg, lane = np.meshgrid(np.arange(4), np.arange(32), indexing="ij")
    return lane // 4 + 8 * (reg // 2), (lane % 4) * 2 + reg % 2


def place(values: Array, where: tuple[Array, Array], shape: tuple[int, int]) -> Array:
    """``values[reg, warp, lane, element]`` as matrices ``[warp, *shape]``."""
    out = np.empty((values.shape[1], *shape))
    rows, columns = where
    out[:, rows, columns] = values.swapaxes(0, 1)
    return out


@op("mma")
def mma(i: Instruction, program: Program) -> Function:
    """``mma.sync.aligned.m16n8kK.row.col.d.a.b.c``."""
    mods = i.mods
    if len(mods) != 9 or mods[0] != "sync" or mods[3:5] != ("row", "col") or mods[6] != mods[7]:
        raise unknown(i)
    shapes = {
        ("m16n8k16", "bf16"): 16, ("m16n8k16", "f16"): 16, ("m16n8k8", "bf16"): 8,
        ("m16n8k8", "f16"): 8, ("m16n8k8", "tf32"): 8, ("m16n8k4", "tf32"): 4,
    }  # fmt: skip
    kind, accumulator = mods[6], mods[5]
    k = shapes.get((mods[2], kind), 0)
    if not k or accumulator != mods[8] or accumulator != "f32":
        raise unknown(i)
    per = 1 if kind == "tf32" else 2
    d, a, b, c = i.operands
    assert all(isinstance(o, Vec) for o in (d, a, b, c))
    get_a, get_b = (gathered(o.items, "b32", program) for o in (a, b))  # type: ignore[union-attr]
    get_c = gathered(c.items, "f32", program)  # type: ignore[union-attr]
    puts = [writer(o, "f32", program) for o in d.items]  # type: ignore[union-attr]
    at_a, at_b, at_c = positions_a(k, per), positions_b(k, per), positions_c()
    flops = 2 * 16 * 8 * k

    def run(active: Active) -> str | None:
        if not active.whole:
            return RECONVERGE
        cta = active.cta
        left = place(widen(kind, get_a(active)).reshape(-1, cta.warps, 32, per), at_a, (16, k))
        right = place(widen(kind, get_b(active)).reshape(-1, cta.warps, 32, per), at_b, (k, 8))
        product = (left @ right)[:, at_c[0], at_c[1]].swapaxes(0, 1).reshape(4, -1)
        result = (product + get_c(active)).astype(np.float32)
        for n, put in enumerate(puts):
            put(active, result[n])
        report = cta.grid.report
        report.tensor_flops += flops * len(active.warps)
        report.tensor_flops_by_line[i.line] += flops * len(active.warps)
        return None

    return run
