"""How wrong a result can be, from what the method has seen anyway.

Notation: G = AᵀA with eigenvalues λ₁ ≥ λ₂ ≥ … = sᵢ²; a basis V (K orthonormal rows) with Ritz
values θ₁ ≥ … and G V ᵀ = Vᵀ T + residual, the residual having rows S (in Ritz coordinates, K × b).

Two things can go wrong: the found vectors have not converged (their residual shows it), or a whole
direction was missed (no residual can show that). The second needs a bound μ on the largest
eigenvalue of G outside the basis. With it, Haynsworth's inertia formula gives, for every i with
θᵢ > μ (Parlett, The Symmetric Eigenvalue Problem, ch. 10-11, has the ideas),

    θᵢ ≤ λᵢ ≤ λᵢ(diag(θ) + S Sᵀ / (θ_r − μ)),

an upper bound that is quadratic in the residual and divided by a gap to what lies outside the
*whole* basis, not by the tiny gap between s_r and s_{r+1}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .dense import eigvalsh
from .orth import deflate

# With p Gaussian probes ω and any fixed unit vector x, Σ⟨ω, x⟩² is χ² with p degrees of freedom.
# Below this quantile of it lies a probability of 1e-3: that is the failure probability of one look
# at the bound. A method that looks again and again, and stops when it likes what it sees, adds one
# such probability for each look (the union bound).
PROBES = 8
FAILURE_PROBABILITY = 1e-3
_CHI2_QUANTILE = 0.8571  # χ²₈ at 0.001

# Rounding perturbs G by this many eps · λ₁: products, coefficients and the small eigenproblem
# together. Thousands of spectra, clusters as tight as rounding among them, stay below (tests).
_ROUNDING_UNITS = 12.0

_LEVELS = 4  # of the error, tried in steps of 8


@dataclass
class Probes:
    """Random rows that no method has seen, multiplied by G again and again and kept outside V.

    ``rows`` is, up to the scale ``exp(log_scale)``, P Gᑫ Ω with P the projector off the basis.
    For a positive semidefinite G, ‖P Gᑫ P‖ ≥ ‖P G P‖ᑫ, so

        μ ≤ (‖P Gᑫ Ω‖₂ / sqrt(quantile))^(1/q)    except with the failure probability.

    Deflating in every step changes nothing in exact arithmetic as long as the basis of each step
    contains G times the basis of the step before (a Krylov basis does), and keeps the rounding
    errors of the large eigenvalues out.
    """

    rows: Tensor  # [..., PROBES, n]
    log_scale: Tensor  # [..., 1, 1], fp64
    shrink: Tensor  # [..., 1, 1]: the factor that keeps one step near norm 1
    steps: int = 0

    @classmethod
    def draw(cls, like: Tensor, generator: torch.Generator) -> Probes:
        """PROBES rows like those of ``like [..., *, n]``; every matrix of a stack gets the same."""
        n = like.shape[-1]
        rows = torch.randn(PROBES, n, dtype=like.dtype, device=like.device, generator=generator)
        ones = like.new_ones(*like.shape[:-2], 1, 1)
        rows = rows.expand(*like.shape[:-2], PROBES, n).contiguous()
        return cls(rows, torch.zeros_like(ones, dtype=torch.float64), ones)

    def advance(self, product: Tensor) -> None:
        """Take ``product``, the deflated ``rows G``, as the new rows, scaled to stay near norm 1.

        Norms are measured now and then only: in between, the growth of the second step (when the
        start's random scale is gone) is near enough.
        """
        factor = self.shrink
        if self.steps == 1 or self.steps % 4 == 0:
            norm = torch.linalg.matrix_norm(product, keepdim=True)
            # Rows that vanish (the basis holds everything) must stay zero, not become NaN.
            factor = 1.0 / norm.clamp_min(1e-30)
            self.shrink = factor if self.steps == 1 else self.shrink
        self.rows = product * factor
        self.log_scale = self.log_scale - factor.double().log()
        self.steps += 1

    def outside_norm(self, basis: Tensor) -> Tensor:
        """The bound μ ``[...]`` (fp64) on the largest eigenvalue of G outside ``basis``."""
        rows = deflate(self.rows, basis)[0].double()
        top = eigvalsh(rows @ rows.mT)[..., -1].clamp_min(0)
        log_scale = self.log_scale.squeeze(-1).squeeze(-1)
        log_mu = (0.5 * (top / _CHI2_QUANTILE).log() + log_scale) / self.steps
        return log_mu.exp()


def truncation_error(
    theta: Tensor,
    coupling: Tensor,
    residuals: Tensor,
    mu: Tensor,
    rank: int,
    denominator: Tensor,
    target: Tensor,
    *,
    final: bool,
) -> Tensor:
    """Bound on the per-vector error of the first ``rank`` Ritz vectors, rounding left aside.

    Args:
        theta: ``[..., K]`` Ritz values, descending.
        coupling: ``[..., K, b]``: S, the residual in Ritz coordinates.
        residuals: ``[..., rank]``: norms ‖G vᵢ − θᵢ vᵢ‖.
        mu: ``[...]``: bound on the eigenvalues outside the basis.
        denominator: ``[...]``: what errors are measured against, max(s_{r+1}², eps · s₁²).
        target: ``[...]``: the bound that is hoped for. Whether it holds, or an 8th, a 64th or a
            512th of it, is found by small factorizations, without an eigenproblem of size K.
        final: whether a result above the target is of interest; if not, it may come out as inf.

    Returns:
        ``[...]`` fp64: max over i of the bounds on λᵢ − ‖A vᵢ‖² and on |λᵢ − ‖Aᵀuᵢ‖²|, divided.
    """
    theta, coupling, residuals = theta.double(), coupling.double(), residuals.double()
    wanted = theta[..., :rank]
    gap = wanted[..., -1] - mu
    has_gap = gap > 0
    # Without a gap: each eigenvalue may be as large as what was seen outside, plus the residual.
    linear = (torch.maximum(wanted, mu[..., None]) - wanted).amax(-1)
    linear = linear + residuals.square().sum(-1).sqrt()
    safe_gap = torch.where(has_gap, gap, torch.ones_like(gap))
    powers = torch.arange(_LEVELS, dtype=theta.dtype, device=theta.device)
    lifts = (target * denominator)[..., None] * 8.0**-powers
    proved = lift_at_most(theta, coupling, safe_gap, lifts, rank)
    quadratic = lifts.masked_fill(~proved, math.inf).amin(-1)
    open_cases = has_gap & quadratic.isinf() & (linear > target * denominator)
    if final and bool(open_cases.any()):
        lifted = torch.diag_embed(theta) + (coupling @ coupling.mT) / safe_gap[..., None, None]
        upper = eigvalsh(lifted).flip(-1)[..., :rank]
        quadratic = torch.minimum(quadratic, (upper - wanted).amax(-1))
    error_v = torch.where(has_gap, torch.minimum(quadratic, linear), linear)
    # ‖Aᵀuᵢ‖² = θᵢ + ‖residualᵢ‖² / θᵢ: the left vectors are half a power step ahead.
    tiny = torch.finfo(torch.float64).tiny
    error_u = (residuals.square() / wanted.clamp_min(tiny)).amax(-1)
    return torch.maximum(error_v, error_u).clamp_min(0) / denominator


def lift_at_most(theta: Tensor, coupling: Tensor, gap: Tensor, lifts: Tensor, rank: int) -> Tensor:
    """Whether λᵢ(diag(θ) + S Sᵀ/gap) ≤ θᵢ + lift for all i ≤ rank: no eigenvalues needed.

    By inertia, no eigenvalue of the perturbed matrix has moved across x = θᵢ + lift where
    gap · I − Sᵀ (x − diag θ)⁻¹ S is positive definite: one b × b Cholesky factorization for each x.

    Args:
        theta, coupling: as in ``truncation_error``, fp64.
        gap: ``[...]``, positive.
        lifts: ``[..., J]``.

    Returns:
        ``[..., J]`` bool.
    """
    width = coupling.shape[-1]
    points = (theta[..., None, :rank] + lifts[..., :, None]).flatten(-2)
    distance = points[..., :, None] - theta[..., None, :]  # [..., J · rank, K]
    # A point on a pole proves nothing: pushed next to it, it fails.
    resolution = 1e-15 * theta[..., :1, None]
    distance = torch.where(distance.abs() <= resolution, resolution + 1e-300, distance)
    outer = (coupling[..., :, None] * coupling[..., None, :]).flatten(-2)
    pulled = (distance.reciprocal() @ outer).unflatten(-1, (width, width))
    eye = torch.eye(width, dtype=theta.dtype, device=theta.device)
    info = torch.linalg.cholesky_ex(gap[..., None, None, None] * eye - pulled).info
    return (info == 0).unflatten(-1, (lifts.shape[-1], rank)).all(-1)


def first_order_error(
    theta: Tensor, residuals: Tensor, mu: Tensor, rank: int, denominator: Tensor
) -> Tensor:
    """About what ``truncation_error`` will be, and hardly ever more, for the price of nothing."""
    last_wanted = theta[..., rank - 1].double()
    worst = residuals.double().amax(-1)
    gap = last_wanted - mu
    linear = (-gap).clamp_min(0) + worst
    quadratic = worst.square() / gap
    return torch.where(gap > 0, torch.minimum(quadratic, linear), linear) / denominator


def error_denominator(top: Tensor, following: Tensor, eps: float) -> Tensor:
    """max(s_{r+1}², eps · s₁²) from s₁² and s_{r+1}² (fp64); never zero."""
    tiny = torch.finfo(torch.float64).tiny
    return torch.maximum(following.double(), eps * top.double()).clamp_min(tiny)


def rounding_error(
    theta: Tensor, denominator: Tensor, working_eps: float, result_eps: float
) -> Tensor:
    """The share of rounding in the per-vector error.

    A perturbation η of G turns two vectors with eigenvalues d > η apart by η/d, which costs η²/d:
    only vectors as close as η lose all of η. So what counts is the smallest gap. Casting the
    vectors to the result's dtype turns them too, by about eps, whatever the gaps (within twice that
    in 4,000 matrices).

    Args:
        theta: ``[..., r + 1]`` s₁² … s_{r+1}², descending (0 for what lies beyond the end).
        denominator: ``[...]``: what errors are measured against.
        working_eps: of the dtype of the products.
        result_eps: of the dtype of the result.
    """
    theta = theta.double()
    eta = _ROUNDING_UNITS * working_eps * theta[..., 0]
    smallest_gap = (theta[..., :-1] - theta[..., 1:]).amin(-1)
    tiny = torch.finfo(torch.float64).tiny
    work = eta * (eta / torch.maximum(smallest_gap, eta).clamp_min(tiny))
    return (work + 4 * result_eps**2 * theta[..., 0]) / denominator
