"""Chebyshev-filtered subspace iteration: for large ranks, where everything is a fat product.

A round takes the l Ritz vectors, damps what lies below the smallest Ritz value by a Chebyshev
polynomial of G, and does a Rayleigh-Ritz step. The product of that step is also the first power of
the next filter and gives the residual, so nothing is multiplied twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .certificate import Probes, error_denominator, first_order_error, truncation_error
from .dense import eigh
from .krylov import Subspace
from .orth import deflate, orthonormal_rows
from .passes import Passes

_DEGREES = (2, 4)  # of the first rounds; later rounds repeat the last one
_ROUNDS = 24
_SHARE = 0.5  # of the tolerance; the rest is left to rounding
_PROBE_STEPS = 32


def _filtered(passes: Passes, x: Tensor, gx: Tensor, theta: Tensor, degree: int) -> Tensor:
    """Rows ``p(G) x`` with p the Chebyshev polynomial of [0, θ_l], by the scaled three-term
    recurrence (Zhou & Saad 2007): the value at θ₁ is kept at 1, so nothing overflows."""
    centre = 0.5 * float(theta[-1])
    top = float(theta[0])
    if centre <= 0.0 or top <= centre:
        return gx
    sigma_first = sigma = centre / (top - centre)
    before, now = x, (gx - centre * x) * (sigma_first / centre)
    for _ in range(degree - 1):
        sigma_next = 1.0 / (2.0 / sigma_first - sigma)
        product = passes.gram(now.contiguous()).sub_(now, alpha=centre)
        after = product.mul_(2.0 * sigma_next / centre).sub_(before, alpha=sigma * sigma_next)
        before, now, sigma = now, after, sigma_next
    return now


def _outside(
    passes: Passes, x: Tensor, theta_r: float, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Bound on the eigenvalues outside the rows ``x``: fresh probes, as many steps as it takes to
    come clearly below the last wanted Ritz value. And how often it was looked at."""
    probes = Probes.draw(x, generator)
    mu, looks = x.new_full((), float("inf"), dtype=torch.float64), 0
    for step in range(1, _PROBE_STEPS + 1):
        # Here the basis is no Krylov space, so the probes are projected before the product too.
        probes.rows = deflate(probes.rows, x)[0]
        probes.advance(deflate(passes.gram(probes.rows), x)[0])
        if step % 4 == 0:
            mu, looks = torch.minimum(mu, probes.outside_norm(x)), looks + 1
            if float(mu) < 0.97 * theta_r:
                break
    return mu, looks


def chebyshev(
    passes: Passes,
    rank: int,
    *,
    tol: float,
    max_iter: int | None,
    oversample: int | None,
    eps: float,
    generator: torch.Generator,
) -> Subspace:
    """Filter a subspace of ``rank + oversample`` rows (default: half the rank) until the bound on
    the per-vector error is at most ``tol``, or ``max_iter`` rounds are done.

    Cost per round of degree d: 2 d passes of l vectors, about 8 l² n FLOPs, an l × l eigenproblem.
    """
    n = passes.shape[1]
    columns = min(n, rank + (max(8, rank // 2) if oversample is None else max(1, oversample)))
    x = torch.randn(columns, n, dtype=passes.a.dtype, device=passes.a.device, generator=generator)
    x = orthonormal_rows(passes.gram(x))
    rounds = _ROUNDS if max_iter is None else max(1, max_iter)
    looks = 0
    for round_number in range(rounds + 1):
        gx = passes.gram(x)
        theta, y = eigh(0.5 * (gx @ x.mT + x @ gx.mT))
        theta, y = theta.flip(-1).double(), y.flip(-1)
        x, gx = y.mT @ x, y.mT @ gx
        residual = gx - theta[:, None].to(gx.dtype) * x
        norms = torch.linalg.vector_norm(residual[:rank], dim=-1)
        # Nothing follows the last value of the whole space.
        top = torch.nn.functional.pad(theta[: rank + 1], (0, max(0, rank + 1 - columns)))
        denominator = error_denominator(top[0], top[rank], eps)
        last = round_number == rounds
        # The smallest Ritz value stands in for what is outside: a test that costs nothing.
        hopeful = first_order_error(theta, norms, theta[-1], rank, denominator)
        if last or float(hopeful) <= tol * _SHARE:
            mu, new_looks = _outside(passes, x, float(theta[rank - 1]), generator)
            looks += new_looks
            target = torch.full_like(denominator, tol * _SHARE)
            error = truncation_error(
                theta, _coupling(residual, x), norms, mu, rank, denominator, target, final=last
            )
            converged = float(error) <= float(target) * (1 + 1e-9)
            if last or converged:
                return Subspace(x[:rank], top, error, round_number, looks)
        degree = _DEGREES[min(round_number, len(_DEGREES) - 1)]
        x = orthonormal_rows(_filtered(passes, x, gx, theta, degree))
    raise RuntimeError("unreachable: the last round returns")


def _coupling(residual: Tensor, x: Tensor) -> Tensor:
    """A square S with S Sᵀ = the Gram matrix of the residual rows outside the basis."""
    outside = deflate(residual, x)[0].double()
    values, vectors = eigh(outside @ outside.mT)
    return vectors * values.clamp_min(0).sqrt()
