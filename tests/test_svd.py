"""The randomized SVD against LAPACK in float64: subspaces, values, the certificate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraxs_kernels.svd import randomized_svd


def spectrum(kind: str, n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "flat power law": i**-0.3,
        "steep power law": i**-1.5,
        "cluster": torch.where(i <= 5, 2.0, i**-0.5),
        "low rank": torch.where(i <= 9, 1.0 / i, 0.0),
    }[kind]


@pytest.mark.parametrize("kind", ["flat power law", "steep power law", "cluster", "low rank"])
@pytest.mark.parametrize(("m", "n", "rank"), [(700, 640, 16), (90, 300, 8), (40, 7, 7), (1, 9, 1)])
def test_error_per_vector(kind: str, m: int, n: int, rank: int) -> None:
    g = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    s = spectrum(kind, k)
    W = (U * s) @ V.T
    got = randomized_svd(W.float(), rank)
    # Where nothing is left beyond the rank, float32 rounding of the largest value is the scale.
    beyond = float(s[rank]) ** 2 if rank < k else 0.0
    scale = beyond if beyond > 0.0 else float(s[0]) ** 2
    along = (W @ got.Vh.double().T).square().sum(0)
    assert ((s[:rank] ** 2 - along).abs().max() / scale) <= 1e-3
    torch.testing.assert_close(got.S.double(), s[:rank], rtol=1e-3, atol=1e-6)
    eye = torch.eye(rank)
    torch.testing.assert_close(got.Vh @ got.Vh.T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.U.T @ got.U, eye, rtol=0, atol=1e-5)
    assert torch.equal(got.U, randomized_svd(W.float(), rank).U)


@pytest.mark.parametrize(
    ("matrix", "rank", "error", "message"),
    [
        (torch.full((4, 4), float("nan")), 2, ValueError, "matrix"),
        (torch.randn(4, 4), 5, ValueError, "rank"),
        (torch.randn(4), 1, ValueError, "matrix"),
        (torch.ones(4, 4, dtype=torch.int64), 1, TypeError, "matrix"),
    ],
)
def test_bad_input(matrix: Tensor, rank: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        randomized_svd(matrix, rank)
