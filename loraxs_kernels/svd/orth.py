"""Orthonormal rows: deflation, Cholesky QR, and the slow safe way for deficient blocks."""

from __future__ import annotations

import torch
from torch import Tensor

# Cholesky QR of a block with condition number c multiplies what is left in it of the basis by c:
# below the first ratio of its pivots a block is deflated and factored once more, below the second
# the safe way takes over.
AGAIN_RATIO = 0.05
_PIVOT_RATIO = 1e-3


def subtract_product(y: Tensor, c: Tensor, v: Tensor) -> Tensor:
    """``y − c v`` in one call."""
    if y.dim() == 2:
        return torch.addmm(y, c, v, alpha=-1)
    return torch.baddbmm(y, c, v, alpha=-1)


def deflate(y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Remove from rows ``y [..., k, n]`` their part in the orthonormal rows ``basis [..., K, n]``.

    Done twice. Once is not enough: after one projection the remainder keeps a part of relative
    size eps · ‖y before‖ / ‖y after‖ in the basis, and a Krylov basis amplifies it until converged
    vectors come back as copies (measured: singular values 44 % off).

    Returns:
        the remainder ``[..., k, n]`` and the coefficients ``[..., k, K]``.
    """
    transposed = basis.mT
    first = y @ transposed
    y = subtract_product(y, first, basis)
    second = y @ transposed
    return subtract_product(y, second, basis), first.add_(second)


def cholesky_rows(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cholesky QR by rows: ``y = L q``, ``q`` with orthonormal rows, Gram matrix in fp64.

    Returns:
        ``L [..., k, k]`` (lower), ``q [..., k, n]``, both fp64, LAPACK's info, and the pivots (the
        diagonal of L). Where info is not 0 or the pivots spread, q is not usable.
    """
    wide = y.double()
    factor, info = torch.linalg.cholesky_ex(wide @ wide.mT)
    q = torch.linalg.solve_triangular(factor, wide, upper=False)
    return factor, q, info, factor.diagonal(dim1=-2, dim2=-1)


def pivot_range(info: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest pivot of each block ``[...]`` (fp64, on the CPU for a single block);
    the smallest is 0 where the factorization broke down."""
    if pivots.dim() == 1:
        # A dozen numbers: plain Python is several times faster than tensor operations.
        values = pivots.tolist()
        lowest = min(values) if int(info) == 0 else 0.0
        ends = torch.tensor([lowest, max(values)], dtype=torch.float64, device="cpu")
        return ends[0], ends[1]
    low, high = torch.aminmax(pivots, dim=-1)
    return torch.where(info == 0, low, 0.0), high


def sound(low: Tensor, high: Tensor, floor: Tensor | float) -> Tensor:
    """Which blocks of a Cholesky QR can be used: pivots that do not spread too far, and a size
    above ``floor``, below which a block is rounding noise. NaN never counts as sound."""
    return (low > _PIVOT_RATIO * high) & (low > floor)


def orthonormal_rows(y: Tensor) -> Tensor:
    """Orthonormal rows that span ``y [..., k, n]`` (k ≤ n); a deficient y is completed.

    Cholesky QR where the rows allow it, Householder QR where they do not.
    """
    if y.dtype is torch.float64:
        # The Gram matrix has no wider dtype here: Cholesky QR would lose the condition's square.
        return torch.linalg.qr(y.mT)[0].mT.contiguous()
    _, q, info, pivots = cholesky_rows(y)
    if bool(sound(*pivot_range(info, pivots), 0.0).all()):
        return q.to(y.dtype)
    return torch.linalg.qr(y.double().mT)[0].mT.to(y.dtype).contiguous()


def complete_block(
    y: Tensor, basis: Tensor, floor: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The safe way for one deficient block: keep all that is there, draw the rest anew.

    By Householder QR, which loses nothing above rounding: directions a million times smaller than
    the largest may be just the wanted ones.

    Args:
        y: ``[k, n]``, already deflated against ``basis [K, n]``; k + K ≤ n.
        floor: what is below this norm is rounding noise, not a direction.

    Returns:
        ``L [k, k]`` (fp64) with ``y = L q`` up to the floor, and ``q [k, n]`` (fp64) with
        orthonormal rows, orthogonal to the basis. Where y has no direction left, q has random ones.
    """
    wide, basis = y.double(), basis.double()
    q, upper = torch.linalg.qr(wide.mT)
    q = q.mT.contiguous()
    empty = upper.diagonal().abs() <= floor
    for _ in range(3):
        fresh = torch.randn(q.shape, dtype=q.dtype, device=q.device, generator=generator)
        q, _ = deflate(torch.where(empty[:, None], fresh, q), basis)
        # A row of which little is left was in the basis already.
        empty = torch.linalg.vector_norm(q, dim=-1) < 0.5
        q = torch.linalg.qr(q.mT)[0].mT.contiguous()
    return wide @ q.mT, q
