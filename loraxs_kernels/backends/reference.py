"""The executable definition of a LoRA-XS layer, in plain PyTorch, on every device.

    q = (m * x / (1 - p)) A^T          [M, r]
    y = x W^T + b + s * (q R^T) B^T    [M, N]

    P  = G B                           [M, r]
    dx = G W + s * m / (1 - p) * ((P R) A)
    dR = s * P^T q                     [r, r] (per adapter: a sum over its rows)
    db = sum of the rows of G

All other backends are tested against this file in float64. It favours being read over being fast;
every function is made of differentiable PyTorch operations, so that the parts also serve as the
formulas of second derivatives, forward-mode derivatives and ``vmap`` in ``autograd.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from loraxs_kernels.dispatch import Call

#: Philox4x32-10 constants (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF

#: The dropout mask of a block of columns can be that of the whole (seeds of three numbers).
MASKS_COLUMN_BLOCKS = True

#: Rows whose cores are gathered at once for per-row R: bounds the scratch to rows * r * r numbers.
_GATHERED_NUMBERS = 1 << 24


def unavailable() -> str | None:
    """The definition runs wherever PyTorch does."""
    return None


def unsupported(call: Call) -> str | None:
    """The definition supports every call of the contract."""
    return None


# ---------------------------------------------------------------------------------- dropout


def _philox_first_word(key: Tensor, counter: Tensor) -> Tensor:
    """First 32-bit output word of Philox4x32-10 at ``(counter lo, counter hi, 0, 0)``.

    32-bit words live in int64 tensors: a 32 x 32 bit product wraps around in int64, but its low 64
    bits are right as two's complement, so shifting and masking still yields both halves.
    """
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    c0, c1 = counter & _MASK32, (counter >> 32) & _MASK32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        product0, product1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _PHILOX_W0) & _MASK32, (k1 + _PHILOX_W1) & _MASK32
    return c0


def dropout_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The keep-mask of dropout: a pure function of the seed and the element's position.

    Element ``(i, j)`` is kept iff the first word of Philox4x32-10 with key ``seed`` and counter
    ``i * columns + j`` (64 bit) is at least ``floor(p * 2**32)``: an integer comparison, so that
    every backend and tile size draws the same bits. Where the matrix is a block of columns of a
    wider one, its counters are those of the wider one, ``first + i * stride + j``.

    Args:
        seed: int64 tensor: ``[key]``, or ``[key, first, stride]`` for a block of columns (see
            :func:`column_block_seed`).
        rows: rows of the flattened input.
        columns: its columns (``in_features``).
        p: probability of dropping an element, 0 <= p < 1.

    Returns:
        bool tensor ``[rows, columns]``, true where the element is kept.
    """
    row = torch.arange(rows, device=seed.device, dtype=torch.int64).unsqueeze(1)
    column = torch.arange(columns, device=seed.device, dtype=torch.int64)
    if seed.numel() == 1:
        key, counter = seed.reshape(()), row * columns + column
    else:
        key, first, stride = seed.unbind()
        counter = first + row * stride + column
    return _philox_first_word(key, counter) >= int(p * 2**32)


def column_block_seed(key: Tensor, first_column: int, columns: int) -> Tensor:
    """The seed that draws, for columns ``first_column`` on, what ``key`` draws for the whole.

    Args:
        key: int64 ``[1]``, the seed of the whole matrix.
        first_column: where the block begins.
        columns: width of the whole matrix.

    Returns:
        int64 ``[3]``: key, counter of the block's first element, counters from row to row.
    """
    # Filled, not copied from the host: a CUDA graph can capture it.
    place = [key.new_full((1,), first_column), key.new_full((1,), columns)]
    return torch.cat([key, *place])


def mask_side_path(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """``m * x / (1 - p)``; ``x`` itself without dropout."""
    if seed is None or p == 0.0:
        return x
    keep = dropout_mask(seed, x.shape[0], x.shape[1], p)
    return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0).to(x.dtype)


# ---------------------------------------------------------------------------------- the core


