"""The GPU backend: the whole layer in one launch forward and one launch backward.

    forward    D = X W^T + b + s ((X A^T) R^T) B^T        X: the input
    backward   D = G W + s ((G B) R) A, dR = s P^T Q      the same kernel with the roles swapped

This module puts operands into roles; ``plan.py`` chooses scheme and tiles, ``launch.py`` launches,
``kernels.py`` and ``device/`` compute. Extra copies are made only of what the kernel cannot take:
an input whose rows are not contiguous, and operands in another dtype than x (under autocast), which
are remembered for frozen matrices.

``TRITON_INTERPRET=1``, set before Python starts, runs the same kernels on CPU tensors in Triton's
interpreter: very slow, for tests.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraxs_kernels.backends import packing, reference

if TYPE_CHECKING:
    from loraxs_kernels.dispatch import Call

#: The oldest Triton whose compiler accepts the kernels (NamedTuples as arguments of functions).
OLDEST_TRITON = (3, 4)

#: The dropout mask of a block of columns can be that of the whole (seeds of three numbers).
MASKS_COLUMN_BLOCKS = True

_SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)


#: Whether the kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when a
#: kernel is defined, so it cannot change later. Such a call has to name the backend.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or ``None``."""
    if not INTERPRET and not torch.cuda.is_available():
        return "PyTorch sees no GPU (torch.cuda.is_available() is false)"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton >= 3.4"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton is {triton.__version__}, the kernels need {oldest} or newer"
    if not INTERPRET and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            name = torch.cuda.get_device_name()
            return f"{name} has compute capability {major}.{minor}, the kernels need 8.0 or newer"
    return None


def unsupported(call: Call) -> str | None:
    """Why the backend cannot run ``call``, or ``None``."""
    if call.device != ("cpu" if INTERPRET else "cuda"):
        return f"x is on {call.device}, the Triton kernels run on a CUDA device"
    if call.dtype not in _SUPPORTED:
        return f"x has dtype {call.dtype}, which the matrix units do not multiply"
    return None


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows: the one layout that is copied if it comes otherwise."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _operand(t: Tensor, dtype: torch.dtype, prepack: int) -> Tensor:
    return t if t.dtype == dtype else packing.dense(t, "dense", dtype, prepack)


def _core(R: Tensor, dtype: torch.dtype) -> Tensor:
    return R if R.dtype in (torch.float32, dtype) else R.to(torch.float32)


def _is_degenerate(x: Tensor, B: Tensor) -> bool:
    # Nothing to multiply: empty sums, which need no kernel.
    return x.shape[0] == 0 or x.shape[1] == 0 or B.shape[0] == 0


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
    from loraxs_kernels.backends.triton.flags import raise_bad_ids
    from loraxs_kernels.backends.triton.launch import Operands, launch

    raise_bad_ids()
    if _is_degenerate(x, B):
        return reference.forward(
            x, weight, base, A, R, B, bias, seed, ids, order, offsets, scaling, dropout_p, prepack
        )
    dtype = x.dtype
    y, q = x.new_empty(x.shape[0], B.shape[0]), x.new_empty(x.shape[0], A.shape[0])
    operands = Operands(
        x=_rows(x),
        w=None if weight is None else _operand(weight, dtype, prepack),
        base=None if base is None else base.to(dtype),
        a=_operand(A, dtype, prepack),
        core=_core(R, dtype).mT,
        b=_operand(B, dtype, prepack),
        bias=None if weight is None else bias,
        d=y,
        side=q,
        seed=seed,
        ids=ids,
        order=order,
        offsets=offsets,
        scaling=scaling,
        dropout_p=dropout_p,
    )
    launch(operands)
    return y, q


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
    from loraxs_kernels.backends.triton.flags import raise_bad_ids
    from loraxs_kernels.backends.triton.launch import Operands, atomic_core_gradient, launch

    raise_bad_ids()
    if _is_degenerate(grad_y, A.mT):
        return reference.backward(
            grad_y, q, weight, A, R, B, seed, ids, order, offsets,
            scaling, dropout_p, need_dx, need_dR, need_db, prepack,
        )  # fmt: skip
    dtype = grad_y.dtype
    dx = grad_y.new_empty((grad_y.shape[0], A.shape[1]) if need_dx else 0)
    make = torch.zeros if atomic_core_gradient() else torch.empty
    dR = make(R.shape if need_dR else 0, dtype=R.dtype, device=R.device)
    db = grad_y.new_empty(B.shape[0] if need_db else 0)
    if not (need_dx or need_dR or need_db):
        return dx, dR, db
    operands = Operands(
        x=_rows(grad_y),
        w=_operand(weight, dtype, prepack).mT if weight is not None and need_dx else None,
        a=_operand(B, dtype, prepack).mT,
        core=_core(R, dtype),
        b=_operand(A, dtype, prepack).mT,
        d=dx if need_dx else None,
        q=_rows(q) if need_dR else None,
        dR=dR if need_dR else None,
        db=db if need_db else None,
        seed=seed,
        ids=ids,
        order=order,
        offsets=offsets,
        scaling=scaling,
        dropout_p=dropout_p,
        mask_output=True,
    )
    launch(operands)
    return dx, dR, db
