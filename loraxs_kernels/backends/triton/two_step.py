"""The same pass by library products: what the fused kernel has to beat to be used after tuning.

The base product by the vendor's library, the side path by small ones, added with ``addmm(beta=1)``:
four or five launches instead of one. Only the autotuner chooses it, and ``info`` then says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraxs_kernels.backends import reference

if TYPE_CHECKING:
    from loraxs_kernels.backends.roles import Operands


def run(o: Operands) -> None:
    """Compute every output of ``o`` (see :class:`~.launch.Operands` for the roles)."""
    x, dtype = o.x, o.x.dtype
    masked = x if o.mask_output else reference.mask_side_path(x, o.seed, o.dropout_p)
    side = masked @ o.a.mT
    if o.side is not None:
        o.side.copy_(side)
    if o.d is not None:
        t = reference.apply_core(side, o.core, o.ids, transpose=False)
        if o.w is not None:
            torch.mm(x, o.w.mT, out=o.d)
        elif o.base is not None:
            o.d.copy_(o.base)
        else:
            o.d.zero_()
        if o.bias is not None:
            o.d.add_(o.bias.to(dtype))
        if o.mask_output and o.dropout_p > 0.0:
            o.d.add_(reference.mask_side_path(t @ o.b.mT, o.seed, o.dropout_p), alpha=o.scaling)
        else:
            o.d.addmm_(t, o.b.mT, alpha=o.scaling)
    if o.dR is not None:
        assert o.q is not None
        o.dR.copy_(o.scaling * reference.core_gradient(side, o.q, o.dR, o.ids))
    if o.db is not None:
        o.db.copy_(x.sum(0))
