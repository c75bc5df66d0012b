"""Which adapter each row asks for: how popular adapters are, and in which order the rows come.

The kinds are those by which Punica (arXiv 2310.18547) tests multi-adapter kernels, and rows that
want no adapter (-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: identical: one adapter for all. uniform: each row draws any. zipf: few are popular, most are
#: rare. distinct: as many different ones as there are rows or adapters, evenly. base: a quarter of
#: the rows want none, the others draw uniformly.
KINDS = ("identical", "uniform", "zipf", "distinct", "base")
ORDERS = ("sorted", "shuffled")

#: The i-th most popular adapter is drawn with a probability proportional to i to this power.
ZIPF_EXPONENT = -1.5


def _draw(kind: str, rows: int, adapters: int, generator: torch.Generator) -> Tensor:
    if kind == "identical":
        return torch.full((rows,), int(torch.randint(adapters, (1,), generator=generator)))
    if kind == "uniform":
        return torch.randint(adapters, (rows,), generator=generator)
    names = torch.randperm(adapters, generator=generator)
    if kind == "zipf":
        weights = torch.arange(1, adapters + 1, dtype=torch.float64) ** ZIPF_EXPONENT
        return names[torch.multinomial(weights, rows, replacement=True, generator=generator)]
    if kind == "distinct":
        return names[torch.arange(rows) % adapters]
    ids = torch.randint(adapters, (rows,), generator=generator)
    ids[: max(1, rows // 4)] = -1
    return ids


def draw(kind: str, order: str, rows: int, adapters: int, seed: int = 0) -> Tensor:
    """Adapter ids of ``rows`` rows.

    Args:
        kind: one of :data:`KINDS`.
        order: one of :data:`ORDERS`; both orders of a kind hold the same ids.
        rows: M, at least 1.
        adapters: n, at least 1.
        seed: the same seed draws the same ids.

    Returns:
        int64 ``[rows]`` in ``[-1, adapters)``, on the CPU.

    Raises:
        ValueError: an argument is none of these.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}, expected one of {', '.join(ORDERS)}")
    if rows < 1 or adapters < 1:
        raise ValueError(f"rows, adapters: got {rows}, {adapters}, expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    ids = _draw(kind, rows, adapters, generator)
    if order == "sorted":
        return ids.sort().values
    return ids[torch.randperm(rows, generator=generator)]
