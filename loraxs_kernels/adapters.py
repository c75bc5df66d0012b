"""Which adapter each row uses: a batch of ids, validated and sorted once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loraxs_kernels import sorting

ID_DTYPES = (torch.int32, torch.int64)


class RowIds(NamedTuple):
    """One adapter id per row of the flattened input, sorted if it is known to be valid."""

    ids: Tensor
    order: Tensor | None
    offsets: Tensor | None


class AdapterBatch:
    """Adapter ids, validated and sorted once.

    Pass it as ``adapter_ids`` to any number of layers and passes: each of them is spared the check
    and the sort.

    Args:
        ids: int32 or int64 tensor (or a list of ints, or of such lists), one id per row or per
            sequence, of any shape; -1 means base only.
        num_adapters: number of adapters n; ids are below it.

    Raises:
        TypeError: ids of another dtype, ``num_adapters`` not an int.
        ValueError: an id out of range, ``num_adapters < 1``.
    """

    def __init__(self, ids: Tensor | Sequence[Any], num_adapters: int) -> None:
        if isinstance(num_adapters, bool) or not isinstance(num_adapters, int):
            raise TypeError(f"num_adapters: got {type(num_adapters).__name__}, expected int")
        if num_adapters < 1:
            raise ValueError(f"num_adapters: got {num_adapters}, expected at least 1")
        if isinstance(ids, (list, tuple)):
            ids = _from_list(ids)
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids: got {type(ids).__name__}, expected an integer tensor")
        if ids.dtype not in ID_DTYPES:
            raise TypeError(f"ids: got dtype {ids.dtype}, expected torch.int32 or torch.int64")
        sorting.check_ids(ids, num_adapters)
        self.num_adapters = num_adapters
        #: The ids as int64, in the shape they were given in; a copy, so that they stay valid.
        self.ids = ids.to(torch.int64, copy=True).contiguous()
        self._rows: dict[int, RowIds] = {}
        self.rows(1)

    def rows(self, repeats: int) -> RowIds:
        """Sorted ids of the rows, each id repeated for ``repeats`` consecutive rows."""
        found = self._rows.get(repeats)
        if found is None:
            ids = self.ids.reshape(-1)
            if repeats == 1:
                order, offsets = sorting.sort_ids(ids, self.num_adapters)
            else:
                once = self.rows(1)
                assert once.order is not None and once.offsets is not None
                within = torch.arange(repeats, device=ids.device)
                order = (once.order.unsqueeze(1) * repeats + within).flatten()
                offsets = once.offsets * repeats
                ids = ids.repeat_interleave(repeats)
            found = self._rows[repeats] = RowIds(ids, order, offsets)
        return found

    def to(self, device: torch.device | str) -> AdapterBatch:
        """The same batch on another device, without another check."""
        moved = object.__new__(AdapterBatch)
        moved.num_adapters = self.num_adapters
        moved.ids = self.ids.to(device)
        moved._rows = {}
        return moved

    def __repr__(self) -> str:
        return f"AdapterBatch({tuple(self.ids.shape)} ids, num_adapters={self.num_adapters})"


def _from_list(ids: Sequence[Any]) -> Tensor:
    """An int64 tensor of plain ints: floats and bools are refused, not rounded."""
    flat = list(ids)
    while any(isinstance(i, (list, tuple)) for i in flat):
        flat = [j for i in flat for j in (i if isinstance(i, (list, tuple)) else (i,))]
    for i in flat:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"ids: got an entry of type {type(i).__name__}, expected ints")
    try:
        return torch.tensor(ids, dtype=torch.int64)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"ids: got {ids}, expected rows of equal length: {error}") from error
