"""Tiles of matrices: loading them, multiplying along K, drawing dropout masks, storing results.

Device code. Everything here works on one output tile; which tile that is, and who computes the side
path, is decided in ``kernels.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from loraxs_kernels.backends import problem

#: How a tile that reaches over the last row is kept inside. A clamped row is read again: no
#: predicate in the loop, but the rows are no longer known to be consecutive, so where they are the
#: contiguous dimension a mask must do it. NO_EDGE: the rows are a whole number of tiles.
NO_EDGE = tl.constexpr(0)
CLAMPED = tl.constexpr(1)
MASKED = tl.constexpr(2)

#: How the copy engine (TMA) reads a matrix: not at all, by a descriptor of it, or, where its
#: columns are contiguous, by one of its transpose. What lies outside the matrix arrives as zeros.
NO_DESCRIPTOR = tl.constexpr(problem.NO_DESCRIPTOR)
BY_ROWS = tl.constexpr(problem.BY_ROWS)
BY_COLUMNS = tl.constexpr(problem.BY_COLUMNS)

#: The precision of :func:`multiply` that splits float32 operands itself.
SPLIT = tl.constexpr("tf32x3 in place")
_ROUNDINGS = tl.constexpr(tuple(f"cvt.rna.tf32.f32 $0, $1{' ' * n};" for n in range(6)))


class Matrix(NamedTuple):
    """A matrix in global memory; element ``(i, j)`` is at ``ptr + i * row_stride + j *
    col_stride``.

    A stride of one is a compile-time constant: that is how a tile's loads become vectors. ``desc``:
    its tensor descriptor, or None.
    """

    ptr: tl.tensor
    rows: tl.tensor
    cols: tl.tensor
    row_stride: tl.tensor
    col_stride: tl.tensor
    desc: tl.tensor_descriptor | None = None


class Dropout(NamedTuple):
    """What decides whether element ``(row, column)`` of the adapter's input is kept.

    ``seed``: pointer to the key, one int64. ``threshold``: ``floor(p * 2**32)`` as uint32.
    ``scale``: ``1 / (1 - p)``. The 64-bit counter is ``first + row * stride + column``: for a whole
    matrix ``first`` is 0 and ``stride`` its number of columns; a block of columns of a wider matrix
    has those of the wider one (``block_counters``).
    """

    seed: tl.tensor
    threshold: tl.tensor
    scale: tl.tensor
    first: tl.tensor
    stride: tl.tensor


@triton.jit
def block_counters(seed, columns, BLOCK: tl.constexpr):
    """``(first, stride)`` of the counters; with ``BLOCK`` the seed is ``[key, first, stride]``."""
    if BLOCK:
        return tl.load(seed + 1), tl.load(seed + 2)
    return tl.zeros((), tl.int64), columns.to(tl.int64)


@triton.jit
def keep_mask(drop, rows, cols):
    """The dropout mask of a tile, as ``reference.py`` defines it (Philox4x32-10, first word)."""
    seed = tl.load(drop.seed)
    counter = rows.to(tl.int64)[:, None] * drop.stride + cols[None, :] + drop.first
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return word >= drop.threshold.to(tl.uint32)


@triton.jit
def load_rows(m, rows, cols, ROWS_MASKED: tl.constexpr, COLS_MASKED: tl.constexpr):
    """The tile ``m[rows, cols]``; what is masked is zero."""
    ptrs = m.ptr + rows.to(tl.int64)[:, None] * m.row_stride
    ptrs = ptrs + cols.to(tl.int64)[None, :] * m.col_stride
    if ROWS_MASKED and COLS_MASKED:
        tile = tl.load(ptrs, mask=(rows[:, None] < m.rows) & (cols[None, :] < m.cols), other=0.0)
    elif ROWS_MASKED:
        tile = tl.load(ptrs, mask=rows[:, None] < m.rows, other=0.0)
    elif COLS_MASKED:
        tile = tl.load(ptrs, mask=cols[None, :] < m.cols, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def tile_rows(m, row0, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """The rows of a tile: clamped where ``EDGE`` says so, see below."""
    rows = row0 + tl.arange(0, BLOCK)
    if EDGE == CLAMPED:
        rows = tl.minimum(rows, m.rows - 1)
    return rows


@triton.jit
def load_transposed(m, rows, cols, ROWS_MASKED: tl.constexpr, COLS_MASKED: tl.constexpr):
    """The tile ``m[rows, cols]^T``, in the shape of a product's right operand."""
    ptrs = m.ptr + rows.to(tl.int64)[None, :] * m.row_stride
    ptrs = ptrs + cols.to(tl.int64)[:, None] * m.col_stride
    if ROWS_MASKED and COLS_MASKED:
        tile = tl.load(ptrs, mask=(rows[None, :] < m.rows) & (cols[:, None] < m.cols), other=0.0)
    elif ROWS_MASKED:
        tile = tl.load(ptrs, mask=rows[None, :] < m.rows, other=0.0)
    elif COLS_MASKED:
        tile = tl.load(ptrs, mask=cols[:, None] < m.cols, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def described_transposed(m, row0, col0, DESC: tl.constexpr):
    """:func:`load_transposed` by the matrix's descriptor."""
    if DESC == BY_COLUMNS:
        tile = m.desc.load([col0, row0])
    else:
        tile = tl.trans(m.desc.load([row0, col0]))
    return tile


@triton.jit
def _as_tf32(x, COPY: tl.constexpr):
    """x rounded to tf32. The same with another ``COPY`` is another value to the compiler."""
    text: tl.constexpr = _ROUNDINGS[COPY]
    return tl.inline_asm_elementwise(text, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def multiply(x, y, acc, PRECISION: tl.constexpr, COPY: tl.constexpr = 0):
    """``acc + x y``.

    ``SPLIT``: three tf32 products of float32 operands, as Triton's own "tf32x3" (a NaN of the small
    products, from an infinite operand, is left to the large one), but with a rounding of its own
    for each use of a part. Of a value that is used twice Triton moves only one use into the layout
    of the product: the other goes through shared memory once more, and the tile itself, wanted in
    two layouts, is stored without a swizzle. Two products of one tile differ in ``COPY``: 0 and 3.
    """
    if PRECISION != SPLIT:
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    elif x.dtype != tl.float32:
        acc = tl.dot(x, y, acc)
    else:
        x_low = x - _as_tf32(x, COPY + 2)
        y_low = y - _as_tf32(y, COPY + 2)
        small = tl.dot(x_low, _as_tf32(y, COPY), input_precision="tf32")
        small = tl.dot(_as_tf32(x, COPY), y_low, small, input_precision="tf32")
        small = tl.where(small == small, small, 0.0)
        acc += tl.dot(_as_tf32(x, COPY + 1), _as_tf32(y, COPY + 1), small, input_precision="tf32")
    return acc


@triton.jit
def accumulate(
    acc, x, w, a, row0, col0, rank0, drop,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    MAIN: tl.constexpr, SIDE: tl.constexpr, DROPOUT: tl.constexpr,
    X_EDGE: tl.constexpr, W_EDGE: tl.constexpr, EVEN_K: tl.constexpr, EVEN_R: tl.constexpr,
    X_DESC: tl.constexpr, W_DESC: tl.constexpr, A_DESC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One pass over X's columns: ``acc += X W^T`` (``MAIN``) and ``q = (m * X) A^T`` (``SIDE``).

    Both products of a step share the tile of X. With dropout the side's operand goes through
    registers, where the mask is applied; the factor 1 / (1 - p) waits until the sum is complete.

    Cost of a tile: ``2 BM K (BN + BR)`` FLOPs, ``K (BM + BN + BR)`` elements read.
    """
    q = tl.zeros((BM, BR), tl.float32)
    rows = row0 + tl.arange(0, BM)
    x_rows = tile_rows(x, row0, BM, X_EDGE)
    w_rows = tile_rows(w, col0, BN, W_EDGE)
    a_rows = rank0 + tl.arange(0, BR)
    for k0 in tl.range(0, x.cols, BK, num_stages=STAGES):
        cols = k0 + tl.arange(0, BK)
        if X_DESC != NO_DESCRIPTOR:
            x_tile = x.desc.load([row0, k0])
        else:
            x_tile = load_rows(x, x_rows, cols, X_EDGE == MASKED, not EVEN_K)
        if MAIN:
            if W_DESC != NO_DESCRIPTOR:
                w_tile = described_transposed(w, col0, k0, W_DESC)
            else:
                w_tile = load_transposed(w, w_rows, cols, W_EDGE == MASKED, not EVEN_K)
            acc = multiply(x_tile, w_tile, acc, PRECISION)
        if SIDE:
            if A_DESC != NO_DESCRIPTOR:
                a_tile = described_transposed(a, rank0, k0, A_DESC)
            else:
                a_tile = load_transposed(a, a_rows, cols, not EVEN_R, not EVEN_K)
            if DROPOUT:
                kept = tl.where(keep_mask(drop, rows, cols), x_tile, 0.0).to(x_tile.dtype)
                q = multiply(kept, a_tile, q, PRECISION, 3)
            else:
                q = multiply(x_tile, a_tile, q, PRECISION, 3)
    if SIDE and DROPOUT:
        q = q * drop.scale
    return acc, q


@triton.jit
def store_tile(m, tile, rows, cols):
    """``m[rows, cols] = tile``, converted to the matrix's type; nothing outside is touched."""
    ptrs = m.ptr + rows.to(tl.int64)[:, None] * m.row_stride + cols[None, :] * m.col_stride
    inside = (rows[:, None] < m.rows) & (cols[None, :] < m.cols)
    tl.store(ptrs, tile.to(m.ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_output(
    d, acc, base, bias_ptr, row0, col0,
    BM: tl.constexpr, BN: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``D = acc + base + bias`` for one tile: every element of D is written exactly once."""
    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BN)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < d.cols, other=0.0)
        acc = acc + bias.to(tl.float32)[None, :]
    if HAS_BASE:
        acc = acc + load_rows(base, rows, cols, True, True).to(tl.float32)
    store_tile(d, acc, rows, cols)
