"""Gradients of the raw operators: reverse mode twice over, forward mode, and ``vmap``.

Two Functions: :class:`LoRAXSForward`, whose backward is the other one, :class:`LoRAXSBackward`.
What the first saves is ``q`` (``M * r`` numbers) and the dropout seed, besides parameters and
buffers: never ``x``. So that second derivatives are right, ``q`` is an output of the first, and the
gradient that reaches it (through the second) is carried on to ``x``.

``W``, ``A`` and ``B`` are constants here; ``functional.py`` sends calls in which they train to the
plain expression instead.

``vmap`` folds the mapped dimension into the rows. A core or a gradient of its own for every sample
is then a call with adapter ids: sample ``v`` and adapter ``i`` together are adapter ``v * n + i``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from loraxs_kernels import ops, sorting
from loraxs_kernels.backends import reference

#: The arguments a gradient can flow to: x, base, R, bias.
_DIFFERENTIABLE = (0, 2, 4, 6)

#: Arguments that are constants: vmap over one of them runs the definition instead of the fold.
_FORWARD_CONSTANTS = (1, 3, 5, 6, 7)  # weight, A, B, bias, seed
_BACKWARD_CONSTANTS = (2, 3, 5, 6)  # weight, A, B, seed


def apply(*args: Any) -> tuple[Tensor, Tensor]:
    """``(y, q)``: the differentiable :func:`loraxs_kernels.ops.forward`, with its arguments."""
    function: type[torch.autograd.Function]
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed and torch.compiler.is_compiling():
        # Dynamo traces no Function with vmap and jvp, but it traces and fuses the definition.
        return reference.forward(*args[:-1])
    if transformed:
        function = LoRAXSForward
    elif torch.is_grad_enabled() and any(
        isinstance(args[i], Tensor) and args[i].requires_grad for i in _DIFFERENTIABLE
    ):
        function = TracedForward if torch.compiler.is_compiling() else EagerForward
    else:
        return ops.forward(*args)
    result: tuple[Tensor, Tensor] = function.apply(*args)
    return result


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The raw backward, recorded as a Function only where it can be differentiated again.

    A compiled graph cannot be (AOTAutograd has no second derivatives), and the common eager
    ``backward()`` runs with grad mode off and saves the Function's overhead.
    """
    functorch = torch._C._are_functorch_transforms_active
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or functorch()):
        return ops.backward(*args)
    result: tuple[Tensor, Tensor, Tensor] = LoRAXSBackward.apply(*args)
    return result


def gradients(
    grad_y: Tensor | None,
    grad_q: Tensor | None,
    saved: tuple[Any, ...],
    needs: tuple[bool, bool, bool, bool],
    options: tuple[float, float, int, str],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``(dx, dbase, dR, db)`` of the forward.

    Args:
        grad_y, grad_q: gradients of its outputs, or ``None``.
        saved: q, weight, A, R, B, seed, ids, order, offsets.
        needs: which of the four are asked for.
        options: scaling, dropout_p, prepack, backend.
    """
    device = next((g.device.type for g in (grad_y, grad_q) if g is not None), "meta")
    if device != "meta" and torch.is_autocast_enabled(device):
        # A derivative is computed in the dtypes of its forward, also inside a block of autocast.
        with torch.autocast(device, enabled=False):
            return _gradients(grad_y, grad_q, saved, needs, options)
    return _gradients(grad_y, grad_q, saved, needs, options)


def _gradients(
    grad_y: Tensor | None,
    grad_q: Tensor | None,
    saved: tuple[Any, ...],
    needs: tuple[bool, bool, bool, bool],
    options: tuple[float, float, int, str],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    q, weight, A, R, B, seed, ids, order, offsets = saved
    need_x, need_base, need_R, need_bias = needs
    scaling, dropout_p, prepack, backend = options
    dx = dR = db = None
    if grad_y is not None:
        out_x, out_R, out_b = _backward(
            grad_y, q, weight, A, R, B, seed, ids, order, offsets, scaling, dropout_p,
            need_x, need_R, need_bias, prepack, backend,
        )  # fmt: skip
        dx = out_x if need_x else None
        dR = out_R if need_R else None
        db = out_b if need_bias else None
    if grad_q is not None and need_x:
        through_q = reference.mask_side_path(grad_q @ A.to(grad_q.dtype), seed, dropout_p)
        dx = through_q if dx is None else dx + through_q
    return dx, grad_y if need_base else None, dR, db


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A derivative is computed in the dtypes of its forward, also inside a block of autocast."""

    @functools.wraps(method)
    def run(ctx: Any, *args: Any) -> Any:
        # From an argument: saved tensors may be unpacked only once under activation checkpointing.
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "meta")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return method(ctx, *args)
        with torch.autocast(device, enabled=False):
            return method(ctx, *args)

    return run


