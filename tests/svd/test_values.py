"""The triplets against the truth, over shapes, ranks, spectra, dtypes, scales and methods."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraxs_kernels.svd import randomized_svd

from .cases import SPECTRA, assert_good, quality, spectrum, with_spectrum

RESULT = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 260),
    n=st.integers(1, 260),
    fraction=st.floats(0.0, 1.0),
    kind=st.sampled_from(SPECTRA),
    dtype=st.sampled_from(list(RESULT)),
    exponent=st.integers(-20, 20),
    layout=st.sampled_from(["plain", "transposed", "strided"]),
    seed=st.integers(0, 2**31),
)
def test_any_matrix(m, n, fraction, kind, dtype, exponent, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    rank = 1 + int(fraction * (k - 1))
    matrix = with_spectrum(m, n, spectrum(kind, k, generator), generator)
    if dtype in (torch.float64, torch.float32):
        matrix = matrix * 10.0**exponent
    matrix = matrix.to(dtype)
    if layout == "transposed":
        matrix = matrix.T.contiguous().T
    elif layout == "strided":
        wide = torch.zeros(2 * m, 3 * n, dtype=dtype)
        wide[::2, ::3] = matrix
        matrix = wide[::2, ::3]
    before = matrix.clone()
    result = randomized_svd(matrix, rank, seed=seed)
    assert result.U.shape == (m, rank) and result.S.shape == (rank,)
    assert result.Vh.shape == (rank, n)
    assert {t.dtype for t in (result.U, result.S, result.Vh)} == {RESULT[dtype]}
    assert torch.equal(matrix, before)
    # For fp64 and a spectrum that ends in noise, rounding itself is most of the unit of error.
    floor = 20.0 if dtype is torch.float64 else 1e-3
    assert_good(matrix, result, floor)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(400, 300), (260, 1100)])
def test_methods_agree(kind, shape):
    generator = torch.Generator().manual_seed(3)
    m, n = shape
    matrix = with_spectrum(m, n, spectrum(kind, min(m, n), generator), generator).float()
    results = {
        method: randomized_svd(matrix, 12, method=method, tol=1e-4)
        for method in ("gram", "krylov", "gram-krylov", "chebyshev", "lapack")
    }
    for method, result in results.items():
        assert result.method == method
        q = quality(matrix, result)
        assert q.pve <= result.error + q.slack, method
        assert q.orthogonality < 2e-6, method
        torch.testing.assert_close(result.S, results["lapack"].S, rtol=0, atol=1e-3)
    if kind in ("power law", "exponential"):
        # Well separated: the vectors themselves agree, signs included.
        for method, result in results.items():
            for name in ("U", "Vh"):
                ours, theirs = getattr(result, name), getattr(results["lapack"], name)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2, msg=f"{method} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [3e-2, 1e-3, 1e-5, 0.0])
def test_tolerance_is_met(dtype, tol):
    generator = torch.Generator().manual_seed(5)
    matrix = with_spectrum(500, 420, spectrum("slow power law", 420, generator), generator)
    result = randomized_svd(matrix.to(dtype), 10, tol=tol)
    assert_good(matrix.to(dtype), result, max(tol, 1e-11))


def test_a_tighter_tolerance_costs_more_and_is_better():
    generator = torch.Generator().manual_seed(6)
    matrix = with_spectrum(700, 640, spectrum("slow power law", 640, generator), generator).float()
    loose = randomized_svd(matrix, 8, tol=1e-1, method="krylov")
    tight = randomized_svd(matrix, 8, tol=1e-6, method="krylov")
    assert loose.passes < tight.passes
    assert quality(matrix, tight).pve < quality(matrix, loose).pve
    assert tight.error < loose.error


@pytest.mark.parametrize("method", ["krylov", "gram-krylov", "chebyshev"])
def test_max_iter_stops_early_and_says_so(method):
    generator = torch.Generator().manual_seed(7)
    matrix = with_spectrum(600, 500, spectrum("slow power law", 500, generator), generator).float()
    result = randomized_svd(matrix, 20, method=method, max_iter=2)
    q = quality(matrix, result)
    assert result.iterations <= 2
    assert 1e-3 < q.pve <= result.error
    assert q.orthogonality < 2e-6


def test_max_iter_in_auto_does_not_change_the_method():
    generator = torch.Generator().manual_seed(8)
    matrix = with_spectrum(600, 500, spectrum("flat", 500, generator), generator).float()
    result = randomized_svd(matrix, 4, max_iter=3)
    assert result.method == "gram-krylov" and result.iterations == 3


def test_more_oversampling_in_chebyshev_needs_fewer_rounds():
    generator = torch.Generator().manual_seed(9)
    matrix = with_spectrum(500, 420, spectrum("slow power law", 420, generator), generator).float()
    few = randomized_svd(matrix, 20, method="chebyshev", oversample=8)
    many = randomized_svd(matrix, 20, method="chebyshev", oversample=80)
    assert many.iterations < few.iterations
    for result in (few, many):
        assert_good(matrix, result, 1e-3)


def test_auto_takes_another_method_where_krylov_would_not_end():
    # 40 equal values, then equal smaller ones: nothing to converge on within the cap.
    result = randomized_svd(torch.eye(400), 5)
    assert result.method == "gram"
    assert_good(torch.eye(400), result, 1e-3)


def test_stack_equals_its_matrices():
    generator = torch.Generator().manual_seed(10)
    stack = torch.stack(
        [with_spectrum(230, 330, spectrum(kind, 230, generator), generator) for kind in SPECTRA]
    ).float()
    together = randomized_svd(stack, 9, seed=4)
    assert together.U.shape == (len(SPECTRA), 230, 9)
    assert together.S.shape == (len(SPECTRA), 9)
    assert together.Vh.shape == (len(SPECTRA), 9, 330)
    assert together.error == max(together.errors) and len(together.errors) == len(SPECTRA)
    for index, matrix in enumerate(stack):
        alone = randomized_svd(matrix, 9, seed=4)
        assert torch.equal(alone.U, together.U[index])
        assert torch.equal(alone.Vh, together.Vh[index])
        assert alone.error == together.errors[index]


def test_iteration_order_and_compactness():
    u, s, vh, error = randomized_svd(torch.randn(300, 200), 3)
    assert isinstance(error, float)
    for tensor in (u, s, vh):
        # A slice of something larger would keep all of it alive.
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.is_contiguous() and not tensor.requires_grad
