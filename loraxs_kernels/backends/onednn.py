"""The CPU backend: frozen matrices packed once for oneDNN, the side path added while Y is in cache.

    y = x W^T + b + s * (q R^T) B^T      one packed product, then a rank-r update of its result
    dx = G W + s * (P R) A               the same with the roles swapped (packed W^T)

The compiled operators of ``csrc/cpu`` do a whole pass in one call. Without them the same steps are
PyTorch calls: slower for few rows, equal in result. 16-bit inputs on a CPU without 16-bit matrix
instructions go through float32 (the packed copies are float32 then); float64 runs by plain calls.

Memory: a packed copy of W for the forward and one of its transpose for the backward, made at first
use; ``python -m loraxs_kernels info`` and ``packing.packed_bytes`` say how much that is, and
``LORAXS_PREPACK=0`` or ``prepack=False`` does without.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from loraxs_kernels import sorting
from loraxs_kernels.backends import _native, packing, reference

if TYPE_CHECKING:
    from loraxs_kernels.dispatch import Call

_SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Up to so many rows the product is bound by reading W. The compiled operators then stream W
#: itself, in 16 bits if that is what it has; oneDNN's packed product costs more to start than it
#: saves.
_FEW_ROWS = 16


@functools.cache
def unavailable() -> str | None:
    """Why oneDNN's linear operators cannot be used here, or ``None``."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    for op in ("_reorder_linear_weight", "_linear_pointwise"):
        if not hasattr(torch.ops.mkldnn, op):
            return f"this PyTorch has no torch.ops.mkldnn.{op}"
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16), None)
        torch.ops.mkldnn._linear_pointwise(torch.zeros(1, 16), packed, None, "none", [], "")
    except RuntimeError as error:
        return f"oneDNN does not run on this processor: {error}"
    return None


def unsupported(call: Call) -> str | None:
    """Why the backend cannot run ``call``, or ``None``."""
    if call.device != "cpu":
        return f"x is on {call.device}, oneDNN runs on the CPU"
    if call.dtype not in _SUPPORTED:
        return f"x has dtype {call.dtype}"
    return None


@functools.cache
def packed_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrices are packed for inputs of ``dtype`` on this processor."""
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype in native and native[dtype]():
        return dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def _packed(
    weight: Tensor, rows: int, dtype: torch.dtype, kind: str, prepack: int
) -> Tensor | None:
    """The weight packed for oneDNN, or ``None`` for a plain product."""
    if rows == 0 or dtype == torch.float64:
        return None
    return packing.lookup(weight, kind, packed_dtype(dtype), prepack)


def _streams(weight: Tensor, rows: int, dtype: torch.dtype) -> bool:
    """Whether the compiled operators read ``weight`` as it is."""
    return 0 < rows <= _FEW_ROWS and weight.dtype == dtype and weight.is_contiguous()


def _transposed(
    weight: Tensor, rows: int, dtype: torch.dtype, prepack: int, native: bool
) -> Tensor | None:
    """W^T for ``dx``: packed, or for few rows dense, unless the packed copy is there anyway."""
    if (
        native
        and 0 < rows <= _FEW_ROWS
        and not packing.has(weight, "packed_t", packed_dtype(dtype))
    ):
        return packing.lookup(weight, "dense_t", dtype, prepack)
    return _packed(weight, rows, dtype, "packed_t", prepack)


def _small_packed(matrix: Tensor, dtype: torch.dtype, kind: str, pack: int) -> Tensor | None:
    """A packed basis: only 16-bit instructions of oneDNN beat the operators' own kernels."""
    if packed_dtype(dtype) != dtype or dtype not in (torch.bfloat16, torch.float16):
        return None
    return packing.lookup(matrix, kind, dtype, pack)


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, work: torch.dtype) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x.to(work), packed, None if bias is None else bias.to(work), "none", [], ""
    )
    return y


def _groups(
    R: Tensor, ids: Tensor | None, order: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if ids is not None and order is None:
        return sorting.sort_ids(ids, R.shape[0])
    return order, offsets


def _core(R: Tensor, dtype: torch.dtype) -> Tensor:
    """R as the compiled operators take it: contiguous, float32 or the dtype of x."""
    R = R.detach()
    if R.dtype not in (torch.float32, dtype):
        R = R.float()
    return R.contiguous()


def forward(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    scaling: float,
    dropout_p: float,
    prepack: int,
) -> tuple[Tensor, Tensor]:
    """``(y [M, N], q [M, r])``; arguments as in :func:`loraxs_kernels.ops.forward`."""
    dtype = x.dtype
    native = None if dtype == torch.float64 else _native.operators()
    operand = None
    if weight is not None:
        if native is not None and _streams(weight, x.shape[0], dtype):
            operand = weight
        else:
            operand = _packed(weight, x.shape[0], dtype, "packed", prepack)
        if operand is None:
            base = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if native is not None:
        order, offsets = _groups(R, ids, order, offsets)
        if operand is not None and bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        result: tuple[Tensor, Tensor] = native.forward.default(
            x, operand, None if operand is None else bias, None if base is None else base.to(dtype),
            packing.dense(A, "dense", dtype, prepack), _core(R, dtype),
            packing.dense(B, "dense_t", dtype, prepack),
            _small_packed(A, dtype, "packed", prepack), _small_packed(B, dtype, "packed", prepack),
            seed, 0, ids, order, offsets, scaling, dropout_p,
        )  # fmt: skip
        return result
    q = reference.shrink(x, A, seed, dropout_p)
    t = reference.apply_core(q, R, ids, transpose=True)
    side = t @ packing.dense(B, "dense_t", dtype, prepack)
    if operand is None:
        assert base is not None
        return torch.add(base.to(dtype), side, alpha=scaling), q
    work = packed_dtype(dtype)
    return _linear(x, operand, bias, work).add_(side, alpha=scaling).to(dtype), q


def backward(
    grad_y: Tensor,
    q: Tensor,
    weight: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    seed: Tensor | None,
    ids: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    scaling: float,
    dropout_p: float,
    need_dx: bool,
    need_dR: bool,
    need_db: bool,
    prepack: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx [M, K], dR like R, db [N])``; what is not needed is an empty tensor."""
    dtype = grad_y.dtype
    native = None if dtype == torch.float64 else _native.operators()
    operand_t = None
    if weight is not None and need_dx:
        operand_t = _transposed(weight, grad_y.shape[0], dtype, prepack, native is not None)
    if native is None:
        side_only = None if operand_t is not None else weight
        dx, dR, db = reference.backward(
            grad_y, q, side_only, A, R, B, seed, ids, order, offsets,
            scaling, dropout_p, need_dx, need_dR, need_db, prepack,
        )  # fmt: skip
        if operand_t is not None:
            dx = _linear(grad_y, operand_t, None, packed_dtype(dtype)).add_(dx).to(dtype)
        return dx, dR, db
    order, offsets = _groups(R, ids, order, offsets)
    core = _core(R, dtype)
    dx, dR, db = native.backward.default(
        grad_y, q.contiguous(), operand_t, packing.dense(A, "dense", dtype, prepack), core,
        packing.dense(B, "dense_t", dtype, prepack),
        _small_packed(B, dtype, "packed_t", prepack), _small_packed(A, dtype, "packed_t", prepack),
        seed, 0, ids, order, offsets, scaling, dropout_p,
        need_dx, need_dR, need_db, operand_t is not None,
    )  # fmt: skip
    if weight is not None and need_dx and operand_t is None:
        dx = dx.addmm_(grad_y, weight.detach().to(dtype))
    return dx, dR.to(R.dtype), db
