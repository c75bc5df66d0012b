"""Small-block Krylov: randomized block Lanczos on G = AᵀA with full re-orthogonalisation.

Musco & Musco 2015 (arXiv 1504.05477) for the idea, Meyer, Musco & Musco 2023 (2305.02535) for why
small blocks win, Tropp & Webber 2023 (2306.12418) for the practice. One step multiplies the newest
block by G, removes its part in the basis (twice), and orthonormalises what is left. The projected
matrix T and the residuals fall out of the coefficients, so a convergence test costs an
eigenproblem of the size of the basis and no product with W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .certificate import (
    Probes,
    error_denominator,
    first_order_error,
    rounding_error,
    truncation_error,
)
from .orth import cholesky_rows, complete_block, deflate, pivots_sound
from .passes import Passes


@dataclass
class Subspace:
    """What a subspace method hands back.

    Attributes:
        v: ``[..., r, n]`` rows: the Ritz vectors wanted.
        theta: ``[..., r + 1]`` fp64: their Ritz values, and the next one.
        error: ``[...]`` fp64: the bound on the per-vector error, rounding left aside; inf where
            the method broke down (only in a stack) and the matrix needs another one.
        iterations: blocks (krylov) or filter rounds (chebyshev).
        converged: whether every matrix met the tolerance.
    """

    v: Tensor
    theta: Tensor
    error: Tensor
    iterations: int
    converged: bool


def block_size(rank: int, m: int, n: int, device: torch.device) -> int:
    """Rows per block. The smaller, the fewer vectors are needed for an accuracy; the larger, the
    cheaper is each vector (W is read from memory once per block, whatever its size)."""
    if device.type == "cuda":
        return 32 if rank <= 128 else 64
    block = 12 if rank <= 32 else 16 if rank <= 128 else 32
    if m * n >= 2048 * 2048:  # W no longer stays in the cache from one pass to the next
        block = max(block, 16)
    return block


def krylov_room(n: int, block: int) -> int:
    """How large a basis of whole blocks can get and still leave one block of the space outside."""
    return max(0, n // block - 1) * block


class _Basis:
    """The growing basis V, the projected matrix T, and the coupling L of the last block."""

    def __init__(self, passes: Passes, block: int, cap: int, generator: torch.Generator) -> None:
        a = passes.a
        n = a.shape[-1]
        self.passes, self.block, self.generator = passes, block, generator
        batch = a.shape[:-2]
        self.v = a.new_empty(*batch, cap + block, n)
        self.t = a.new_zeros(*batch, cap, cap)
        start = torch.randn(block, n, dtype=a.dtype, device=a.device, generator=generator)
        self.v[..., :block, :] = cholesky_rows(start)[1]
        self.size = 0  # rows of V whose product with G is known
        self.coupling = self.t  # L of the last block, set by the first extension
        self.scale: Tensor | float = 0.0
        # Only a stack sets this: a single matrix is repaired on the spot.
        self.broken = torch.zeros(batch, dtype=torch.bool, device=a.device)

    def extend(self, probes: Probes | None) -> None:
        """One step: multiply the newest block, deflate, orthonormalise, append."""
        size, block = self.size, self.block
        known = size + block
        newest = self.v[..., size:known, :]
        basis = self.v[..., :known, :]
        rows = newest if probes is None else torch.cat([newest, probes.rows], dim=-2)
        product = self.passes.gram(rows.contiguous())
        if size == 0:
            norm = torch.linalg.matrix_norm(product[..., :block, :]) / math.sqrt(block)
            self.scale = norm if norm.dim() else float(norm)
        product, coefficients = deflate(product, basis)
        if probes is not None:
            probes.advance(product[..., block:, :])
        self.t[..., size:known, :known] = coefficients[..., :block, :]
        self._append(product[..., :block, :], basis)
        self.size = known

    def _append(self, remainder: Tensor, basis: Tensor) -> None:
        coupling, q, info, pivots = cholesky_rows(remainder)
        known = basis.shape[-2]
        floor = 10 * torch.finfo(remainder.dtype).eps * self.scale
        sound = pivots_sound(info, pivots, floor)
        if remainder.dim() == 2:
            if not sound:
                coupling, q = complete_block(remainder, basis, float(floor), self.generator)
        else:
            self.broken |= ~sound
            q = torch.where(sound[..., None, None], q, torch.zeros_like(q))
            coupling = torch.where(sound[..., None, None], coupling, torch.zeros_like(coupling))
        self.v[..., known : known + self.block, :] = q
        self.coupling = coupling

    def ritz(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ritz values (descending), coordinates ``[..., K, K]`` (columns), S and residual norms."""
        k = self.size
        theta, y = torch.linalg.eigh(self.t[..., :k, :k], UPLO="L")
        theta, y = theta.flip(-1), y.flip(-1)
        rows = y[..., k - self.block :, :].mT.double() @ self.coupling.double()
        return theta, y, rows, torch.linalg.vector_norm(rows[..., :rank, :], dim=-1)


