"""The one fused kernel: a matrix product with a low-rank side path, in one launch.

    D = X W^T + bias + base + s ((X A^T) R') B'^T          X [M, K]   W [N, K]   D [M, N]

Forward: X is the input, R' = R^T, B' = B. Backward: X is dL/dY, W, A, B' are W^T, B^T, A^T and R' =
R: the same formula with the roles swapped, by strides alone (see docs/architecture). The backward
use adds ``dR = s P^T Q`` (P is its own X A^T, Q the forward's) and ``db`` as further items of the
same launch. Where the swap is not exact is dropout: the forward masks X, the backward the side's
part of D.

Three schemes decide who computes ``Q = X A^T``:

* ``RIDE_ALONG``: every output tile, beside X W^T. ``2 M K r N / BN`` FLOPs, no synchronisation.
* ``RESIDENT``: a CTA walks N tiles of one row block and computes Q first. ``2 M K r parts`` FLOPs.
* ``TICKET``: Q of a row block is a work item of its own, ahead of the block's tiles in the order of
  tickets; the tiles take it after their K loop. ``2 M K r`` FLOPs, a flag per row block.

Every CTA does one item: columns of db, or a row block or tile, or a tile of dR, in this order.
Which one says the program id, or, where one item waits for another, a ticket (see ``sync.py``). One
item per CTA and not a loop over items: in a loop the compiler hoists the address arithmetic of all
kinds of items, which takes 60 more registers and spills.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraxs_kernels.backends.triton.device import gradient, side, sync, tiles
from loraxs_kernels.backends.triton.device.side import Cores, Scaling
from loraxs_kernels.backends.triton.device.tiles import Dropout, Matrix

RIDE_ALONG = tl.constexpr(0)
RESIDENT = tl.constexpr(1)
TICKET = tl.constexpr(2)


@triton.jit
def _swizzled(item, row_blocks, per_row_block, GROUP_M: tl.constexpr):
    """``(row block, position)``: groups of row blocks, so that concurrent CTAs share W and X in
    L2.
    """
    group = item // (GROUP_M * per_row_block)
    first = group * GROUP_M
    height = tl.minimum(row_blocks - first, GROUP_M)
    within = item - group * (GROUP_M * per_row_block)
    return first + within % height, within // height


@triton.jit
def lora_xs_kernel(
    x_ptr, w_ptr, base_ptr, a_ptr, core_ptr, b_ptr, bias_ptr, d_ptr, side_ptr, spare_ptr, t_ptr,
    q_ptr, dr_ptr, partial_ptr, db_ptr, flags_ptr, seed_ptr, ids_ptr, order_ptr, offsets_ptr,
    bad_ptr,
    x_desc, w_desc, a_desc,
    fraction, before, after, dr_scale, keep_scale, keep_threshold,
    M, N, K, rank, adapters,
    x_row, x_col, w_row, w_col, base_row, base_col, a_row, a_col, core_adapter, core_row, core_col,
    b_row, b_col, side_row, t_row, t_cols, q_row, dropout_columns,
    parts, chunks, db_items, gemm_items, dr_items, flag_count,
    SCHEME: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    CM: tl.constexpr, CL: tl.constexpr, CR: tl.constexpr, GROUP_M: tl.constexpr,
    DI: tl.constexpr, DJ: tl.constexpr, DM: tl.constexpr, DB_M: tl.constexpr, DB_N: tl.constexpr,
    HAS_D: tl.constexpr, HAS_W: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    STORE_SIDE: tl.constexpr, NEED_DR: tl.constexpr, NEED_DB: tl.constexpr,
    MASK_INPUT: tl.constexpr, MASK_OUTPUT: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
    PER_ROW: tl.constexpr, SORTED: tl.constexpr, REPORT_BAD: tl.constexpr, ATOMIC: tl.constexpr,
    MANY_PARTS: tl.constexpr, TICKETS: tl.constexpr,
    X_EDGE: tl.constexpr, W_EDGE: tl.constexpr, B_EDGE: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    X_DESC: tl.constexpr, W_DESC: tl.constexpr, A_DESC: tl.constexpr,
    PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """See the module's docstring; ``launch.py`` documents and prepares the arguments."""
    x = Matrix(x_ptr, M, K, x_row, x_col, x_desc)
    w = Matrix(w_ptr, N, K, w_row, w_col, w_desc)
    base = Matrix(base_ptr, M, N, base_row, base_col)
    a = Matrix(a_ptr, rank, K, a_row, a_col, a_desc)
    b = Matrix(b_ptr, N, rank, b_row, b_col)
    d = Matrix(d_ptr, M, N, N, 1)
    q_or_p = Matrix(side_ptr, M, rank, side_row, 1)
    t = Matrix(t_ptr, M, t_cols, t_row, 1)
    cores = Cores(core_ptr, adapters, rank, core_adapter, core_row, core_col)
    scaling = Scaling(fraction, before, after)
    first, stride = tiles.block_counters(seed_ptr, dropout_columns, COLUMN_BLOCK)
    drop = Dropout(seed_ptr, keep_threshold, keep_scale, first, stride)

    row_blocks = tl.cdiv(M, BM)
    col_tiles = tl.cdiv(N, BN) if HAS_D else 0
    slices = tl.cdiv(rank, BR)
    ready = flags_ptr + sync.FIXED_FLAGS
    arrived = ready + row_blocks
    counters = arrived + row_blocks

    item = sync.draw(flags_ptr) if TICKETS else tl.program_id(0)
    if item < db_items + gemm_items + dr_items:
        if NEED_DB and item < db_items:
            gradient.bias_gradient(item, x, db_ptr, DB_M, DB_N, STAGES)
        elif item < db_items + gemm_items:
            place = item - db_items
            if SCHEME == RIDE_ALONG:
                row_block, col_tile = _swizzled(place, row_blocks, col_tiles, GROUP_M)
                _ride_along(
                    x, w, a, b, d, base, bias_ptr, q_or_p, cores, scaling, drop, flags_ptr,
                    row_block, col_tile,
                    BM, BN, BK, BR, HAS_W, HAS_BASE, HAS_BIAS, STORE_SIDE, NEED_DR, MASK_INPUT,
                    X_EDGE, W_EDGE, B_EDGE, EVEN_K, EVEN_R, X_DESC, W_DESC, A_DESC, PRECISION,
                    CORE_PRECISION, STAGES,
                )  # fmt: skip
            elif SCHEME == RESIDENT:
                row_block = place % row_blocks
                part = place // row_blocks
                own_ptr = side_ptr
                if MANY_PARTS:
                    # Parts of a row block share nothing: each has its own Q and T.
                    if part > 0:
                        own_ptr = spare_ptr + (part - 1).to(tl.int64) * M * side_row
                own_q = Matrix(own_ptr, M, rank, side_row, 1)
                own_t = Matrix(t_ptr + part.to(tl.int64) * M * t_row, M, t_cols, t_row, 1)
                _shrink(
                    x, a, own_q, own_t, cores, scaling, drop, ids_ptr, bad_ptr, flags_ptr, ready,
                    arrived, row_block, 0, part == 0,
                    BM, BK, BR, CM, CL, False, HAS_D, NEED_DR, MASK_INPUT, PER_ROW, REPORT_BAD,
                    X_EDGE, EVEN_K, EVEN_R, X_DESC, A_DESC, PRECISION, CORE_PRECISION, STAGES,
                )  # fmt: skip
                tl.debug_barrier()
                if HAS_D:
                    per_part = tl.cdiv(col_tiles, parts)
                    stop = tl.minimum((part + 1) * per_part, col_tiles)
                    for col_tile in tl.range(
                        part * per_part, stop, num_stages=1, disable_licm=True
                    ):
                        _tile(
                            x, w, a, b, d, base, bias_ptr, own_t, scaling, drop, ready,
                            row_block, col_tile,
                            BM, BN, BK, CR, False, HAS_W, HAS_BASE, HAS_BIAS, MASK_OUTPUT,
                            X_EDGE, W_EDGE, B_EDGE, EVEN_K, EVEN_R, X_DESC, W_DESC,
                            PRECISION, STAGES,
                        )  # fmt: skip
            else:
                row_block, position = _swizzled(place, row_blocks, slices + col_tiles, GROUP_M)
                if position < slices:
                    _shrink(
                        x, a, q_or_p, t, cores, scaling, drop, ids_ptr, bad_ptr, flags_ptr, ready,
                        arrived, row_block, position, True,
                        BM, BK, BR, CM, CL, True, HAS_D, NEED_DR, MASK_INPUT, PER_ROW, REPORT_BAD,
                        X_EDGE, EVEN_K, EVEN_R, X_DESC, A_DESC, PRECISION, CORE_PRECISION, STAGES,
                    )  # fmt: skip
                elif HAS_D:
                    _tile(
                        x, w, a, b, d, base, bias_ptr, t, scaling, drop, ready,
                        row_block, position - slices,
                        BM, BN, BK, CR, True, HAS_W, HAS_BASE, HAS_BIAS, MASK_OUTPUT,
                        X_EDGE, W_EDGE, B_EDGE, EVEN_K, EVEN_R, X_DESC, W_DESC, PRECISION, STAGES,
                    )  # fmt: skip
        elif NEED_DR:
            sync.wait(flags_ptr + sync.PUBLISHED, row_blocks * (slices if SCHEME == TICKET else 1))
            gradient.core_gradient(
                item - db_items - gemm_items, q_or_p, Matrix(q_ptr, M, rank, q_row, 1),
                dr_ptr, partial_ptr, counters, ids_ptr, order_ptr, offsets_ptr, dr_scale, chunks,
                DI, DJ, DM, 1024, PER_ROW, SORTED, ATOMIC, CORE_PRECISION,
            )  # fmt: skip
    if TICKETS:
        sync.leave(flags_ptr, flag_count, 256)


