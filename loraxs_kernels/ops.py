"""The raw forward and backward as ``torch.library`` operators: schema, fake and kernel side by
side.

They know nothing of autograd (``autograd.py`` does) and check no shapes (``functional.py`` does).
An eager call goes straight to the backend; ``torch.compile`` and every other dispatch mode see one
opaque operator per direction, ``loraxs_kernels::forward`` and ``loraxs_kernels::backward``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraxs_kernels import dispatch, sorting
from loraxs_kernels.backends.packing import PLAIN

#: Values of ``prepack``: whether a backend may keep packed copies of the frozen matrices.
PREPACK_NEVER, PREPACK_AUTO, PREPACK_NOW = 0, 1, 2

_LIBRARY = torch.library.Library("loraxs_kernels", "DEF")


def _is_plain_eager(x: Tensor, weight: Tensor | None) -> bool:
    """Whether nothing needs to see the operator: no compiler, no subclass, no dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and (weight is None or type(weight) in PLAIN)
        and torch._C._len_torch_dispatch_stack() == 0
    )


_modules: dict[tuple[Any, ...], Any] = {}


def _row_major(*matrices: Tensor | None) -> bool:
    return all(t is None or t.stride(1) == 1 or t.shape[1] == 1 for t in matrices)


def _choice(
    x: Tensor, R: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, per_row: bool,
    seed: Tensor | None, name: str,
) -> Any:  # fmt: skip
    # A tuple of what is at hand is made and hashed in a fraction of the time that a Call takes.
    place = "cpu" if x.is_cpu else x.device.type
    dropout, block = seed is not None, seed is not None and seed.numel() > 1
    # What only GPU backends ask for.
    more = () if place == "cpu" else (A.shape[0], _row_major(weight, A, B))
    key = (place, x.dtype, R.dtype, weight is None, per_row, dropout, block, name, *more)
    module = _modules.get(key)
    if module is None:
        call = dispatch.Call(
            place, x.dtype, R.dtype, weight is not None, per_row, dropout, block, *more
        )
        module = _modules[key] = dispatch.choose(call, name or None).module
    return module


# ---------------------------------------------------------------------------------- forward

_LIBRARY.define(
    "forward(Tensor x, Tensor? weight, Tensor? base, Tensor A, Tensor R, Tensor B, Tensor? bias, "
    "Tensor? seed, Tensor? ids, Tensor? order, Tensor? offsets, float scaling, float dropout_p, "
    "int prepack, str backend) -> (Tensor y, Tensor q)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward_kernel(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = _choice(x, R, weight, A, B, ids is not None, seed, backend)
    if ids is not None and order is None and not ids.is_cuda:
        sorting.check_ids(ids, R.shape[0])
    result: tuple[Tensor, Tensor] = module.forward(
        x, weight, base, A, R, B, bias, seed, ids, order, offsets, scaling, dropout_p, prepack
    )
    return result


def _forward_fake(
    x: Tensor, weight: Tensor | None, base: Tensor | None, A: Tensor, R: Tensor, B: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], B.shape[0]), x.new_empty(x.shape[0], A.shape[0])


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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The raw forward: ``y = x W^T + b + s * (q R^T) B^T`` and ``q = (m * x / (1 - p)) A^T``.

    The dtype of ``x`` is the dtype of the computation; the other operands are brought to it (R is
    kept when it is wider). The caller has checked all shapes.

    Args:
        x: ``[M, K]``, any strides.
        weight: ``[N, K]``; or ``None``, and then ``base`` is given.
        base: ``[M, N]``, the base layer's output computed elsewhere; never modified.
        A: ``[r, K]``.
        R: ``[r, r]``, or ``[n, r, r]`` with ``ids``.
        B: ``[N, r]``.
        bias: ``[N]`` or ``None``.
        seed: int64 ``[1]``, or ``[3]`` where x is a block of columns of a wider matrix (see
            ``reference.column_block_seed``); given iff ``dropout_p > 0``.
        ids: int64 ``[M]``, the adapter of each row, -1 for none; ``None`` for a shared R.
        order: int64 ``[M]``, rows sorted stably by id; with ``offsets``: the ids are known to be
            valid. Without it the ids are checked (not on CUDA).
        offsets: int64 ``[n + 2]``; rows of adapter ``a`` are ``order[offsets[a+1]:offsets[a+2]]``,
            rows without adapter are ``order[:offsets[1]]``.
        scaling: s.
        dropout_p: p.
        prepack: one of ``PREPACK_NEVER``, ``PREPACK_AUTO``, ``PREPACK_NOW``.
        backend: a backend's name, or ``""`` to choose.

    Returns:
        ``y [M, N]`` and ``q [M, r]`` in ``x``'s dtype.
    """
    run = _forward_kernel if _is_plain_eager(x, weight) else torch.ops.loraxs_kernels.forward
    result: tuple[Tensor, Tensor] = run(
        x, weight, base, A, R, B, bias, seed, ids, order, offsets,
        scaling, dropout_p, prepack, backend,
    )  # fmt: skip
    return result


_LIBRARY.impl("forward", _forward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("loraxs_kernels::forward", _forward_fake, lib=_LIBRARY)


# ---------------------------------------------------------------------------------- backward

_LIBRARY.define(
    "backward(Tensor grad_y, Tensor q, Tensor? weight, Tensor A, Tensor R, Tensor B, "
    "Tensor? seed, Tensor? ids, Tensor? order, Tensor? offsets, float scaling, float dropout_p, "
    "bool need_dx, bool need_dR, bool need_db, int prepack, str backend) "
    "-> (Tensor dx, Tensor dR, Tensor db)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _backward_kernel(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _choice(grad_y, R, weight, A, B, ids is not None, seed, backend)
    result: tuple[Tensor, Tensor, Tensor] = module.backward(
        grad_y, q, weight, A, R, B, seed, ids, order, offsets,
        scaling, dropout_p, need_dx, need_dR, need_db, prepack,
    )  # fmt: skip
    return result


def _backward_fake(
    grad_y: Tensor,
    q: Tensor,
    weight: Tensor | None,
    A: Tensor,
    R: Tensor,
    B: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_dx, need_dR, need_db = rest[6:9]
    dx = grad_y.new_empty((grad_y.shape[0], A.shape[1]) if need_dx else 0)
    dR = torch.empty(R.shape if need_dR else 0, dtype=R.dtype, device=R.device)
    return dx, dR, grad_y.new_empty(B.shape[0] if need_db else 0)


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw backward, from ``grad_y [M, N]`` and the saved ``q [M, r]``.

    ``P = G B``, ``dx = G W + s * m / (1 - p) * ((P R) A)``, ``dR = s * P^T q``, ``db = sum of
    rows``; without ``weight`` the term ``G W`` is left out. Arguments as in :func:`forward`.

    Returns:
        ``dx [M, K]`` and ``db [N]`` in ``grad_y``'s dtype, ``dR`` like ``R``; an output that is
        not needed is an empty tensor.
    """
    plain = _is_plain_eager(grad_y, weight)
    run = _backward_kernel if plain else torch.ops.loraxs_kernels.backward
    result: tuple[Tensor, Tensor, Tensor] = run(
        grad_y, q, weight, A, R, B, seed, ids, order, offsets,
        scaling, dropout_p, need_dx, need_dR, need_db, prepack, backend,
    )  # fmt: skip
    return result


_LIBRARY.impl("backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("loraxs_kernels::backward", _backward_fake, lib=_LIBRARY)
