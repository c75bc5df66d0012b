"""``dR = s P^T Q`` and ``db = sum of the rows of G``, in the launch that computes dX.

Device code. Both are sums over rows in a fixed order, so they are the same bits from run to run,
whatever order the CTAs run in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraxs_kernels.backends.triton.device import sync
from loraxs_kernels.backends.triton.device.tiles import load_rows, multiply


@triton.jit
def _gathered(m, rows, inside, cols):
    ptrs = m.ptr + rows.to(tl.int64)[:, None] * m.row_stride + cols[None, :] * m.col_stride
    mask = inside[:, None] & (cols[None, :] < m.cols)
    return tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _add_rows(acc, p, q, rows, inside, i_cols, j_cols, PRECISION: tl.constexpr):
    p_tile = _gathered(p, rows, inside, i_cols)
    q_tile = _gathered(q, rows, inside, j_cols)
    return multiply(tl.trans(p_tile), q_tile, acc, PRECISION)


@triton.jit
def _sum_sorted(
    p, q, order_ptr, begin, end, i_cols, j_cols,
    DI: tl.constexpr, DJ: tl.constexpr, DM: tl.constexpr, GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``P^T Q`` over the rows ``begin..end``, or ``order[begin..end]`` with ``GATHER``."""
    acc = tl.zeros((DI, DJ), tl.float32)
    for m0 in tl.range(begin, end, DM, num_stages=2):
        rows = m0 + tl.arange(0, DM)
        inside = rows < end
        if GATHER:
            rows = tl.load(order_ptr + rows, mask=inside, other=0)
        acc = _add_rows(acc, p, q, rows, inside, i_cols, j_cols, PRECISION)
    return acc


@triton.jit
def _sum_scanned(
    p, q, ids_ptr, adapter, begin, end, i_cols, j_cols,
    DI: tl.constexpr, DJ: tl.constexpr, DM: tl.constexpr, SCAN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``P^T Q`` over those rows of ``begin..end`` whose id is ``adapter``.

    For ids that nobody has sorted: they are scanned ``SCAN`` at a time, and only blocks with a hit
    read P and Q, whose other rows are masked.
    """
    acc = tl.zeros((DI, DJ), tl.float32)
    for s0 in tl.range(begin, end, SCAN, num_stages=1):
        scanned = s0 + tl.arange(0, SCAN)
        found = tl.load(ids_ptr + scanned, mask=scanned < end, other=-1) == adapter
        if tl.max(found.to(tl.int32), 0) != 0:
            for m0 in tl.range(s0, tl.minimum(s0 + SCAN, end), DM, num_stages=1):
                rows = m0 + tl.arange(0, DM)
                ids = tl.load(ids_ptr + rows, mask=rows < end, other=-1)
                acc = _add_rows(acc, p, q, rows, ids == adapter, i_cols, j_cols, PRECISION)
    return acc


@triton.jit
def core_gradient(
    item, p, q, dr_ptr, partial_ptr, counters, ids_ptr, order_ptr, offsets_ptr, scale, chunks,
    DI: tl.constexpr, DJ: tl.constexpr, DM: tl.constexpr, SCAN: tl.constexpr,
    PER_ROW: tl.constexpr, SORTED: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of the rows of one ``DI x DJ`` tile of one adapter's dR.

    With several chunks the partial sums go to global memory, and the last chunk of a tile to arrive
    adds them up in the order of the rows. ``ATOMIC`` adds them to dR (float32, zeroed by the
    caller) instead: one trip less, but in no fixed order. An adapter without rows gets zeros.

    Cost: ``2 r^2`` FLOPs per row; ``2 r`` elements per row times ``r / DI``; ``2 chunks r^2``
    floats.
    """
    tiles_j = tl.cdiv(q.cols, DJ)
    tiles = tl.cdiv(p.cols, DI) * tiles_j
    tile = item // chunks
    chunk = item % chunks
    adapter = tile // tiles
    i_cols = (tile % tiles) // tiles_j * DI + tl.arange(0, DI)
    j_cols = (tile % tiles) % tiles_j * DJ + tl.arange(0, DJ)
    first = tl.zeros((), tl.int32)
    last = first + p.rows
    if SORTED:
        first = tl.load(offsets_ptr + adapter + 1).to(tl.int32)
        last = tl.load(offsets_ptr + adapter + 2).to(tl.int32)
    step = tl.cdiv(tl.cdiv(last - first, chunks), DM) * DM
    begin = tl.minimum(first + chunk * step, last)
    end = tl.minimum(begin + step, last)
    if PER_ROW and not SORTED:
        acc = _sum_scanned(
            p, q, ids_ptr, adapter, begin, end, i_cols, j_cols, DI, DJ, DM, SCAN, PRECISION
        )
    else:
        acc = _sum_sorted(
            p, q, order_ptr, begin, end, i_cols, j_cols, DI, DJ, DM, SORTED, PRECISION
        )
    out = dr_ptr + adapter.to(tl.int64) * p.cols * q.cols
    out = out + i_cols[:, None] * q.cols + j_cols[None, :]
    inside = (i_cols[:, None] < p.cols) & (j_cols[None, :] < q.cols)
    if ATOMIC:
        tl.atomic_add(out, acc * scale, mask=inside, sem="relaxed")
    elif chunks == 1:
        tl.store(out, (acc * scale).to(dr_ptr.dtype.element_ty), mask=inside)
    else:
        at = tl.arange(0, DI)[:, None] * DJ + tl.arange(0, DJ)[None, :]
        mine = partial_ptr + tile.to(tl.int64) * chunks * (DI * DJ) + at
        tl.store(mine + chunk * (DI * DJ), acc)
        if sync.arrive(counters + tile) == chunks - 1:
            total = tl.zeros((DI, DJ), tl.float32)
            for c in tl.range(0, chunks, num_stages=1):
                total += tl.load(mine + c * (DI * DJ), cache_modifier=".cg")
            tl.store(out, (total * scale).to(dr_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_gradient(item, g, db_ptr, DB_M: tl.constexpr, DB_N: tl.constexpr, STAGES: tl.constexpr):
    """``db`` of ``DB_N`` columns: one CTA reads them all, once (``M DB_N`` elements, in row
    order).
    """
    cols = item * DB_N + tl.arange(0, DB_N)
    acc = tl.zeros((DB_M, DB_N), tl.float32)
    for m0 in tl.range(0, g.rows, DB_M, num_stages=STAGES):
        rows = m0 + tl.arange(0, DB_M)
        acc += load_rows(g, rows, cols, True, True).to(tl.float32)
    total = tl.sum(acc, 0)
    tl.store(db_ptr + cols, total.to(db_ptr.dtype.element_ty), mask=cols < g.cols)
