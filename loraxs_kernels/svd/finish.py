"""From a subspace to singular triplets: one Rayleigh-Ritz step on W itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import eigh, small_svd
from .orth import orthonormal_rows
from .passes import Passes


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
    values, y = eigh(z @ z.mT)
    # With the small Gram matrix in fp64 the left vectors are orthonormal to eps(fp64) · (s₁/s_r)²,
    # so a wide range of s takes the way through QR.
    range_squared = 1e-4 if passes.a.dtype is torch.float32 else 1e-2
    if bool((values[..., 0] > range_squared * values[..., -1]).all()):
        y = y.flip(-1).mT
        s = values.flip(-1).sqrt()
        return (y @ z) / s[..., None], s, y @ v
    q, upper = torch.linalg.qr(z.mT)
    left, s, right = small_svd(upper)
    return (q @ left).mT, s, right @ v
