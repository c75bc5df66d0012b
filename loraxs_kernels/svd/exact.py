"""The two methods that see the whole spectrum: eigenvalues of the Gram matrix, and LAPACK."""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import eigh, small_svd
from .finish import triplets
from .passes import Passes

Triplets = tuple[Tensor, Tensor, Tensor]


def gram(passes: Passes, rank: int) -> tuple[Triplets, Tensor]:
    """All eigenvalues of ``aᵀa``, then one Rayleigh-Ritz step on W.

    Exact up to rounding of size eps · s₁² in the squares: singular values below sqrt(eps) · s₁ are
    noise, so the caller must use fp64 where those matter.

    Returns:
        the triplets of ``finish.triplets``, and s₁² … s_{r+1}² as ``[..., r + 1]`` fp64.
    """
    values, vectors = eigh(passes.gram_matrix())
    values = values.flip(-1).clamp_min(0).double()
    found = triplets(passes, vectors[..., -rank:].flip(-1).mT)
    return found, _leading(values, rank)


def lapack(a: Tensor, rank: int) -> tuple[Triplets, Tensor]:
    """Full SVD in fp64 by LAPACK (cuSOLVER on a GPU): small singular values to eps · s₁.

    Args and returns: as ``gram``, for ``a [..., m, n]`` with m ≥ n.
    """
    q, upper = torch.linalg.qr(a.double())
    left, s, right = small_svd(upper)
    u = (q @ left[..., :rank]).mT
    v = right[..., :rank, :].contiguous()
    return (u, s[..., :rank], v), _leading(s.square(), rank)


def _leading(values: Tensor, rank: int) -> Tensor:
    """The first ``rank + 1`` values; a zero stands for the one beyond the end."""
    values = values[..., : rank + 1]
    return torch.nn.functional.pad(values, (0, rank + 1 - values.shape[-1]))
