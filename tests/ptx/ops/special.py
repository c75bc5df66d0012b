"""Read-only registers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.errors import UnknownInstruction
from tests.ptx.machine import Active
from tests.ptx.numeric import Array

_BY_NAME: dict[str, Callable[[Active], Array | int]] = {
    "%laneid": lambda a: np.arange(a.cta.threads) & 31,
    "%warpid": lambda a: np.arange(a.cta.threads) >> 5,
    "%nwarpid": lambda a: a.cta.warps,
    "%smid": lambda a: 0,
    "%nsmid": lambda a: 1,
    "%gridid": lambda a: 0,
    "%clock": lambda a: sum(a.cta.counts),
    "%clock64": lambda a: sum(a.cta.counts),
    "%globaltimer": lambda a: sum(a.cta.counts),
    "%lanemask_lt": lambda a: (1 << (np.arange(a.cta.threads) & 31)) - 1,
    "%lanemask_le": lambda a: (2 << (np.arange(a.cta.threads) & 31)) - 1,
    "%lanemask_eq": lambda a: 1 << (np.arange(a.cta.threads) & 31),
    "%lanemask_ge": lambda a: 0xFFFFFFFF & ~((1 << (np.arange(a.cta.threads) & 31)) - 1),
    "%lanemask_gt": lambda a: 0xFFFFFFFF & ~((2 << (np.arange(a.cta.threads) & 31)) - 1),
    "%dynamic_smem_size": lambda a: a.cta.grid.dynamic_bytes,
    "%total_smem_size": lambda a: a.cta.grid.shared_bytes,
    # A launch without clusters is a launch of clusters of one CTA. Clusters lie along x.
    "%cluster_ctarank": lambda a: a.cta.rank,
    "%cluster_nctarank": lambda a: a.cta.grid.cluster,
    "%cluster_ctaid.x": lambda a: a.cta.rank,
    "%cluster_nctaid.x": lambda a: a.cta.grid.cluster,
    "%is_explicit_cluster": lambda a: int(a.cta.grid.cluster > 1),
}
for _axis, _letter in enumerate("xyz"):
    _BY_NAME.update({
        f"%tid.{_letter}": lambda a, n=_axis: a.cta.grid.thread_index[n],  # type: ignore[misc]
        f"%ntid.{_letter}": lambda a, n=_axis: a.cta.grid.block[n],  # type: ignore[misc]
        f"%ctaid.{_letter}": lambda a, n=_axis: a.cta.index[n],  # type: ignore[misc]
        f"%nctaid.{_letter}": lambda a, n=_axis: a.cta.grid.shape[n],  # type: ignore[misc]
        f"%clusterid.{_letter}": lambda a, n=_axis: (  # type: ignore[misc]
            a.cta.index[n] // (1 if n else a.cta.grid.cluster)),
        f"%nclusterid.{_letter}": lambda a, n=_axis: (  # type: ignore[misc]
            a.cta.grid.shape[n] // (1 if n else a.cta.grid.cluster)),
    })  # fmt: skip
    if _axis:
        _BY_NAME[f"%cluster_ctaid.{_letter}"] = lambda a: 0
        _BY_NAME[f"%cluster_nctaid.{_letter}"] = lambda a: 1


def special_register(name: str, dtype: type[np.generic]) -> Callable[[Active], Array]:
    """A reader of a special register as ``dtype``."""
    try:
        value = _BY_NAME[name]
    except KeyError:
        raise UnknownInstruction(f"unknown special register {name}") from None

    def read(active: Active) -> Array:
        found = np.asarray(value(active)).astype(dtype)
        return np.broadcast_to(found, active.cta.threads).copy()

    return read
