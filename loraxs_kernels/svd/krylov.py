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
from .dense import eigh
from .orth import (
    AGAIN_RATIO,
    cholesky_rows,
    complete_block,
    deflate,
    pivot_range,
    sound,
)
from .passes import Passes

# Orders of magnitude, from measurements: they decide when to test, never what comes out.
_FLOPS_PER_SECOND = 1.2e11
_TEST_SECONDS = 5e-10
# The bound comes down to the tolerance when its first-order estimate is about this far below.
_PROOF_FACTOR = 12.0
_WITHOUT_PROBES = 0.4  # share of the steps to the first test
_PATIENCE = 3  # steps that a test may be put off while something large may be outside


@dataclass
class Subspace:
    """What a subspace method hands back.

    Attributes:
        v: ``[..., r, n]`` rows: the Ritz vectors wanted.
        theta: ``[..., r + 1]`` fp64: their Ritz values, and the next one.
        error: ``[...]`` fp64: the bound on the per-vector error, rounding left aside; inf where
            the method broke down (only in a stack) and the matrix needs another one.
        iterations: blocks (krylov) or filter rounds (chebyshev).
        looks: how often the random bound on what lies outside was looked at; each look may be
            wrong with the probability that ``certificate`` states.
    """

    v: Tensor
    theta: Tensor
    error: Tensor
    iterations: int
    looks: int


def block_size(rank: int, m: int, n: int, device: torch.device) -> int:
    """Rows per block. The smaller, the fewer vectors are needed for an accuracy; the larger, the
    cheaper is each vector (W is read from memory once per block, whatever its size)."""
    if device.type == "cuda":
        return 32 if rank <= 128 else 64
    block = 4 if rank <= 2 else 12 if rank <= 32 else 16 if rank <= 128 else 32
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
        known = basis.shape[-2]
        floor = 10 * torch.finfo(remainder.dtype).eps * self.scale
        coupling, q, info, pivots = cholesky_rows(remainder)
        low, high = pivot_range(info, pivots)
        usable = sound(low, high, floor)
        if bool((low < AGAIN_RATIO * high).any()) and bool(usable.any()):
            again, q, *_ = cholesky_rows(deflate(q.to(basis.dtype), basis)[0])
            coupling = coupling @ again
        if remainder.dim() == 3:
            self.broken |= ~usable
            q = torch.where(usable[..., None, None], q, 0.0)
            coupling = torch.where(usable[..., None, None], coupling, 0.0)
        elif not usable:
            coupling, q = complete_block(remainder, basis, float(floor), self.generator)
        self.v[..., known : known + self.block, :] = q
        self.coupling = coupling

    def ritz(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ritz values (descending), coordinates ``[..., K, K]`` (columns), S and residual norms."""
        k = self.size
        theta, y = eigh(self.t[..., :k, :k])
        theta, y = theta.flip(-1), y.flip(-1)
        rows = y[..., k - self.block :, :].mT.double() @ self.coupling.double()
        return theta, y, rows, torch.linalg.vector_norm(rows[..., :rank, :], dim=-1)


def first_check(rank: int, block: int, tol: float, oversample: int | None, passes: Passes) -> int:
    """The basis size at the first convergence test.

    With r vectors to find, fewer than 3r never do, nor fewer than five blocks. Where a test (an
    eigenproblem, about 0.5 ns · K³) is cheap beside a step (4 m n FLOPs per row), testing starts
    there; where it is not, it waits for the number of steps that the tolerance usually takes.
    """
    if oversample is not None:
        return rank + oversample
    earliest = max(3 * rank + block, 5 * block)
    usual = max(4 * rank, math.ceil(7 + 1.5 * max(0.0, math.log10(0.1 / max(tol, 1e-12)))) * block)
    m, n = passes.shape
    step_seconds = 4.0 * m * n * block / _FLOPS_PER_SECOND
    cheap = (_TEST_SECONDS * earliest**3) < 0.2 * step_seconds
    return earliest if cheap else usual


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
    next_check = first_check(rank, block, tol, oversample, passes)
    working_eps = torch.finfo(passes.a.dtype).eps
    looks = 0
    wanted = math.inf  # how small μ should be for the next test, as far as known
    # The probes need some steps to tell large from small, but not all of them: rows that ride along
    # from the start cost products and sharpen the bound little.
    alone = int(_WITHOUT_PROBES * min(next_check // block, steps_cap))
    for step in range(1, steps_cap + 1):
        basis.extend(probes if step > alone else None)
        last = step == steps_cap
        if basis.size < next_check and not last:
            continue
        mu = probes.outside_norm(basis.v[..., : basis.size, :])
        looks += 1
        if not last and float(mu.max()) > wanted and basis.size < next_check + _PATIENCE * block:
            continue  # something large may still be outside: no need for the eigenproblem
        theta, y, coupling, residuals = basis.ritz(rank)
        denominator = error_denominator(theta[..., 0], theta[..., rank], eps)
        estimate = first_order_error(theta, residuals, mu, rank, denominator)
        rounding = rounding_error(theta[..., : rank + 1], denominator, working_eps, eps)
        # Where rounding alone is too much, more vectors cannot help: the caller has a wider dtype.
        last = last or bool((rounding > 0.5 * tol).any())
        target = (tol - rounding).clamp_min(1e-3 * tol)  # rounding is added to the bound later
        if last or bool((estimate <= 0.5 * target).all()):
            error = truncation_error(
                theta, coupling, residuals, mu, rank, denominator, target, final=last
            )
            error = error.masked_fill(basis.broken, math.inf)
            converged = bool((error <= target * (1 + 1e-9)).all())
            if last or converged or bool(basis.broken.any()):
                v = y[..., :rank].mT @ basis.v[..., : basis.size, :]
                return Subspace(v, theta[..., : rank + 1].double(), error, step, looks)
        steps_on, wanted = _forecast(theta, residuals, mu, rank, denominator, tol)
        next_check = basis.size + steps_on * block
    raise RuntimeError(f"no Krylov step was possible: cap={cap}, rank={rank}")


def _forecast(
    theta: Tensor, residuals: Tensor, mu: Tensor, rank: int, denominator: Tensor, tol: float
) -> tuple[int, float]:
    """How many steps a converging run still needs, and below which bound on the outside a test
    makes sense again."""
    last_wanted = theta[..., rank - 1].double()
    residual = residuals.double().amax(-1)
    # How far below the last wanted value is enough for the quadratic bound; or, where the vectors
    # have converged all the same (a rank-deficient matrix), how near for the linear one.
    wanted = last_wanted * (0.9 if tol < 1e-2 else 0.98)
    wanted = torch.where(residual <= tol * denominator, last_wanted + tol * denominator, wanted)
    if bool((mu > wanted).any()):
        return 1, float(wanted.min())
    gap = (last_wanted - mu).clamp_min(1e-3 * last_wanted)
    worst = float((residual.square() / gap / denominator).nan_to_num().max())
    # A step gains a factor of 3 to 20, more the further it has come.
    gain = math.log(max(worst * _PROOF_FACTOR / tol, 1.0)) / math.log(6.0)
    return max(1, int(gain)), math.inf