def first_check(rank: int, block: int, tol: float, oversample: int | None) -> int:
    """The basis size at which a convergence test can first succeed (a test costs an eigenproblem).

    With r known vectors to find, about 4r are needed at least; and convergence takes a number of
    steps that grows with the accuracy, whatever the rank.
    """
    if oversample is not None:
        return rank + oversample
    steps = 8 + 1.5 * max(0.0, math.log10(0.1 / max(tol, 1e-12)))
    return max(4 * rank, math.ceil(steps) * block)


def krylov(
    passes: Passes,
    rank: int,
    *,
    tol: float,
    max_iter: int | None,
    oversample: int | None,
    cap: int,
    eps: float,
    generator: torch.Generator,
    block: int | None = None,
) -> Subspace:
    """Grow a block Krylov basis until the bound on the per-vector error is at most ``tol``.

    Args:
        passes: products with ``a [..., m, n]``, n ≤ m.
        cap: the most basis vectors to use; more than ``rank``, at most n / 2.
        eps: resolution of the result: errors are measured against max(s_{r+1}², eps · s₁²).
        max_iter: the most blocks to use (then the best so far is returned, with its error).

    Cost: 2 passes of (block + 8) vectors per step, 4 K² n FLOPs for orthogonality, one K × K
    eigenproblem per test; memory K (n + K) numbers.
    """
    m, n = passes.shape
    block = block or block_size(rank, m, n, passes.a.device)
    block = min(block, cap)
    steps_cap = cap // block
    if max_iter is not None:
        # Even a run that is cut short needs one Ritz vector more than the rank.
        steps_cap = min(steps_cap, max(max_iter, -(-(rank + 1) // block)))
    basis = _Basis(passes, block, steps_cap * block, generator)
    probes = Probes.draw(passes.a, generator)
    next_check = first_check(rank, block, tol, oversample)
    working_eps = torch.finfo(passes.a.dtype).eps
    wanted = math.inf  # the last wanted Ritz value at the last test; it only grows
    for step in range(1, steps_cap + 1):
        basis.extend(probes)
        last = step == steps_cap
        if basis.size < next_check and not last:
            continue
        mu = probes.outside_norm(basis.v[..., : basis.size, :])
        if not last and float(mu.max()) > wanted:
            continue  # something large may still be outside: no need for the eigenproblem
        theta, y, coupling, residuals = basis.ritz(rank)
        denominator = error_denominator(theta[..., 0], theta[..., rank], eps)
        estimate = first_order_error(theta, residuals, mu, rank, denominator)
        rounding = rounding_error(theta[..., : rank + 1], denominator, working_eps, eps)
        # Where rounding alone is too much, more vectors cannot help: the caller has a wider dtype.
        last = last or bool((rounding > 0.5 * tol).any())
        if last or bool((estimate <= tol).all()):
            error = truncation_error(theta, coupling, residuals, mu, rank, denominator)
            error = error.masked_fill(basis.broken, math.inf)
            converged = bool((error <= tol).all())
            if last or converged or bool(basis.broken.any()):
                v = y[..., :rank].mT @ basis.v[..., : basis.size, :]
                return Subspace(v, theta[..., : rank + 1].double(), error, step, converged)
        steps_on, wanted = _forecast(theta, residuals, mu, rank, denominator, tol)
        next_check = basis.size + steps_on * block
    raise RuntimeError(f"no Krylov step was possible: cap={cap}, rank={rank}")


def _forecast(
    theta: Tensor, residuals: Tensor, mu: Tensor, rank: int, denominator: Tensor, tol: float
) -> tuple[int, float]:
    """How many steps a converging run still needs, and below which bound on the outside a test
    makes sense again."""
    last_wanted = theta[..., rank - 1].double()
    # Near enough below the last wanted value for the quadratic bound, or for the linear one.
    wanted = last_wanted * 0.98
    within_tol = last_wanted + tol * denominator
    if bool((mu > wanted).any()):
        return 1, float(torch.maximum(wanted, within_tol).min())
    worst = (residuals.double().amax(-1).square() / (last_wanted - mu) / denominator).max()
    # A step gains a factor of 3 to 20, more the further it has come: 6 rarely overshoots.
    return max(1, int(math.log(max(float(worst) / tol, 1.0)) / math.log(6.0))), math.inf
