"""What randomized_svd returns, and the sign rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SVDResult:
    """The top ``r`` singular triplets of a matrix ``[m, n]`` (or of each of a stack ``[L, m, n]``).

    Iterating gives ``U, S, Vh, error``.

    Attributes:
        U: ``[m, r]`` left vectors as orthonormal columns; compact, no view into anything.
        S: ``[r]`` singular values, descending.
        Vh: ``[r, n]`` right vectors as orthonormal rows.
        error: bound on the relative per-vector error
            ``max over i of max(|s_i² − ‖W v_i‖²|, |s_i² − ‖Wᵀ u_i‖²|) / max(s_{r+1}², eps · s_1²)``
            with ``s`` the exact singular values and ``u_i``, ``v_i`` scaled to length 1 (stored in
            fp32 their lengths are off by up to 1e-7); for a stack, the worst of ``errors``.
        method: the method that produced the result.
        failure_probability: bound on the probability, over the seed, that one of ``errors`` is too
            small; 0 for the exact methods, whose bound is on rounding alone.
        iterations: blocks or rounds used (0 for the exact methods).
        passes: products with W or Wᵀ, in units of r vectors.
        errors: the bound of each matrix of a stack; one entry for a single matrix.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: float
    method: str = ""
    failure_probability: float = 0.0
    iterations: int = 0
    passes: float = 0.0
    errors: tuple[float, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.U, self.S, self.Vh, self.error))


def apply_sign_rule(u: Tensor, v: Tensor, sign: str | None) -> tuple[Tensor, Tensor]:
    """Flip rows ``u [..., r, m]`` and ``v [..., r, n]`` together: the first entry of largest
    magnitude of each row of u (``"u"``) or of v (``"v"``) becomes positive; None leaves them."""
    if sign is None:
        return u, v
    rows = u if sign == "u" else v
    largest = rows.abs().argmax(dim=-1, keepdim=True)
    # copysign and not sign: a zero entry must not wipe out a vector.
    flip = torch.copysign(torch.ones((), dtype=u.dtype, device=u.device), rows.gather(-1, largest))
    return u * flip, v * flip
