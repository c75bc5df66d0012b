"""Signs, and the official LoRA-XS factors as scikit-learn computes them."""

from __future__ import annotations

import pytest
import torch

from loraxs_kernels.svd import randomized_svd

from .cases import with_spectrum

sklearn_decomposition = pytest.importorskip("sklearn.decomposition")
sklearn_extmath = pytest.importorskip("sklearn.utils.extmath")

KINDS = [(400, 300), (300, 400), (250, 250)]


def separated(shape: tuple[int, int]) -> torch.Tensor:
    """Vectors far enough apart for scikit-learn's ten iterations to find them."""
    s = torch.cat([1.5 * 0.8 ** torch.arange(12.0), torch.full((min(shape) - 12,), 0.02)])
    return with_spectrum(*shape, s.double(), torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize("shape", KINDS)
@pytest.mark.parametrize("rule", ["u", "v"])
def test_largest_entry_is_positive(shape, rule):
    result = randomized_svd(separated(shape), 10, sign=rule)
    columns = result.U if rule == "u" else result.Vh.T
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all())
    # The triplets still belong together.
    torch.testing.assert_close(
        (result.U * result.S) @ result.Vh,
        (lambda r: (r.U * r.S) @ r.Vh)(randomized_svd(separated(shape), 10, sign=None)),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("shape", KINDS)
@pytest.mark.parametrize("rule", ["u", "v"])
def test_official_factors(shape, rule):
    weight = separated(shape)
    rank = 8
    # What the official code calls, on NumPy and on the transpose: lora_A = Σ Vᵀ, lora_B = U.
    model = sklearn_decomposition.TruncatedSVD(n_components=rank, n_iter=10, random_state=42)
    scores = model.fit_transform(weight.T.numpy())  # V Σ
    values = model.singular_values_
    right, left = scores / values, model.components_
    # Its sign rule changed with the release (1.5 decides by the rows of components_, which are our
    # left vectors); both rules are the public function svd_flip.
    right, left = sklearn_extmath.svd_flip(right, left, u_based_decision=rule == "v")
    ours = randomized_svd(weight, rank, sign=rule, tol=1e-6)
    torch.testing.assert_close(ours.S, torch.from_numpy(values.copy()).float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.U, torch.from_numpy(left.T.copy()).float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.Vh, torch.from_numpy(right.T.copy()).float(), rtol=0, atol=1e-4)


def test_official_default_signs_of_this_scikit_learn():
    import sklearn

    weight = separated((400, 300))
    model = sklearn_decomposition.TruncatedSVD(n_components=6, n_iter=10, random_state=42)
    model.fit(weight.T.numpy())
    version = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
    ours = randomized_svd(weight, 6, sign="u" if version >= (1, 5) else "v")
    theirs = torch.from_numpy(model.components_.T.copy()).float()
    torch.testing.assert_close(ours.U, theirs, rtol=0, atol=1e-4)
