"""Matrices that break naive implementations, refusals, and what must be left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loraxs_kernels.svd import SVDResult, api, dense, passes, randomized_svd
from loraxs_kernels.svd.certificate import Probes
from loraxs_kernels.svd.krylov import krylov
from loraxs_kernels.svd.orth import complete_block, deflate, orthonormal_rows

from .cases import assert_good, quality, spectrum, with_spectrum


def gaussian(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


VALID = {
    "zero": torch.zeros(300, 260),
    "identity": torch.eye(260),
    "orthogonal": torch.linalg.qr(gaussian(260, 260))[0],
    "one row": gaussian(1, 70),
    "one column": gaussian(70, 1),
    "one number": torch.tensor([[-2.5]]),
    "ones": torch.ones(330, 250),
    "single entry": torch.zeros(300, 250).index_put(
        (torch.tensor(5), torch.tensor(7)), torch.tensor(-3.0)
    ),
    "low rank": gaussian(350, 5) @ gaussian(5, 270),
    "duplicated columns": gaussian(400, 100).repeat(1, 3),
    "two clusters": torch.diag(torch.cat([torch.full((40,), 2.0), torch.ones(260)])),
    "scale 1e15": gaussian(300, 260) * 1e15,
    "scale 1e-20": gaussian(300, 260) * 1e-20,
    "scale 1e-37": gaussian(300, 260) * 1e-37,
    "scale 1e200": gaussian(300, 260, dtype=torch.float64) * 1e200,
    "scale 1e-200": gaussian(300, 260, dtype=torch.float64) * 1e-200,
    "half, large": gaussian(300, 260, dtype=torch.float16) * 1e4,
    "grouped-query projection": gaussian(192, 576),
    "exponential": torch.diag(torch.exp(-torch.arange(300.0) / 3)),
}


@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("rank", [1, 16, 100])
def test_valid_matrix(name, rank):
    matrix = VALID[name]
    rank = min(rank, min(matrix.shape))
    assert_good(matrix, randomized_svd(matrix, rank), 1e-3)


def test_fp64_down_to_the_last_singular_values():
    generator = torch.Generator().manual_seed(0)
    s = 10.0 ** -torch.arange(260, dtype=torch.float64).div(20)
    matrix = with_spectrum(300, 260, s, generator)
    for rank in (20, 200):
        result = randomized_svd(matrix, rank)
        # The Gram matrix alone would lose everything below 1e-8.
        torch.testing.assert_close(result.S, s[:rank], rtol=1e-3, atol=1e-15)
        assert quality(matrix, result).orthogonality < 1e-12


def test_fp32_resolves_small_singular_values():
    s = 10.0 ** -torch.arange(220, dtype=torch.float64).div(40)  # 1 … 3e-6
    matrix = with_spectrum(300, 220, s, torch.Generator().manual_seed(0)).float()
    exact = torch.linalg.svdvals(matrix.double()).float()
    result = randomized_svd(matrix, 200)
    torch.testing.assert_close(result.S, exact[:200], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_not_finite_is_refused(bad, dtype):
    matrix = gaussian(40, 30, dtype=dtype)
    matrix[3, 4] = bad
    with pytest.raises(ValueError, match=r"matrix: .*1 of 1200 are NaN or Inf"):
        randomized_svd(matrix, 3)
    with pytest.raises(ValueError, match="matrix"):
        randomized_svd(torch.stack([gaussian(40, 30, dtype=dtype), matrix]), 3)


GOOD = gaussian(40, 30)
REFUSED = [
    ({"matrix": [[1.0]], "rank": 1}, TypeError, "matrix.*list"),
    ({"matrix": torch.ones(4, 4, dtype=torch.int32), "rank": 1}, TypeError, "matrix.*int32"),
    ({"matrix": torch.ones(4, 4, dtype=torch.complex64), "rank": 1}, TypeError, "matrix.*complex"),
    ({"matrix": torch.ones(4, 4, dtype=torch.bool), "rank": 1}, TypeError, "matrix.*bool"),
    ({"matrix": torch.ones(4, 4).to_sparse(), "rank": 1}, TypeError, "matrix.*sparse"),
    ({"matrix": torch.ones(4, 4, device="meta"), "rank": 1}, TypeError, "matrix.*meta"),
    ({"matrix": torch.ones(4), "rank": 1}, ValueError, r"matrix.*\(4,\)"),
    ({"matrix": torch.ones(2, 2, 2, 2), "rank": 1}, ValueError, "matrix"),
    ({"matrix": torch.ones(0, 4), "rank": 1}, ValueError, "matrix.*at least one"),
    ({"matrix": torch.ones(0, 4, 4), "rank": 1}, ValueError, "matrix.*at least one"),
    ({"matrix": GOOD, "rank": 0}, ValueError, "rank.*1 to 30.*got 0"),
    ({"matrix": GOOD, "rank": 31}, ValueError, "rank.*1 to 30.*got 31"),
    ({"matrix": GOOD, "rank": 2.0}, TypeError, "rank"),
    ({"matrix": GOOD, "rank": True}, TypeError, "rank"),
    ({"matrix": GOOD, "rank": 2, "tol": -1e-3}, ValueError, "tol.*-0.001"),
    ({"matrix": GOOD, "rank": 2, "tol": float("nan")}, ValueError, "tol"),
    ({"matrix": GOOD, "rank": 2, "tol": "small"}, TypeError, "tol"),
    ({"matrix": GOOD, "rank": 2, "max_iter": 0}, ValueError, "max_iter"),
    ({"matrix": GOOD, "rank": 2, "max_iter": 1.5}, TypeError, "max_iter"),
    ({"matrix": GOOD, "rank": 2, "oversample": 0}, ValueError, "oversample"),
    ({"matrix": GOOD, "rank": 2, "oversample": "many"}, TypeError, "oversample"),
    ({"matrix": GOOD, "rank": 2, "seed": -1}, ValueError, "seed"),
    ({"matrix": GOOD, "rank": 2, "seed": None}, TypeError, "seed"),
    ({"matrix": GOOD, "rank": 2, "sign": "w"}, ValueError, "sign.*'w'"),
    ({"matrix": GOOD, "rank": 2, "method": "qr"}, ValueError, "method.*'qr'"),
    ({"matrix": GOOD, "rank": 20, "method": "krylov"}, ValueError, "method.*krylov"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        randomized_svd(**arguments)


@pytest.mark.parametrize("method", ["auto", "krylov", "gram-krylov", "chebyshev", "gram"])
def test_bitwise_reproducible_and_global_generator_untouched(method):
    matrix = gaussian(420, 380)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = randomized_svd(matrix, 7, method=method, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(321)
    second = randomized_svd(matrix, 7, method=method, seed=5)
    for name in ("U", "S", "Vh"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.error == second.error


def test_seeds_differ_and_agree():
    matrix = gaussian(420, 380)
    one, two = (randomized_svd(matrix, 5, method="krylov", seed=seed, tol=1e-6) for seed in (1, 2))
    assert not torch.equal(one.Vh, two.Vh)
    torch.testing.assert_close(one.S, two.S, rtol=1e-5, atol=0)


def test_inside_other_contexts():
    matrix = gaussian(300, 260).requires_grad_()
    plain = randomized_svd(matrix, 6)
    assert not plain.U.requires_grad and matrix.grad is None
    with torch.inference_mode():
        inside = randomized_svd(matrix, 6)
    assert torch.equal(plain.U, inside.U)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = randomized_svd(matrix, 6)
    assert torch.equal(plain.U, under.U) and under.U.dtype is torch.float32
    parameter = torch.nn.Parameter(matrix.detach().clone())
    assert torch.equal(randomized_svd(parameter, 6).U, plain.U)


def test_other_defaults():
    matrix = gaussian(300, 260)
    plain = randomized_svd(matrix, 6)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(randomized_svd(matrix, 6).U, plain.U)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(randomized_svd(matrix, 6).U, plain.U)


def test_precision_switch_is_respected_and_restored():
    matrix = gaussian(300, 260)
    plain = randomized_svd(matrix, 6)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(randomized_svd(matrix, 6).U, plain.U)
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(ValueError, match="NaN"):
            randomized_svd(matrix.log(), 6)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_without_onednn(monkeypatch):
    matrix = gaussian(300, 260)
    with_it = randomized_svd(matrix, 6, tol=1e-5)
    monkeypatch.setattr(passes, "onednn_linear_available", lambda: False)
    without = randomized_svd(matrix, 6, tol=1e-5)
    assert_good(matrix, without, 1e-5)
    torch.testing.assert_close(with_it.S, without.S, rtol=1e-5, atol=0)


def test_batched_krylov_matches_single_and_flags_what_broke():
    # What runs for a stack on a GPU: one batched basis; a matrix without enough rank is flagged.
    generator = torch.Generator().manual_seed(2)
    good = [
        with_spectrum(330, 300, spectrum(k, 300, generator), generator)
        for k in ("slow power law", "power law")
    ]
    stack = torch.stack([*good, torch.eye(330, 300, dtype=torch.float64)])
    options: dict[str, Any] = {
        "tol": 1e-4,
        "max_iter": None,
        "oversample": None,
        "cap": 144,
        "eps": 1e-7,
    }

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    found = krylov(passes.Passes(stack), 6, generator=seeded(), **options)
    assert torch.isinf(found.error[2])
    healthy = krylov(passes.Passes(stack[:2]), 6, generator=seeded(), **options)
    assert bool((healthy.error <= 1e-4).all())
    for index in range(2):
        alone = krylov(passes.Passes(stack[index]), 6, generator=seeded(), **options)
        torch.testing.assert_close(healthy.theta[index], alone.theta, rtol=1e-4, atol=0)


def test_two_deflations_hold_where_one_does_not():
    generator = torch.Generator().manual_seed(0)
    basis = orthonormal_rows(torch.randn(40, 300, generator=generator))
    inside = torch.randn(8, 40, generator=generator) @ basis
    y = inside + 1e-5 * torch.randn(8, 300, generator=generator)
    once = y - (y @ basis.T) @ basis
    twice, coefficients = deflate(y, basis)

    def overlap(rows: torch.Tensor) -> float:
        return float((rows / rows.norm(dim=1, keepdim=True) @ basis.T).abs().max())

    assert overlap(once) > 1e-4
    assert overlap(twice) < 2e-6
    torch.testing.assert_close(coefficients @ basis + twice, y, rtol=0, atol=1e-5)


def test_deficient_block_is_completed_with_new_directions():
    generator = torch.Generator().manual_seed(0)
    basis = orthonormal_rows(torch.randn(20, 100, generator=generator))
    y = torch.randn(2, 100, generator=generator)
    y = torch.cat([y, y[:1] + y[1:], torch.zeros(1, 100)])
    y = deflate(y, basis)[0]
    coupling, q = complete_block(y, basis, 1e-6, generator)
    gram = torch.cat([basis.double(), q]) @ torch.cat([basis.double(), q]).T
    torch.testing.assert_close(gram, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(coupling @ q, y.double(), rtol=0, atol=1e-5)


def test_small_directions_of_a_deficient_block_are_kept():
    # Six large values, then noise a million times smaller in the square: the wanted vectors of a
    # rank above six are among what a careless completion drops.
    generator = torch.Generator().manual_seed(0)
    basis = orthonormal_rows(torch.randn(20, 100, dtype=torch.float64, generator=generator))
    y = torch.randn(6, 100, dtype=torch.float64, generator=generator)
    y = y * torch.tensor([1.0, 1e-2, 1e-5, 1e-8, 1e-11, 1e-13], dtype=torch.float64)[:, None]
    mixing = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    y = mixing @ deflate(y, basis)[0]
    coupling, q = complete_block(y, basis, 1e-15, generator)
    torch.testing.assert_close(coupling @ q, y, rtol=0, atol=1e-14)
    assert float((q @ basis.T).abs().max()) < 1e-14


def test_low_rank_on_bf16_noise():
    generator = torch.Generator().manual_seed(1)
    matrix = with_spectrum(307, 232, spectrum("low rank + noise", 232, generator), generator)
    matrix = matrix.bfloat16()
    for tol in (1e-3, 1e-5):
        assert_good(matrix, randomized_svd(matrix, 16, method="krylov", tol=tol), 1e-3)


def test_vanishing_probes_stay_finite():
    probes = Probes.draw(torch.zeros(1, 50), torch.Generator().manual_seed(0))
    for _ in range(6):
        probes.advance(torch.zeros_like(probes.rows))
    basis = orthonormal_rows(torch.randn(3, 50))
    assert float(probes.outside_norm(basis)) == 0.0


@pytest.mark.parametrize("failures", [1, 2, 3])
@pytest.mark.parametrize("name", ["eigh", "svd"])
def test_lapack_failures_are_worked_around(monkeypatch, name, failures):
    matrix = with_spectrum(
        40, 40, spectrum("power law", 40, torch.Generator().manual_seed(0)), torch.Generator()
    )
    real = getattr(torch.linalg, name)
    calls: list[None] = []

    def fails_at_first(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        # eigh fails for good only if it fails twice in a row; every other call does.
        if len(calls) <= failures and (name == "svd" or len(calls) % 2 == 1):
            raise torch.linalg.LinAlgError("failed to converge")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, name, fails_at_first)
    if name == "svd":
        u, s, vh = dense.small_svd(matrix)
        torch.testing.assert_close((u * s) @ vh, matrix, rtol=0, atol=1e-7)
        eye = torch.eye(40, dtype=torch.float64)
        torch.testing.assert_close(u.T @ u, eye)
        torch.testing.assert_close(vh @ vh.T, eye)
        assert bool((s[:-1] >= s[1:]).all())
    else:
        assert_good(matrix, randomized_svd(matrix, 5), 1e-3)
    assert len(calls) >= min(failures, 2)


def test_stack_in_one_go_equals_one_by_one():
    # What runs on a GPU; on the CPU matrices go one by one, so it is called by its inner name.
    generator = torch.Generator().manual_seed(2)
    kinds = ("slow power law", "power law", "rank-deficient", "exponential", "flat")
    stack = torch.stack(
        [with_spectrum(300, 330, spectrum(k, 300, generator), generator) for k in kinds]
    ).float()
    for method in ("auto", "gram", "gram-krylov", "chebyshev"):
        settings = api._Settings(5, 1e-3, None, None, method, 0, torch.finfo(torch.float32).eps)
        pieces = api._decompose_stack(stack, settings)
        result = api._assemble(pieces, stack, 0, "u")
        for index, matrix in enumerate(stack):
            one = SVDResult(
                result.U[index], result.S[index], result.Vh[index], result.errors[index]
            )
            q = quality(matrix, one)
            assert q.pve <= one.error + q.slack
            assert q.orthogonality < 2e-6
            if method in ("auto", "gram"):
                assert one.error <= 1e-3
