"""The CPU backend: frozen matrices packed once, the side path added while Y is in cache.

    y = x W^T + b + s * (q R^T) B^T      one packed product, with or followed by a rank-r update
    dx = G W + s * (P R) A               the same with the roles swapped (packed W^T)

The compiled operators of ``csrc/cpu`` do a whole pass in one call. The product is their own where
that is the fastest (:func:`own_product`), and oneDNN's elsewhere. Without them the same steps are
PyTorch calls: slower for few rows, equal in result. 16-bit inputs on a CPU without 16-bit matrix
instructions go through float32 (the packed copies are float32 then); float64 runs by plain calls.

Memory: where copies are used (:func:`way_of`), one of W for the forward and one of its transpose
for the backward, made at first use; ``python -m loraxs_kernels info`` and ``packing.packed_bytes``
say how much that is, and ``LORAXS_PREPACK=0`` or ``prepack=False`` does without.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loraxs_kernels import _native, sorting
from loraxs_kernels.backends import packing, reference

if TYPE_CHECKING:
    from loraxs_kernels.dispatch import Call

#: The dropout mask of a block of columns can be that of the whole (seeds of three numbers).
MASKS_COLUMN_BLOCKS = True

_SUPPORTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Up to so many rows the product is bound by reading W. The compiled operators then stream W
#: itself, in 16 bits if that is what it has. More rows take a packed copy: the operators' own
#: product soon pays, oneDNN's costs more to start than it saves (measured; the last is for 16-bit
#: weights of more than 8 M numbers, which cost more to widen on the way).
_FEW_ROWS_OWN, _FEW_ROWS_ONEDNN, _FEW_ROWS_ONEDNN_LARGE = 3, 16, 2

#: From so many rows on the own product packs W in every call, which costs a few percent and no
#: memory; it can from so many (with fewer rows the operators stream a dense weight).
_PACKING_PAYS_ROWS, _PACKING_ROWS = 128, 25


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


@functools.cache
def own_product(dtype: torch.dtype) -> bool:
    """Whether the compiled operators' own float32 product is the fastest here for ``dtype``.

    It is with 256-bit vectors: 180-195 GFLOP/s against oneDNN's 150-160 and 120-180 of F.linear
    (2 cores of Zen 3).
    """
    native = _native.operators()
    return native is not None and native.isa() == "avx2" and packed_dtype(dtype) == torch.float32


def way_of(weight: Tensor, rows: int, dtype: torch.dtype) -> str:
    """How the compiled operators compute the base product.

    ``"stream"``: few rows, W is read as it is. ``"panels"``: their own product, with the side path
    as part of it, from a copy in panels. ``"dense"``: the same, W is packed on the way.
    ``"packed"``: oneDNN with a packed copy.
    """
    if own_product(dtype):
        if rows <= _FEW_ROWS_OWN:
            return "stream"
        return "dense" if rows >= _PACKING_PAYS_ROWS and _is_dense(weight, dtype) else "panels"
    small = dtype == torch.float32 or weight.numel() <= 1 << 23
    return "stream" if rows <= (_FEW_ROWS_ONEDNN if small else _FEW_ROWS_ONEDNN_LARGE) else "packed"


def _is_dense(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether W lies as the own product can take it: by rows or by columns, without gaps."""
    return weight.dtype in (dtype, torch.float32) and (
        weight.is_contiguous() or weight.t().is_contiguous()
    )


#: Of an operator's operands, those that are copies: product, A, Bt, shrink, expand. ``None``: the
#: matrix itself will do, or there is none.
Copies = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]


class _Operands(NamedTuple):
    """The frozen operands of a compiled operator.

    Attributes:
        product: W or W^T, dense or packed; ``None``: not the operator's business.
        A: ``[r, in]``, contiguous.
        Bt: ``[r, out]``, contiguous.
        shrink, expand: the bases packed as linear weights of the first and the last side product,
            where oneDNN's 16-bit instructions beat the operators' own kernels.
    """

    product: Tensor | None
    A: Tensor
    Bt: Tensor
    shrink: Tensor | None
    expand: Tensor | None


def _operands(
    weight: Tensor | None, A: Tensor, B: Tensor, rows: int, dtype: torch.dtype, prepack: int,
    *, backward: bool,
) -> _Operands:  # fmt: skip
    """The operands of one pass; their copies are remembered as long as W, A and B stay the same."""
    way = "none" if weight is None or rows == 0 else way_of(weight, rows, dtype)
    product = None if weight is None else as_it_is(weight, way, dtype, backward)
    copied = way if product is None else "none"
    sources = (A, B) if weight is None else (weight, A, B)

    def make() -> tuple[Copies, bool]:
        copy = None
        if weight is not None and copied != "none":
            copy = _product_copy(weight, copied, dtype, prepack, backward)
        plain_a = A.dtype == dtype and A.is_contiguous()
        made = (
            copy,
            # Held here, A would never die.
            None if plain_a else packing.dense(A, "dense", dtype, prepack),
            packing.dense(B, "dense_t", dtype, prepack),
            *_side_copies(A, B, dtype, prepack, backward),
        )
        complete = packing.has(B, "dense_t", dtype) and (copy is not None or copied == "none")
        return made, complete and (plain_a or packing.has(A, "dense", dtype))

    copy, a, bt, shrink, expand = packing.bundle((backward, copied, dtype, prepack), sources, make)
    missing = product is None and copy is None and way == "panels"  # not to be kept, or not yet
    if weight is not None and missing and rows >= _PACKING_ROWS and _is_dense(weight, dtype):
        product = as_it_is(weight, "dense", dtype, backward)
    return _Operands(
        copy if product is None else product, A if a is None else a, bt, shrink, expand
    )


