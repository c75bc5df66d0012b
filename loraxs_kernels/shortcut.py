"""A plain eager call on the CPU whose operands were seen before: the same result, in fewer steps.

A layer of a few hundred features and few rows spends most of its time in Python: checks, the choice
of a backend, the look-up of copies, each of them small, all of them cold once the weight has gone
through the cache. What the long way (``functional``, ``autograd``, ``ops``, ``backends.onednn``)
found out about a layer is kept in one record that is good while W, A and B stay the same objects,
unchanged. Whatever is not plain goes the long way: a compiler, autocast, ``torch.func``, forward
derivatives, dispatch modes, subclasses, adapter ids, dropout, second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from loraxs_kernels import autograd, dispatch
from loraxs_kernels.backends import onednn, packing
from loraxs_kernels.backends.packing import PLAIN


class _Passes:
    """The copies that both passes need, ``None`` until an earlier pass has left them."""

    __slots__ = ("backward", "forward")

    def __init__(self) -> None:
        self.forward: onednn.Copies | None = None
        self.backward: onednn.Copies | None = None


class _Layer:
    """What is known about a frozen layer, for inputs of one dtype."""

    __slots__ = ("backward", "bias", "core", "cores", "forward", "in_features", "ways")

    def __init__(self, A: Tensor, B: Tensor, dtype: torch.dtype, native: Any) -> None:
        rank, self.in_features = A.shape
        self.core, self.bias = torch.Size((rank, rank)), B.shape[:1]
        self.cores = (torch.float32, dtype)
        self.forward, self.backward = native.forward.default, native.backward.default
        self.ways: dict[str, _Passes] = {}


def _is_plain() -> bool:
    """Whether nothing needs to see the operators of the long way."""
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def run(
    x: Tensor, weight: Tensor, A: Tensor, R: Tensor, B: Tensor, bias: Tensor | None,
    scaling: float, prepack: int, backend: str | None,
) -> Tensor | None:  # fmt: skip
    """``y`` of a call without adapter ids and dropout; ``None`` if it has to go the long way.

    The arguments of :func:`loraxs_kernels.functional.linear`, unchecked: a wrong one is not what
    was seen, and the long way says what is wrong with it.
    """
    if torch.compiler.is_compiling() or type(x) not in PLAIN or not _is_plain():
        return None
    dtype = x.dtype
    layer: _Layer | None = packing.recall(("layer", dtype, prepack, backend), (weight, A, B))
    if layer is None or not _fits(layer, x, R, bias, dtype):
        return None
    if A.requires_grad or B.requires_grad or weight.requires_grad:
        return None
    flat = x if x.dim() == 2 else x.reshape(-1, layer.in_features)
    rows = flat.shape[0]
    if rows == 0:
        return None
    way = onednn.way_of(weight, rows, dtype)
    passes = layer.ways.get(way)
    if passes is None:
        passes = layer.ways[way] = _Passes()
    if passes.forward is None:
        held = onednn.copies_held(weight, A, B, way, dtype, prepack, backward=False)
        if held is None:
            return None
        passes.forward = held
    trains = flat.requires_grad or R.requires_grad or (bias is not None and bias.requires_grad)
    if trains and torch.is_grad_enabled():
        y, _ = _ShortWay.apply(
            flat, R, bias, weight, A, B, scaling, layer, passes, way, prepack, backend or ""
        )
    else:
        y, _ = _forward(flat, R, bias, weight, A, scaling, layer, passes.forward, way)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _fits(layer: _Layer, x: Tensor, R: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether x, R and bias are of the kind that was checked."""
    if not (
        x.is_cpu
        and x.dim()
        and x.shape[-1] == layer.in_features
        and type(R) in PLAIN
        and R.is_cpu
        and R.shape == layer.core
        and R.dtype in layer.cores
        and R.is_contiguous()
    ):
        return False
    return bias is None or (
        type(bias) in PLAIN and bias.is_cpu and bias.dtype is dtype and bias.shape == layer.bias
    )


def remember(
    x: Tensor, weight: Tensor, A: Tensor, R: Tensor, B: Tensor, prepack: int, backend: str | None
) -> None:
    """Keep a layer of which a call has just gone the long way, checks included."""
    dtype = x.dtype
    if torch.compiler.is_compiling() or not (x.is_cpu and R.dim() == 2 and A.dtype == dtype):
        return
    if weight.requires_grad or A.requires_grad or B.requires_grad:
        return
    native = onednn.compiled(dtype)
    if native is None or not _is_plain():
        return
    call = dispatch.Call("cpu", dtype, R.dtype, True, False, False)
    if dispatch.choose(call, backend).name == "onednn":
        found = _Layer(A, B, dtype, native)
        packing.bundle(("layer", dtype, prepack, backend), (weight, A, B), lambda: (found, True))


def _forward(
    x: Tensor, R: Tensor, bias: Tensor | None, weight: Tensor, A: Tensor, scaling: float,
    layer: _Layer, copies: onednn.Copies, way: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    product, a, bt, shrink, expand = copies
    if product is None:
        product = onednn.as_it_is(weight, way, x.dtype, False)
    result: tuple[Tensor, Tensor] = layer.forward(
        x, product, bias, None, A if a is None else a, R, bt, shrink, expand,
        None, 0, None, None, None, scaling, 0.0,
    )  # fmt: skip
    return result


class _ShortWay(torch.autograd.Function):
    """``(y, q)``, as :class:`loraxs_kernels.autograd.EagerForward`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, R: Tensor, bias: Tensor | None, weight: Tensor, A: Tensor, B: Tensor,
        scaling: float, layer: _Layer, passes: _Passes, *options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert passes.forward is not None
        output = _forward(x, R, bias, weight, A, scaling, layer, passes.forward, options[0])
        ctx.save_for_backward(output[1], weight, A, R, B)
        ctx.known = (scaling, layer, passes, *options)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_q: Tensor | None) -> Any:
        q, weight, A, R, B = ctx.saved_tensors
        scaling, layer, passes, way, prepack, backend = ctx.known
        need_x, need_R, need_bias = ctx.needs_input_grad[:3]
        plain = (
            grad_q is None
            and type(grad_y) in PLAIN
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and _is_plain()
        )
        if not plain or passes.backward is None:
            needs = (need_x, False, need_R, need_bias)
            saved = (q, weight, A, R, B, None, None, None, None)
            options = (scaling, 0.0, prepack, backend)
            dx, _, dR, db = autograd.gradients(grad_y, grad_q, saved, needs, options)
            if plain and need_x:
                passes.backward = onednn.copies_held(
                    weight, A, B, way, q.dtype, prepack, backward=True
                )
        else:
            product, a, bt, shrink, expand = passes.backward
            if not need_x:
                product = None
            elif product is None:
                product = onednn.as_it_is(weight, way, q.dtype, True)
            dx, dR, db = layer.backward(
                grad_y, q, product, A if a is None else a, R, bt, shrink, expand,
                None, 0, None, None, None, scaling, 0.0, need_x, need_R, need_bias, need_x,
            )  # fmt: skip
        return (
            dx if need_x else None, dR if need_R else None, db if need_bias else None
        ) + (None,) * 9  # fmt: skip


__all__ = ["remember", "run"]
