"""The side path: ``Q = X A^T`` ("shrink"), ``T = Q R'`` (the core) and ``D += T B'^T`` ("expand").

Device code. ``R'`` is ``R^T`` in the forward and ``R`` in the backward: the caller passes strides.

The scaling s is a run-time number. For ``|s| <= 1`` it is folded into T. A larger one would
overflow T in float16 where the product itself would not, so it is split, ``s = f * 2^e`` with ``0.5
<= f < 1``: f goes into T, and the accumulator is multiplied by ``2^-e`` before and by ``2^e`` after
T B'^T is added. Both are exact.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from loraxs_kernels.backends.triton.device.tiles import (
    CLAMPED,
    MASKED,
    load_transposed,
    multiply,
    store_tile,
    tile_rows,
)


class Scaling(NamedTuple):
    """``s = fraction * after`` and ``before * after = 1``."""

    fraction: tl.tensor
    before: tl.tensor
    after: tl.tensor


class Cores(NamedTuple):
    """``R'[adapter]`` as a matrix: element ``(l, j)`` multiplies ``Q[:, l]`` into ``T[:, j]``."""

    ptr: tl.tensor
    adapters: tl.tensor
    rank: tl.tensor
    adapter_stride: tl.tensor
    row_stride: tl.tensor
    col_stride: tl.tensor


@triton.jit
def _core_tile(cores, adapter, l0, j0, BL: tl.constexpr, BJ: tl.constexpr):
    ls = l0 + tl.arange(0, BL)
    js = j0 + tl.arange(0, BJ)
    ptrs = cores.ptr + adapter.to(tl.int64) * cores.adapter_stride
    ptrs = ptrs + ls.to(tl.int64)[:, None] * cores.row_stride
    ptrs = ptrs + js.to(tl.int64)[None, :] * cores.col_stride
    return tl.load(ptrs, mask=(ls[:, None] < cores.rank) & (js[None, :] < cores.rank), other=0.0)


@triton.jit
def _core_dot(q, core, t, PRECISION: tl.constexpr):
    """``t + q core`` in the core's precision: a float32 core under 16-bit inputs widens q."""
    return multiply(q.to(core.dtype), core, t, PRECISION)


@triton.jit
def core_in_registers(q, cores, scaling, BM: tl.constexpr, BR: tl.constexpr, P: tl.constexpr):
    """``f Q R'`` of a tile whose Q (already rounded to the input's type) is in registers."""
    core = _core_tile(cores, tl.zeros((), tl.int32), 0, 0, BR, BR)
    t = _core_dot(q, core, tl.zeros((BM, BR), tl.float32), P)
    return (t * scaling.fraction).to(q.dtype)


@triton.jit
def core_of_rows(
    side, t, cores, scaling, ids_ptr, bad_ptr, row0,
    BM: tl.constexpr, CM: tl.constexpr, CL: tl.constexpr, STAGES: tl.constexpr,
    PER_ROW: tl.constexpr, REPORT_BAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``T[rows] = f Q[rows] R'`` of a row block, from Q in global memory to T in global memory.

    ``CM`` rows at a time. With a core per row the distinct adapters of those rows are visited in
    ascending order, each with the other rows masked: one product where rows are sorted, at most CM
    where they are not. A row whose id is -1, or out of range, gets T = 0; an id out of range also
    sets the flag that the host looks at. An adapter's core is never read for an id out of range.

    Cost: ``2 BM r^2`` FLOPs (times the distinct adapters among CM rows), ``BM r`` elements of Q and
    T and ``r^2`` of each core.
    """
    for m0 in tl.range(0, BM, CM, num_stages=1):
        rows = row0 + m0 + tl.arange(0, CM)
        if PER_ROW:
            ids = tl.load(ids_ptr + rows, mask=rows < side.rows, other=-1)
            if REPORT_BAD:
                bad = (ids < -1) | (ids >= cores.adapters)
                if tl.max(bad.to(tl.int32), 0) != 0:
                    tl.store(bad_ptr, 1)
            none = cores.adapters.to(tl.int64)
            ids = tl.where(ids < 0, none, tl.minimum(ids, none))
            first = tl.min(ids, 0)
        for j0 in tl.range(0, t.cols, CL, num_stages=1):
            acc = tl.zeros((CM, CL), tl.float32)
            if PER_ROW:
                adapter = first
                while adapter < none:
                    mine = ids == adapter
                    for l0 in tl.range(0, side.cols, CL, num_stages=STAGES):
                        q = _load_q(side, rows, mine, l0, CL)
                        acc = _core_dot(
                            q, _core_tile(cores, adapter, l0, j0, CL, CL), acc, PRECISION
                        )
                    adapter = tl.min(tl.where(ids > adapter, ids, none), 0)
            else:
                for l0 in tl.range(0, side.cols, CL, num_stages=STAGES):
                    q = _load_q(side, rows, rows >= 0, l0, CL)
                    core = _core_tile(cores, tl.zeros((), tl.int32), l0, j0, CL, CL)
                    acc = _core_dot(q, core, acc, PRECISION)
            store_tile(t, acc * scaling.fraction, rows, j0 + tl.arange(0, CL))


@triton.jit
def _load_q(side, rows, mine, l0, CL: tl.constexpr):
    # .cg: written by other threads, or another CTA, of this launch; L1 is not coherent.
    ls = l0 + tl.arange(0, CL)
    ptrs = side.ptr + rows.to(tl.int64)[:, None] * side.row_stride + ls[None, :] * side.col_stride
    inside = (mine & (rows < side.rows))[:, None] & (ls[None, :] < side.cols)
    return tl.load(ptrs, mask=inside, other=0.0, cache_modifier=".cg")


@triton.jit
def expand(
    acc, t, b, scaling, row0, col0,
    BM: tl.constexpr, BN: tl.constexpr, CR: tl.constexpr, B_EDGE: tl.constexpr,
    EVEN_R: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``acc += 2^e T B'^T`` with T from global memory: ``2 BM BN r`` FLOPs, ``r (BM + BN)`` read.

    T has a whole number of ``CR`` columns, zeros beyond the rank, so it is read without a mask.
    """
    acc = acc * scaling.before
    rows = tile_rows(t, row0, BM, CLAMPED)
    cols = tile_rows(b, col0, BN, B_EDGE)
    for l0 in tl.range(0, b.cols, CR, num_stages=STAGES):
        ls = l0 + tl.arange(0, CR)
        t_tile = tl.load(
            t.ptr + rows.to(tl.int64)[:, None] * t.row_stride + ls[None, :], cache_modifier=".cg"
        )
        b_tile = load_transposed(b, cols, ls, B_EDGE == MASKED, not EVEN_R)
        acc = multiply(t_tile, b_tile, acc, PRECISION)
    return acc * scaling.after


@triton.jit
def expand_registers(
    acc, t, b, scaling, col0, BN: tl.constexpr, BR: tl.constexpr, ADD: tl.constexpr,
    B_EDGE: tl.constexpr, EVEN_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`expand` with T in registers; without ``ADD`` acc is zero.

    Such a zero is not scaled: all its elements would be one number of the run time, whose copies
    into the accumulator's registers the compiler places after the fence of ``wgmma``.
    """
    cols = tile_rows(b, col0, BN, B_EDGE)
    b_tile = load_transposed(b, cols, tl.arange(0, BR), B_EDGE == MASKED, not EVEN_R)
    if ADD:
        acc = acc * scaling.before
    acc = multiply(t, b_tile, acc, PRECISION)
    return acc * scaling.after