def copies_held(
    weight: Tensor, A: Tensor, B: Tensor, way: str, dtype: torch.dtype, prepack: int,
    *, backward: bool,
) -> Copies | None:  # fmt: skip
    """The copies that one pass needs, if an earlier one has left them all."""
    copied = way if as_it_is(weight, way, dtype, backward) is None else "none"
    held: Copies | None = packing.recall((backward, copied, dtype, prepack), (weight, A, B))
    return held


def as_it_is(weight: Tensor, way: str, dtype: torch.dtype, backward: bool) -> Tensor | None:
    """W (or a view of W^T), where the operators take it without a copy."""
    if way == "dense":
        return weight.t() if backward else weight
    if way == "stream" and not backward and weight.dtype == dtype and weight.is_contiguous():
        return weight
    return None


def _product_copy(
    weight: Tensor, way: str, dtype: torch.dtype, prepack: int, backward: bool
) -> Tensor | None:
    """W or W^T packed; W^T for few rows dense, unless the packed copy is there anyway."""
    work = packed_dtype(dtype)
    kind = "panels" if own_product(dtype) else "packed"
    if backward:
        kind += "_t"
        if way == "stream" and not packing.has(weight, kind, work):
            return packing.lookup(weight, "dense_t", dtype, prepack)
    return packing.lookup(weight, kind, work, prepack)


def _side_copies(
    A: Tensor, B: Tensor, dtype: torch.dtype, prepack: int, backward: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The bases packed for oneDNN, where it has instructions for 16-bit numbers."""
    if dtype not in (torch.bfloat16, torch.float16) or packed_dtype(dtype) != dtype:
        return None, None
    first, last, kind = (B, A, "packed_t") if backward else (A, B, "packed")
    return packing.lookup(first, kind, dtype, prepack), packing.lookup(last, kind, dtype, prepack)


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, work: torch.dtype) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(
        x.to(work), packed, None if bias is None else bias.to(work), "none", [], ""
    )
    return y


def compiled(dtype: torch.dtype) -> Any | None:
    """The compiled operators, where they are there and know ``dtype``."""
    return None if dtype == torch.float64 else _native.operators()


def _core(R: Tensor, dtype: torch.dtype) -> Tensor:
    """R as the compiled operators take it: contiguous, float32 or the dtype of x."""
    if R.dtype not in (torch.float32, dtype):
        R = R.float()
    return R if R.is_contiguous() else R.contiguous()


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
    native = compiled(dtype)
    if native is None:
        return _forward_by_parts(
            x, weight, base, A, R, B, bias, seed, ids, scaling, dropout_p, prepack
        )
    operands = _operands(weight, A, B, x.shape[0], dtype, prepack, backward=False)
    if weight is not None and operands.product is None:
        base = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if operands.product is None:
        bias = None
    elif bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if base is not None and base.dtype != dtype:
        base = base.to(dtype)
    if ids is not None and order is None:
        order, offsets = sorting.sort_ids(ids, R.shape[0])
    result: tuple[Tensor, Tensor] = native.forward.default(
        x, operands.product, bias, base, operands.A, _core(R, dtype), operands.Bt,
        operands.shrink, operands.expand, seed, 0, ids, order, offsets, scaling, dropout_p,
    )  # fmt: skip
    return result


def _forward_by_parts(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    ids: Tensor | None,
    scaling: float,
    dropout_p: float,
    prepack: int,
) -> tuple[Tensor, Tensor]:
    """The forward as PyTorch calls, where the compiled operators are missing."""
    dtype, operand = x.dtype, None
    if weight is not None:
        operand = _packed(weight, x.shape[0], dtype, "packed", prepack)
        if operand is None:
            base = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
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
    native = compiled(dtype)
    if native is None:
        operand_t = None
        if weight is not None and need_dx:
            operand_t = _packed(weight, grad_y.shape[0], dtype, "packed_t", prepack)
        side_only = None if operand_t is not None else weight
        dx, dR, db = reference.backward(
            grad_y, q, side_only, A, R, B, seed, ids, order, offsets,
            scaling, dropout_p, need_dx, need_dR, need_db, prepack,
        )  # fmt: skip
        if operand_t is not None:
            dx = _linear(grad_y, operand_t, None, packed_dtype(dtype)).add_(dx).to(dtype)
        return dx, dR, db
    through = weight if need_dx else None
    operands = _operands(through, A, B, grad_y.shape[0], dtype, prepack, backward=True)
    if ids is not None and order is None:
        order, offsets = sorting.sort_ids(ids, R.shape[0])
    dx, dR, db = native.backward.default(
        grad_y, q.contiguous(), operands.product, operands.A, _core(R, dtype), operands.Bt,
        operands.shrink, operands.expand, seed, 0, ids, order, offsets, scaling, dropout_p,
        need_dx, need_dR, need_db, operands.product is not None,
    )  # fmt: skip
    if through is not None and operands.product is None:
        dx = dx.addmm_(grad_y, through.detach().to(dtype))
    return dx, dR if dR.dtype == R.dtype else dR.to(R.dtype), db
