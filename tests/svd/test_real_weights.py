"""Every linear layer of real models, default settings, against the truth in fp64."""

from __future__ import annotations

import pytest
import torch

from loraxs_kernels.svd import randomized_svd

from .cases import quality

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("model", ["minilm", "smollm2-135m"])
def test_whole_model(model, rank):
    weights = pytest.importorskip("bench.svd_models")
    try:
        matrices = weights.load(model)
    except weights.Missing as missing:
        pytest.skip(str(missing))
    names = list(matrices)
    assert len(names) == {"minilm": 36, "smollm2-135m": 210}[model]
    # All layers at the rank of the defaults; a spread of them at the other.
    for name in names if rank == 16 else names[::7]:
        result = randomized_svd(matrices[name], rank)
        q = quality(matrices[name], result)
        assert q.pve <= result.error <= 1e-3, name
        assert q.orthogonality < 2e-6, name
        assert result.U.dtype is torch.float32
