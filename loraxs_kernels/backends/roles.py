"""Operands put into the roles of the fused kernels, which both GPU backends launch.

    forward    D = X W^T + b + s ((X A^T) R^T) B^T        X: the input
    backward   D = G W + s ((G B) R) A, dR = s P^T Q      the same kernel with the roles swapped

Extra copies are made only of what the kernels cannot take: an input whose rows are not contiguous,
and operands in another dtype than x (under autocast), which are remembered for frozen matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraxs_kernels.backends import flags, packing, reference


@dataclass
class Operands:
    """One pass in the roles of the kernels; ``None`` for what it does not have."""

    x: Tensor  # [M, K]
    a: Tensor  # [r, K]
    core: Tensor  # [r, r] or [n, r, r]: element (l, j) multiplies Q[:, l] into T[:, j]
    b: Tensor  # [N, r]
    scaling: float
    dropout_p: float = 0.0
    mask_output: bool = False  # dropout masks the side's part of D (backward), not X (forward)
    w: Tensor | None = None  # [N, K]
    base: Tensor | None = None  # [M, N]
    bias: Tensor | None = None  # [N]
    d: Tensor | None = None  # [M, N], written
    side: Tensor | None = None  # [M, r], written: the forward's q; the backward's P is scratch
    q: Tensor | None = None  # [M, r]: the forward's q, for dR
    dR: Tensor | None = None  # like R, written
    db: Tensor | None = None  # [K], written
    seed: Tensor | None = None  # int64 [1], or [3] for a block of columns
    ids: Tensor | None = None  # int64 [M]
    order: Tensor | None = None  # int64 [M]
    offsets: Tensor | None = None  # int64 [n + 2]


Launch = Callable[[Operands], None]


def kind_of(o: Operands) -> tuple[Any, ...]:
    """All that a prepared launch depends on, besides addresses and the scaling."""
    inputs = (
        o.x, o.w, o.base, o.a, o.core, o.b, o.bias, o.d, o.side, o.q, o.dR, o.db, o.seed, o.ids,
        o.order, o.offsets,
    )  # fmt: skip
    return (
        o.x.device, o.x.dtype, o.core.dtype, o.x.shape, o.b.shape, o.core.shape, o.dropout_p > 0.0,
        o.mask_output, None if o.seed is None else o.seed.shape,
        tuple([None if t is None else (t.stride(), t.data_ptr() % 16 == 0) for t in inputs]),
    )  # fmt: skip


def rows(x: Tensor) -> Tensor:
    """x with contiguous rows that do not overlap: the one layout that is copied if it comes
    otherwise."""
    inner = x.stride(1) == 1 or x.shape[1] == 1
    apart = x.stride(0) >= x.shape[1] or x.shape[0] == 1
    return x if inner and apart else x.contiguous()


def _operand(t: Tensor, dtype: torch.dtype, prepack: int) -> Tensor:
    return t if t.dtype == dtype else packing.dense(t, "dense", dtype, prepack)


def _core(R: Tensor, dtype: torch.dtype) -> Tensor:
    return R if R.dtype in (torch.float32, dtype) else R.to(torch.float32)


def _is_degenerate(x: Tensor, B: Tensor) -> bool:
    # Nothing to multiply: empty sums, which need no kernel.
    return x.shape[0] == 0 or x.shape[1] == 0 or B.shape[0] == 0


def forward(
    launch: Launch,
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
    """``(y [M, N], q [M, r])`` by one launch; arguments as in :func:`loraxs_kernels.ops.forward`.

    Raises:
        ValueError: an earlier launch met an adapter id out of range.
    """
    flags.raise_bad_ids()
    if _is_degenerate(x, B):
        return reference.forward(
            x, weight, base, A, R, B, bias, seed, ids, order, offsets, scaling, dropout_p, prepack
        )
    dtype = x.dtype
    y, q = x.new_empty(x.shape[0], B.shape[0]), x.new_empty(x.shape[0], A.shape[0])
    launch(
        Operands(
            x=rows(x),
            w=None if weight is None else _operand(weight, dtype, prepack),
            base=None if base is None else base.to(dtype),
            a=_operand(A, dtype, prepack),
            core=_core(R, dtype).mT,
            b=_operand(B, dtype, prepack),
            bias=None if weight is None else bias,
            d=y,
            side=q,
            seed=seed,
            ids=ids,
            order=order,
            offsets=offsets,
            scaling=scaling,
            dropout_p=dropout_p,
        )
    )
    return y, q


def backward(
    launch: Launch,
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
    *,
    zero_dR: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx [M, K], dR like R, db [N])`` by one launch; what is not needed is an empty tensor.

    Arguments as in :func:`loraxs_kernels.ops.backward`. ``zero_dR``: the launch adds to dR, which
    therefore starts as zeros.

    Raises:
        ValueError: an earlier launch met an adapter id out of range.
    """
    flags.raise_bad_ids()
    if _is_degenerate(grad_y, A.mT):
        return reference.backward(
            grad_y, q, weight, A, R, B, seed, ids, order, offsets,
            scaling, dropout_p, need_dx, need_dR, need_db, prepack,
        )  # fmt: skip
    dtype = grad_y.dtype
    dx = grad_y.new_empty((grad_y.shape[0], A.shape[1]) if need_dx else 0)
    make = torch.zeros if zero_dR else torch.empty
    dR = make(R.shape if need_dR else 0, dtype=R.dtype, device=R.device)
    db = grad_y.new_empty(B.shape[0] if need_db else 0)
    if not (need_dx or need_dR or need_db):
        return dx, dR, db
    launch(
        Operands(
            x=rows(grad_y),
            w=_operand(weight, dtype, prepack).mT if weight is not None and need_dx else None,
            a=_operand(B, dtype, prepack).mT,
            core=_core(R, dtype),
            b=_operand(A, dtype, prepack).mT,
            d=dx if need_dx else None,
            q=rows(q) if need_dR else None,
            dR=dR if need_dR else None,
            db=db if need_db else None,
            seed=seed,
            ids=ids,
            order=order,
            offsets=offsets,
            scaling=scaling,
            dropout_p=dropout_p,
            mask_output=True,
        )
    )
    return dx, dR, db
