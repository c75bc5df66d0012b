"""Matrices with known spectra, and what a result is measured by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraxs_kernels.svd import SVDResult

SPECTRA = (
    "slow power law",
    "power law",
    "spikes on noise",
    "clusters",
    "low rank + noise",
    "rank-deficient",
    "exponential",
    "flat",
)

# LAPACK's own error in s², relative to s₁²: what the truth below is worth.
TRUTH = 1e-12


def spectrum(kind: str, k: int, generator: torch.Generator) -> Tensor:
    """k singular values (fp64) of a kind that weights, gradients or adversaries have."""
    i = torch.arange(1, k + 1, dtype=torch.float64)
    if kind == "slow power law":  # pretrained weights: exponent 0.1 to 0.5
        return i**-0.3
    if kind == "power law":
        return 1.0 / i
    if kind == "spikes on noise":  # a Marchenko-Pastur bulk (of a square matrix) and outliers
        bulk = 2 * (1 - (i - 0.5) / k).sqrt()
        return bulk + torch.where(i <= 5, 3.0 / i, torch.zeros_like(i))
    if kind == "clusters":
        return torch.ceil((k - i + 1) / 7) / k + 1e-7 * torch.rand(
            k, dtype=torch.float64, generator=generator
        )
    if kind == "low rank + noise":
        return torch.where(i <= 6, 4.0 / i, 1e-3 * torch.ones_like(i))
    if kind == "rank-deficient":
        return torch.where(i <= max(1, k // 3), 1.0 / i.sqrt(), torch.zeros_like(i))
    if kind == "exponential":
        return torch.exp(-i / 6)
    if kind == "flat":
        return torch.ones_like(i)
    raise ValueError(kind)


def with_spectrum(m: int, n: int, s: Tensor, generator: torch.Generator) -> Tensor:
    """A random ``[m, n]`` fp64 matrix with singular values ``s [min(m, n)]``."""
    k = min(m, n)
    left = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))[0]
    return (left * s) @ right.T


@dataclass(frozen=True)
class Quality:
    """How good a result is, against the truth in fp64."""

    pve: float  # relative per-vector error, the worse of the two sides
    slack: float  # what of pve the truth's own error may explain
    values: float  # worst error of a singular value, relative to s_1
    orthogonality: float  # worst entry of UᵀU − I and of V Vᵀ − I


def quality(matrix: Tensor, result: SVDResult) -> Quality:
    w = matrix.detach().double()
    scale = float(w.abs().max()) or 1.0
    w = w / scale
    u, v = result.U.double(), result.Vh.double()
    rank = v.shape[0]
    exact = torch.linalg.svdvals(w)
    squares = exact**2
    following = float(squares[rank]) if rank < len(squares) else 0.0
    eps = torch.finfo(result.S.dtype).eps
    denominator = max(following, eps * float(squares[0])) or 1.0
    unit_u = u / u.norm(dim=0)
    unit_v = v / v.norm(dim=1, keepdim=True)
    right = (w @ unit_v.T).square().sum(0) - squares[:rank]
    left = (unit_u.T @ w).square().sum(1) - squares[:rank]
    eye = torch.eye(rank, dtype=torch.float64)
    return Quality(
        pve=float(torch.maximum(right.abs(), left.abs()).max()) / denominator,
        slack=TRUTH * float(squares[0]) / denominator,
        values=float((result.S.double() / scale - exact[:rank]).abs().max())
        / (float(exact[0]) or 1.0),
        orthogonality=max(float((u.T @ u - eye).abs().max()), float((v @ v.T - eye).abs().max())),
    )


def assert_good(matrix: Tensor, result: SVDResult, tol: float) -> None:
    """Everything that a result with ``error ≤ tol`` promises."""
    q = quality(matrix, result)
    double = result.S.dtype is torch.float64
    assert result.error <= tol
    assert q.pve <= result.error + q.slack
    # |ŝ² − s²| ≤ error · s_{r+1}² ≤ error · s², and the working precision.
    assert q.values <= tol + (1e-12 if double else 2e-6)
    assert q.orthogonality <= (1e-12 if double else 2e-6)
    assert bool((result.S[:-1] >= result.S[1:]).all()) and bool((result.S >= 0).all())


def random_case(seed: int, largest: int = 320) -> tuple[Tensor, int, str]:
    """A matrix (fp64), a rank and the kind of spectrum, all from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    kind = SPECTRA[draw(0, len(SPECTRA) - 1)]
    m, n = draw(2, largest), draw(2, largest)
    k = min(m, n)
    rank = min(k, max(1, round(math.exp(draw(0, 100) / 100 * math.log(max(2, k // 4))))))
    return with_spectrum(m, n, spectrum(kind, k, generator), generator), rank, kind
