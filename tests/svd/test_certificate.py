"""The bound on the error is counted against the truth, and made to face what it must notice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from loraxs_kernels.svd import randomized_svd
from loraxs_kernels.svd.certificate import FAILURE_PROBABILITY, Probes, lift_at_most
from loraxs_kernels.svd.krylov import krylov
from loraxs_kernels.svd.orth import orthonormal_rows
from loraxs_kernels.svd.passes import Passes

from .cases import SPECTRA, quality, random_case, spectrum, with_spectrum

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"tol": 1e-5},
    {"tol": 3e-2},
    {"max_iter": 1},
    {"max_iter": 3},
    {"max_iter": 8},
    {"method": "chebyshev", "max_iter": 1},
    {"method": "chebyshev"},
    {"method": "gram"},
    {"method": "lapack"},
    {"method": "gram", "tol": 1e3},
)


def count_too_small(seeds: range, largest: int = 320) -> tuple[int, int, list[str]]:
    """Results with a random error bound, all results, and a description of each failure."""
    random_bounds, total, failures = 0, 0, []
    for seed in seeds:
        matrix, rank, kind = random_case(seed, largest)
        dtype = (torch.float32, torch.float64, torch.bfloat16)[seed % 3]
        options = dict(SETTINGS[seed % len(SETTINGS)])
        if "method" not in options and min(matrix.shape) > rank + 40:
            options["method"] = "krylov"
        result = randomized_svd(matrix.to(dtype), rank, seed=seed, **options)
        q = quality(matrix.to(dtype), result)
        total += 1
        random_bounds += result.failure_probability > 0
        if not q.pve <= result.error + q.slack:
            failures.append(
                f"{kind} {tuple(matrix.shape)} r={rank} {dtype} {options}: {q} > {result.error}"
            )
    return random_bounds, total, failures


def allowed(random_bounds: int) -> int:
    """Failures that chance explains at the stated probability (three standard deviations)."""
    mean = FAILURE_PROBABILITY * random_bounds
    return int(mean + 3 * math.sqrt(mean))


def test_bound_is_honest():
    random_bounds, total, failures = count_too_small(range(330))
    assert total == 330 and random_bounds > 150
    # Stricter than the stated probability: the bound is conservative, and several failures that
    # chance would excuse may have one cause.
    assert not failures


@pytest.mark.slow
def test_bound_is_honest_on_thousands():
    random_bounds, _, failures = count_too_small(range(1000, 3000), largest=180)
    assert random_bounds > 600
    assert not failures


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("method", ["chebyshev", "gram", "lapack"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bound_is_honest_at_full_rank(kind, method, dtype):
    # Nothing follows s_r here: errors are measured against eps · s_1², not against s_r².
    for m, n in ((40, 31), (31, 31), (2, 9), (1, 5)):
        generator = torch.Generator().manual_seed(m)
        matrix = with_spectrum(m, n, spectrum(kind, min(m, n), generator), generator).to(dtype)
        for max_iter in (None, 1):
            result = randomized_svd(matrix, min(m, n), method=method, max_iter=max_iter, tol=0.1)
            q = quality(matrix, result)
            assert q.pve <= result.error + q.slack, (m, n, max_iter)
            assert q.orthogonality < (1e-12 if dtype is torch.float64 else 2e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_missed_direction_is_noticed(seed):
    n, rank, block = 160, 4, 8
    # The top right singular vector is orthogonal to the starting block that this seed draws, so no
    # Krylov vector ever meets it: residuals go to zero for the wrong vectors.
    start = torch.randn(
        block, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    other = torch.Generator().manual_seed(99)
    hidden = torch.randn(n, dtype=torch.float64, generator=other)
    span = torch.linalg.qr(start.T)[0]
    hidden = hidden - span @ (span.T @ hidden)
    rest = torch.randn(n, n - 1, dtype=torch.float64, generator=other)
    right = torch.linalg.qr(torch.cat([hidden[:, None], rest], dim=1))[0]
    left = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=other))[0]
    bulk = torch.linspace(0.3, 0.05, n - 5)
    s = torch.cat([torch.tensor([1.6, 1.0, 0.9, 0.8, 0.7]), bulk]).double()
    matrix = (left * s) @ right.T
    found = krylov(
        Passes(matrix),
        rank,
        tol=1e-12,
        max_iter=4,  # before rounding errors bring the direction back
        oversample=None,
        cap=80,
        eps=2e-16,
        generator=torch.Generator().manual_seed(seed),
        block=block,
    )
    assert float((found.v @ right[:, 0]).abs().max()) < 1e-6, "the start was meant to be blind"
    residual = found.v @ matrix.T @ matrix - found.theta[:rank, None] * found.v
    assert float(residual.norm()) < 1e-3, "residuals alone would call this converged"
    true_error = float(s[0] ** 2 - found.theta[0]) / float(s[rank] ** 2)
    assert true_error > 1
    assert float(found.error) >= true_error


def test_norm_outside_fails_no_more_often_than_stated():
    # The bound on what lies outside a basis, alone, over thousands of draws of the probes.
    generator = torch.Generator().manual_seed(1)
    n, size, draws = 60, 10, 3000
    matrix = with_spectrum(n, n, spectrum("slow power law", n, generator), generator)
    basis = orthonormal_rows(torch.randn(size, n, dtype=torch.float64, generator=generator))
    g = matrix.T @ matrix
    outside = torch.eye(n, dtype=torch.float64) - basis.T @ basis
    exact = float(torch.linalg.matrix_norm(outside @ g @ outside, 2))
    too_small, ratios = 0, []
    for _ in range(draws):
        probes = Probes.draw(basis, generator)
        for _ in range(2):
            probes.rows = probes.rows @ outside
            probes.advance(probes.rows @ g @ outside)
        mu = float(probes.outside_norm(basis))
        too_small += mu < exact
        ratios.append(mu / exact)
    assert too_small <= allowed(draws) + 3
    assert sorted(ratios)[draws // 2] < 4, "a bound this loose certifies nothing"


def test_failure_probability_is_stated():
    matrix = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    # One share for each look at the bound: at least one, and no more than there are steps.
    krylov_result = randomized_svd(matrix, 4, method="krylov")
    looks = krylov_result.failure_probability / FAILURE_PROBABILITY
    assert 1 <= round(looks, 6) <= krylov_result.iterations
    stack = torch.stack([matrix, matrix])
    twice = randomized_svd(stack, 4, method="krylov").failure_probability
    assert twice == pytest.approx(2 * krylov_result.failure_probability)
    assert randomized_svd(matrix, 4, method="gram").failure_probability == 0.0


def test_levels_are_what_eigenvalues_say():
    generator = torch.Generator().manual_seed(4)
    seen = set()
    for _ in range(300):
        k, b, rank = 12, 3, 4
        theta = torch.rand(k, dtype=torch.float64, generator=generator).sort(descending=True)[0]
        coupling = 0.1 * torch.randn(k, b, dtype=torch.float64, generator=generator)
        gap = torch.rand((), dtype=torch.float64, generator=generator) + 0.05
        lifts = torch.tensor([0.3, 0.1, 0.03, 0.01, 0.003], dtype=torch.float64)
        upper = torch.linalg.eigvalsh(torch.diag(theta) + coupling @ coupling.T / gap).flip(0)
        proved = lift_at_most(theta, coupling, gap, lifts, rank)
        for lift, answer in zip(lifts, proved, strict=True):
            holds = bool((upper[:rank] <= theta[:rank] + lift).all())
            # What is proved is true. Not all that is true is proved: a wanted value may only be
            # counted at its own place.
            assert holds or not bool(answer)
            seen.add((holds, bool(answer)))
    assert {(True, True), (False, False)} <= seen