class TracedForward(torch.autograd.Function):
    """``(y, q)`` of :func:`loraxs_kernels.ops.forward`; differentiable in x, base, R and bias.

    The part of :class:`LoRAXSForward` that Dynamo can trace (it refuses a Function with ``jvp``).
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return ops.forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, A, R, B, _, seed, ids, order, offsets, *options = inputs
        ctx.save_for_backward(output[1], weight, A, R, B, seed, ids, order, offsets)
        ctx.save_for_forward(x, weight, A, R, B, seed, ids, output[1])
        ctx.scaling, ctx.dropout_p, ctx.prepack, ctx.backend = options
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_q: Tensor | None) -> Any:
        need_x, _, need_base, _, need_R, _, need_bias = ctx.needs_input_grad[:7]
        needs = (need_x, need_base, need_R, need_bias)
        options = (ctx.scaling, ctx.dropout_p, ctx.prepack, ctx.backend)
        dx, dbase, dR, db = gradients(grad_y, grad_q, ctx.saved_tensors, needs, options)
        return (dx, None, dbase, None, dR, None, db) + (None,) * 8


class EagerForward(torch.autograd.Function):
    """:class:`TracedForward` for plain eager calls, with a quarter of its overhead.

    A Function with ``setup_context`` binds its arguments by ``inspect.signature`` on every call,
    which costs more than the product of a small layer; only ``torch.func`` and Dynamo need that
    form.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        output = ops.forward(*args)
        ctx.save_for_backward(output[1], args[1], *args[3:6], *args[7:11])
        ctx.scaling, ctx.dropout_p, ctx.prepack, ctx.backend = args[11:]
        ctx.set_materialize_grads(False)
        return output

    backward = TracedForward.backward


class LoRAXSForward(TracedForward):
    """:class:`TracedForward` with forward-mode derivatives and ``vmap``."""

    @staticmethod
    @_without_autocast
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        x, weight, A, R, B, seed, ids, q = ctx.saved_tensors
        dx, dweight, dbase, dA, dR, dB, dbias = tangents[:7]
        s, p, dtype = ctx.scaling, ctx.dropout_p, q.dtype
        dy = q.new_zeros(q.shape[0], B.shape[0])
        dq = torch.zeros_like(q)
        if dx is not None:
            dq = dq + reference.shrink(dx, A, seed, p)
            if weight is not None:
                dy = dy + dx @ weight.to(dtype).mT
        if dA is not None:
            dq = dq + reference.shrink(x, dA, seed, p)
        if dweight is not None:
            dy = dy + x @ dweight.to(dtype).mT
        for tangent in (dbase, dbias):
            if tangent is not None:
                dy = dy + tangent.to(dtype)
        dy = dy + reference.expand(dq, R, B, ids, s)
        if dR is not None:
            dy = dy + reference.expand(q, dR, B, ids, s)
        if dB is not None:
            dy = dy + reference.expand(q, R, dB, ids, s)
        return dy, dq

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if args[7] is not None or any(in_dims[i] is not None for i in _FORWARD_CONSTANTS):
            return torch.vmap(reference.forward, in_dims[:-1])(*args[:-1]), (0, 0)
        x, weight, base, A, R, B, bias, _, ids, _, _, *options = args
        samples = info.batch_size
        x = _fold(x, in_dims[0], samples)
        R, ids = _fold_cores(R, in_dims[4], ids, in_dims[8], samples, x.shape[0], own=False)
        y, q = LoRAXSForward.apply(
            x,
            weight,
            _fold_optional(base, in_dims[2], samples),
            A,
            R,
            B,
            bias,
            None,
            ids,
            None,
            None,
            *options,
        )
        return (y.unflatten(0, (samples, -1)), q.unflatten(0, (samples, -1))), (0, 0)


