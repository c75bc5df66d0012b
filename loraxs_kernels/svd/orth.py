"""Orthonormal rows: deflation, Cholesky QR, and the slow safe way for deficient blocks."""

from __future__ import annotations

import torch
from torch import Tensor

# Cholesky QR of a block with condition number c, with the Gram matrix in fp64, leaves rows that
# are orthonormal to c · eps(dtype): beyond this ratio of the pivots the safe way takes over.
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


def pivots_sound(info: Tensor, pivots: Tensor, floor: Tensor | float) -> Tensor:
    """Which blocks of a Cholesky QR can be used (bool, one per matrix): no breakdown, pivots that
    do not spread, and a size above ``floor``, below which a block is rounding noise."""
    if pivots.dim() == 1 and not pivots.is_cuda:
        # A dozen numbers at hand: plain Python is several times faster than tensor operations.
        values = pivots.tolist()
        lowest, highest = min(values), max(values)
        sound = int(info) == 0 and lowest > _PIVOT_RATIO * highest and lowest > floor
        return torch.tensor(bool(sound))
    low, high = torch.aminmax(pivots, dim=-1)
    # Comparisons with NaN are false, so a failed factorization never counts as sound.
    return (info == 0) & (low > _PIVOT_RATIO * high) & (low > floor)


def orthonormal_rows(y: Tensor) -> Tensor:
    """Orthonormal rows that span ``y [..., k, n]`` (k ≤ n); a deficient y is completed.

    Cholesky QR where the rows allow it, Householder QR where they do not.
    """
    _, q, info, pivots = cholesky_rows(y)
    if bool(pivots_sound(info, pivots, 0.0).all()):
        return q.to(y.dtype)
    return torch.linalg.qr(y.double().mT)[0].mT.to(y.dtype).contiguous()


def complete_block(
    y: Tensor, basis: Tensor, floor: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The safe way for one deficient block: keep what is there, draw the rest anew.

    Args:
        y: ``[k, n]``, already deflated against ``basis [K, n]``; k + K ≤ n.
        floor: rows below this norm are rounding noise, not directions.

    Returns:
        ``L [k, k]`` (fp64) with ``y ≈ L q``, and ``q [k, n]`` with orthonormal rows, orthogonal to
        the basis. Directions of y below the floor are replaced by random ones.
    """
    count, n = y.shape
    wide, basis = y.double(), basis.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    norms = values.clamp_min(0).sqrt()
    # What eigh of the Gram matrix can still tell apart is 1e-8 of the largest direction; deflated
    # again below, rows far above that are clean.
    keep = norms > max(floor, 1e-6 * float(norms[-1]))
    kept = (vectors.mT @ wide)[keep] / norms[keep, None]
    fresh = torch.randn(
        count - kept.shape[0], n, dtype=torch.float64, device=y.device, generator=generator
    )
    q = torch.cat([kept, fresh])
    for _ in range(2):
        q, _ = deflate(q, basis)
        q = torch.linalg.qr(q.mT)[0].mT
    return wide @ q.mT, q