def _row_chunks(rows: int, rank: int) -> list[slice]:
    step = max(1, _GATHERED_NUMBERS // (rank * rank))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)] or [slice(0, 0)]


def apply_core(q: Tensor, R: Tensor, ids: Tensor | None, *, transpose: bool) -> Tensor:
    """``q R^T`` (``transpose``) or ``q R``, with one core or one per row; in R's precision.

    Args:
        q: ``[M, r]``.
        R: ``[r, r]``, or ``[n, r, r]`` with ``ids``.
        ids: int64 ``[M]``; a row with id -1 yields zeros.
        transpose: forward (``R^T``) or backward (``R``).

    Returns:
        ``[M, r]`` in ``q``'s dtype.
    """
    wide = q.to(torch.promote_types(q.dtype, R.dtype))
    R = R.to(wide.dtype)
    if ids is None:
        return (wide @ (R.mT if transpose else R)).to(q.dtype)
    if R.shape[0] == 0:
        return torch.zeros_like(q)
    parts = []
    for rows in _row_chunks(q.shape[0], R.shape[-1]):
        cores = R.index_select(0, ids[rows].clamp(min=0))
        product = torch.bmm(wide[rows].unsqueeze(1), cores.mT if transpose else cores).squeeze(1)
        parts.append(torch.where(ids[rows].unsqueeze(1) >= 0, product, 0.0))
    return torch.cat(parts).to(q.dtype)


def core_gradient(p: Tensor, q: Tensor, R: Tensor, ids: Tensor | None) -> Tensor:
    """``p^T q`` over all rows or per adapter, in at least fp32; shape and dtype of ``R``."""
    wide = torch.promote_types(torch.promote_types(p.dtype, R.dtype), torch.float32)
    p, q = p.to(wide), q.to(wide)
    if ids is None:
        return (p.mT @ q).to(R.dtype)
    # One more slot than there are adapters: the rows without an adapter add to the last one.
    n, r = R.shape[0], R.shape[-1]
    slots = torch.where(ids >= 0, ids, n)
    total = torch.zeros(n + 1, r, r, dtype=wide, device=p.device)
    for rows in _row_chunks(p.shape[0], r):
        total = total.index_add(0, slots[rows], p[rows].unsqueeze(2) * q[rows].unsqueeze(1))
    return total[:n].to(R.dtype)


# ---------------------------------------------------------------------------------- forward


def shrink(x: Tensor, A: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """``q = (m * x / (1 - p)) A^T``, ``[M, r]`` in ``x``'s dtype."""
    return mask_side_path(x, seed, dropout_p) @ A.to(x.dtype).mT


def expand(q: Tensor, R: Tensor, B: Tensor, ids: Tensor | None, scaling: float) -> Tensor:
    """``s * (q R^T) B^T``, ``[M, N]`` in ``q``'s dtype."""
    return scaling * (apply_core(q, R, ids, transpose=True) @ B.to(q.dtype).mT)


def forward(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    scaling: float,
    dropout_p: float,
    prepack: int,
) -> tuple[Tensor, Tensor]:
    """``(y [M, N], q [M, r])``; arguments as in :func:`loraxs_kernels.ops.forward`."""
    if weight is not None:
        base = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    assert base is not None
    q = shrink(x, A, seed, dropout_p)
    return base.to(x.dtype) + expand(q, R, B, ids, scaling), q


def backward(
    grad_y: Tensor,
    q: Tensor,
    weight: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    seed: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    need_dR: bool,
    need_db: bool,
    prepack: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx [M, K], dR like R, db [N])``; what is not needed is an empty tensor."""
    dtype = grad_y.dtype
    P = grad_y @ B.to(dtype)
    dx, dR, db = grad_y.new_empty(0), R.new_empty(0), grad_y.new_empty(0)
    if need_dx:
        t = apply_core(P, R, ids, transpose=False)
        dx = scaling * mask_side_path(t @ A.to(dtype), seed, dropout_p)
        if weight is not None:
            dx = grad_y @ weight.to(dtype) + dx
    if need_dR:
        dR = scaling * core_gradient(P, q, R, ids)
    if need_db:
        db = grad_y.sum(0)
    return dx, dR, db