class LoRAXSBackward(torch.autograd.Function):
    """``(dx, dR, db)`` of :func:`~loraxs_kernels.ops.backward`; differentiable in grad_y, q, R."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, options = inputs[:10], inputs[10:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.scaling, ctx.dropout_p, ctx.need_dx, ctx.need_dR, ctx.need_db = options[:5]
        ctx.set_materialize_grads(False)

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, v: Tensor | None, T: Tensor | None, u: Tensor | None) -> Any:
        """``v``, ``T``, ``u``: gradients of dx, dR and db. Plain differentiable operations."""
        grad_y, q, weight, A, R, B, seed, ids, _, _ = ctx.saved_tensors
        s, p, dtype = ctx.scaling, ctx.dropout_p, grad_y.dtype
        P = grad_y @ B.to(dtype)
        d_grad_y, dq, dR = torch.zeros_like(grad_y), torch.zeros_like(q), torch.zeros_like(R)
        if v is not None and ctx.need_dx:
            q_of_v = reference.shrink(v, A, seed, p)
            d_grad_y = d_grad_y + reference.expand(q_of_v, R, B, ids, s)
            if weight is not None:
                d_grad_y = d_grad_y + v @ weight.to(dtype).mT
            dR = dR + s * reference.core_gradient(P, q_of_v, R, ids)
        if T is not None and ctx.need_dR:
            d_grad_y = d_grad_y + reference.expand(q, T, B, ids, s)
            dq = dq + s * reference.apply_core(P, T, ids, transpose=False)
        if u is not None and ctx.need_db:
            d_grad_y = d_grad_y + u
        return (d_grad_y, dq, None, None, dR) + (None,) * 12

    @staticmethod
    @_without_autocast
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad_y, q, weight, A, R, B, seed, ids, _, _ = ctx.saved_tensors
        t_grad_y, t_q, _, _, t_R = tangents[:5]
        s, p, dtype = ctx.scaling, ctx.dropout_p, grad_y.dtype
        t_grad_y = torch.zeros_like(grad_y) if t_grad_y is None else t_grad_y
        P, t_P = grad_y @ B.to(dtype), t_grad_y @ B.to(dtype)
        t_dx, t_dR, t_db = grad_y.new_zeros(0), R.new_zeros(0), grad_y.new_zeros(0)
        if ctx.need_dx:
            t = reference.apply_core(t_P, R, ids, transpose=False)
            if t_R is not None:
                t = t + reference.apply_core(P, t_R, ids, transpose=False)
            t_dx = s * reference.mask_side_path(t @ A.to(dtype), seed, p)
            if weight is not None:
                t_dx = t_grad_y @ weight.to(dtype) + t_dx
        if ctx.need_dR:
            t_dR = s * reference.core_gradient(t_P, q, R, ids)
            if t_q is not None:
                t_dR = t_dR + s * reference.core_gradient(P, t_q, R, ids)
        if ctx.need_db:
            t_db = t_grad_y.sum(0)
        return t_dx, t_dR, t_db

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        outputs = (0, 0, 0)
        if args[6] is not None or any(in_dims[i] is not None for i in _BACKWARD_CONSTANTS):
            return torch.vmap(reference.backward, in_dims[:-1])(*args[:-1]), outputs
        grad_y, q, weight, A, R, B, _, ids, _, _, *options = args
        scaling, dropout_p, need_dx, need_dR, need_db, prepack, backend = options
        samples, per_row = info.batch_size, ids is not None
        grad_y, q = _fold(grad_y, in_dims[0], samples), _fold(q, in_dims[1], samples)
        R, ids = _fold_cores(R, in_dims[4], ids, in_dims[7], samples, q.shape[0], own=need_dR)
        dx, dR, _ = LoRAXSBackward.apply(
            grad_y, q, weight, A, R, B, None, ids, None, None,
            scaling, dropout_p, need_dx, need_dR, False, prepack, backend,
        )  # fmt: skip
        by_sample = grad_y.unflatten(0, (samples, -1))
        dx = dx.unflatten(0, (samples, -1)) if need_dx else by_sample.new_empty(samples, 0)
        if not need_dR:
            dR = R.new_empty(samples, 0)
        elif per_row:
            dR = dR.unflatten(0, (samples, -1))
        db = by_sample.sum(1) if need_db else by_sample.new_empty(samples, 0)
        return (dx, dR, db), outputs


def _fold_optional(t: Tensor | None, dim: int | None, samples: int) -> Tensor | None:
    return None if t is None else _fold(t, dim, samples)


def _fold(t: Tensor, dim: int | None, samples: int) -> Tensor:
    """Fold vmap's dimension into the rows: ``[V, M, ...] -> [V * M, ...]``."""
    t = t.expand(samples, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _fold_cores(
    R: Tensor,
    R_dim: int | None,
    ids: Tensor | None,
    ids_dim: int | None,
    samples: int,
    folded_rows: int,
    *,
    own: bool,
) -> tuple[Tensor, Tensor | None]:
    """Cores and ids for folded rows; ``own``: every sample needs cores (gradients) of its own."""
    if R_dim is None and not own:
        return R, _fold_optional(ids, ids_dim, samples)
    R = R.expand(samples, *R.shape) if R_dim is None else R.movedim(R_dim, 0)
    sample = torch.arange(samples, device=R.device).repeat_interleave(folded_rows // samples)
    if ids is None:
        return R.contiguous(), sample
    folded, adapters = _fold(ids, ids_dim, samples), R.shape[1]
    if not folded.is_cuda:
        sorting.check_ids(folded, adapters)
    # On a GPU, where nobody looks at the ids, a wrong one stays one that is out of range.
    mapped = torch.where(folded < adapters, sample * adapters + folded, samples * adapters)
    return R.flatten(0, 1), torch.where(folded >= 0, mapped, folded)