@triton.jit
def _ride_along(
    x, w, a, b, d, base, bias_ptr, q_or_p, cores, scaling, drop, flags_ptr, row_block, col_tile,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    HAS_W: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    STORE_SIDE: tl.constexpr, PUBLISH: tl.constexpr, MASK_INPUT: tl.constexpr,
    X_EDGE: tl.constexpr, W_EDGE: tl.constexpr, B_EDGE: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    X_DESC: tl.constexpr, W_DESC: tl.constexpr, A_DESC: tl.constexpr,
    PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One output tile with its own Q, all of it in registers; the first of a row block stores Q.

    Cost: ``2 BM (K (BN + BR) + BR BN + BR^2)`` FLOPs.
    """
    row0 = row_block * BM
    col0 = col_tile * BN
    acc = tl.zeros((BM, BN), tl.float32)
    acc, q = tiles.accumulate(
        acc, x, w, a, row0, col0, 0, drop,
        BM, BN, BR, BK, HAS_W, True, MASK_INPUT, X_EDGE, W_EDGE, EVEN_K, EVEN_R,
        X_DESC, W_DESC, A_DESC, PRECISION, STAGES,
    )  # fmt: skip
    rounded = q.to(x.ptr.dtype.element_ty)
    if STORE_SIDE:
        if col_tile == 0:
            tiles.store_tile(q_or_p, rounded, row0 + tl.arange(0, BM), tl.arange(0, BR))
            if PUBLISH:
                sync.release(flags_ptr + sync.PUBLISHED)
    t = side.core_in_registers(rounded, cores, scaling, BM, BR, CORE_PRECISION)
    acc = side.expand_registers(acc, t, b, scaling, col0, BN, BR, HAS_W, B_EDGE, EVEN_R, PRECISION)
    tiles.store_output(d, acc, base, bias_ptr, row0, col0, BM, BN, HAS_BASE, HAS_BIAS)


@triton.jit
def _shrink(
    x, a, q_or_p, t, cores, scaling, drop, ids_ptr, bad_ptr, flags_ptr, ready, arrived,
    row_block, slice_, store,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, CM: tl.constexpr, CL: tl.constexpr,
    SHARED: tl.constexpr, NEED_T: tl.constexpr, PUBLISH: tl.constexpr, MASK_INPUT: tl.constexpr,
    PER_ROW: tl.constexpr, REPORT_BAD: tl.constexpr,
    X_EDGE: tl.constexpr, EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    X_DESC: tl.constexpr, A_DESC: tl.constexpr,
    PRECISION: tl.constexpr, CORE_PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``Q`` of a row block, then its ``T = Q R'``.

    ``SHARED`` (ticket): this item computes BR columns of Q; who delivers the last ones computes T,
    and releases it. Otherwise (resident) all of it happens here, for this CTA's own tiles. Where
    two parts share a row block, both compute and store the same bits.
    """
    row0 = row_block * BM
    rows = row0 + tl.arange(0, BM)
    nothing = tl.zeros((BM, 16), tl.float32)
    if SHARED:
        _, q = tiles.accumulate(
            nothing, x, a, a, row0, 0, slice_ * BR, drop,
            BM, 16, BR, BK, False, True, MASK_INPUT, X_EDGE, 0, EVEN_K, EVEN_R,
            X_DESC, 0, A_DESC, PRECISION, STAGES,
        )  # fmt: skip
        tiles.store_tile(q_or_p, q, rows, slice_ * BR + tl.arange(0, BR))
        if PUBLISH:
            sync.release(flags_ptr + sync.PUBLISHED)
        if NEED_T:
            slices = tl.cdiv(a.rows, BR)
            if sync.arrive(arrived + row_block) == slices - 1:
                side.core_of_rows(
                    q_or_p, t, cores, scaling, ids_ptr, bad_ptr, row0,
                    BM, CM, CL, 1 if PER_ROW else 3, PER_ROW, REPORT_BAD, CORE_PRECISION,
                )  # fmt: skip
                sync.release(ready + row_block)
    else:
        for rank0 in tl.range(0, a.rows, BR, num_stages=1):
            _, q = tiles.accumulate(
                nothing, x, a, a, row0, 0, rank0, drop,
                BM, 16, BR, BK, False, True, MASK_INPUT, X_EDGE, 0, EVEN_K, EVEN_R,
                X_DESC, 0, A_DESC, PRECISION, STAGES,
            )  # fmt: skip
            tiles.store_tile(q_or_p, q, rows, rank0 + tl.arange(0, BR))
        if PUBLISH:
            if store:
                sync.release(flags_ptr + sync.PUBLISHED)
        if NEED_T:
            tl.debug_barrier()
            side.core_of_rows(
                q_or_p, t, cores, scaling, ids_ptr, bad_ptr, row0,
                BM, CM, CL, 1 if PER_ROW else 3, PER_ROW, REPORT_BAD, CORE_PRECISION,
            )  # fmt: skip


@triton.jit
def _tile(
    x, w, a, b, d, base, bias_ptr, t, scaling, drop, ready, row_block, col_tile,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CR: tl.constexpr,
    WAIT: tl.constexpr, HAS_W: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASK_OUTPUT: tl.constexpr,
    X_EDGE: tl.constexpr, W_EDGE: tl.constexpr, B_EDGE: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    X_DESC: tl.constexpr, W_DESC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One output tile that takes T from global memory.

    T is added after the K loop, when it is nearly always there. Only where dropout masks the side's
    part of the output must it come first, because the sum cannot be told apart later.

    Cost: ``2 BM BN (K + r)`` FLOPs.
    """
    row0 = row_block * BM
    col0 = col_tile * BN
    acc = tl.zeros((BM, BN), tl.float32)
    if MASK_OUTPUT:
        if WAIT:
            sync.wait(ready + row_block, 1)
        acc = side.expand(acc, t, b, scaling, row0, col0, BM, BN, CR, B_EDGE, EVEN_R, PRECISION, 2)
        keep = tiles.keep_mask(drop, row0 + tl.arange(0, BM), col0 + tl.arange(0, BN))
        acc = tl.where(keep, acc * drop.scale, 0.0)
    if HAS_W:
        acc, _ = tiles.accumulate(
            acc, x, w, a, row0, col0, 0, drop,
            BM, BN, 16, BK, True, False, False, X_EDGE, W_EDGE, EVEN_K, EVEN_R,
            X_DESC, W_DESC, 0, PRECISION, STAGES,
        )  # fmt: skip
    if not MASK_OUTPUT:
        if WAIT:
            sync.wait(ready + row_block, 1)
        acc = side.expand(acc, t, b, scaling, row0, col0, BM, BN, CR, B_EDGE, EVEN_R, PRECISION, 2)
    tiles.store_output(d, acc, base, bias_ptr, row0, col0, BM, BN, HAS_BASE, HAS_BIAS)
