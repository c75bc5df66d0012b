"""From a subspace to singular triplets: one Rayleigh-Ritz step on W itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .orth import orthonormal_rows
from .passes import Passes


def small_svd(square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of a small finite fp64 matrix; LAPACK's rare failure to converge is worked around."""
    try:
        return torch.linalg.svd(square, full_matrices=False)
    except torch.linalg.LinAlgError:
        # The QR iteration fails for a few matrices in a million; a change of basis moves it off
        # the bad path, and eigh has a different algorithm altogether.
        _, right = torch.linalg.eigh(square.mT @ square)
        right = right.flip(-1)
        q, upper = torch.linalg.qr(square @ right)
        s = upper.diagonal(dim1=-2, dim2=-1)
        return q * torch.sign(s + 0.5 * (s == 0))[..., None, :], s.abs(), right.mT


def triplets(passes: Passes, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of ``a`` within the row space of ``v``.

    Args:
        passes: products with ``a [..., m, n]``.
        v: ``[..., r, n]``, rows that span the wanted right space; need not be orthonormal.

    Returns:
        ``u [..., r, m]``, ``s [..., r]`` descending, ``v [..., r, n]`` as rows, in fp64; u and v
        have orthonormal rows (to the precision of v's dtype), also where s is zero.
    """
    v = orthonormal_rows(v)
    z = passes.forward(v).double()
    v = v.double()
    values, y = torch.linalg.eigh(z @ z.mT)
    # The small Gram matrix is in fp64, the products have the working dtype's error: left vectors
    # are orthonormal to eps · s₁ / s_r, so a wide range of s takes the way through QR.
    range_squared = 1e-4 if passes.a.dtype is torch.float32 else 1e-10
    if bool((values[..., 0] > range_squared * values[..., -1]).all()):
        y = y.flip(-1).mT
        s = values.flip(-1).sqrt()
        return (y @ z) / s[..., None], s, y @ v
    q, upper = torch.linalg.qr(z.mT)
    left, s, right = small_svd(upper)
    return (q @ left).mT, s, right @ v
