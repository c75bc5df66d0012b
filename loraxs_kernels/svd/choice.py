"""Which method runs: one function, nothing else decides."""

from __future__ import annotations

import torch

METHODS = ("gram", "krylov", "gram-krylov", "chebyshev", "lapack")


def choose_method(
    m: int, n: int, rank: int, device: torch.device, dtype: torch.dtype, tol: float
) -> str:
    """The method for an m × n matrix, from measurements on pretrained weights.

    Args:
        m, n: the shape; the order does not matter.
        dtype: the working dtype, fp32 or fp64.
        tol: the demanded bound on the per-vector error.
    """
    short, tall = min(m, n), max(m, n)
    # Rounding alone would break such a demand on an iterative method.
    exact = tol < 64 * torch.finfo(dtype).eps
    if exact or short <= 192 or short <= 9 * rank:
        # A Krylov basis would be half of the space: the whole spectrum costs no more.
        return "gram"
    if rank >= 256:
        # Orthogonalising a Krylov basis of thousands of vectors costs more than fat products.
        return "chebyshev"
    if _gram_pays(tall, short, rank):
        return "gram-krylov"
    return "krylov"


def _gram_pays(m: int, n: int, rank: int) -> bool:
    """Whether forming the n × n Gram matrix of an m × n matrix costs less than it saves.

    It costs about m n² FLOPs (one triangle) and turns the 4 m n of each later row into 2 n². About
    200 + 4r rows are multiplied until the default tolerance is met. Checked on 1536 × 576 (pays at
    r = 16) and 576 × 576 (does not).
    """
    rows_to_break_even = 0.95 * n / (4 - 2 * n / m)
    return rows_to_break_even <= 200 + 4 * rank


def krylov_cap(n: int, rank: int) -> int:
    """The most Krylov vectors before the whole spectrum is the better way."""
    return min(n // 2, max(12 * rank, 640))
