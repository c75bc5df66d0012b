"""Adapter ids: their check and their sort, shared by the operators, the backends and the API."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(ids: Tensor, num_adapters: int) -> None:
    """Raise ``ValueError`` unless all ids are in ``[-1, num_adapters)``; reads the tensor back."""
    if ids.numel() == 0:
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < -1 or high >= num_adapters:
        raise ValueError(
            f"adapter_ids: got ids from {low} to {high}, "
            f"expected -1 (base only) to {num_adapters - 1} (R holds {num_adapters} adapters)"
        )


def sort_ids(ids: Tensor, num_adapters: int) -> tuple[Tensor, Tensor]:
    """Rows sorted stably by adapter, and where each adapter's rows start.

    Args:
        ids: int64 ``[M]`` in ``[-1, num_adapters)``.
        num_adapters: n.

    Returns:
        ``order`` int64 ``[M]`` and ``offsets`` int64 ``[n + 2]``: the rows of adapter ``a`` are
        ``order[offsets[a + 1]:offsets[a + 2]]``, those without adapter ``order[:offsets[1]]``.
    """
    counts = torch.bincount(ids + 1, minlength=num_adapters + 1)
    offsets = torch.zeros(num_adapters + 2, dtype=torch.int64, device=ids.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return torch.sort(ids, stable=True).indices, offsets
