"""The CUDA C++ backend: the kernels of ``csrc/cuda``, one launch forward and one backward.

    forward    D = X W^T + b + s ((X A^T) R^T) B^T        X: the input
    backward   D = G W + s ((G B) R) A, dR = s P^T Q      the same kernels with the roles swapped

``backends/roles.py`` puts operands into roles, ``plan.py`` chooses a kernel by arithmetic,
``launch.py`` calls it. The library is built by setup.py where a CUDA toolkit is; ``python -m
loraxs_kernels info`` says whether it is there, and what is missing if not.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraxs_kernels import _native
from loraxs_kernels.backends import roles

if TYPE_CHECKING:
    from loraxs_kernels.dispatch import Call

#: The largest rank that the kernels take.
MAX_RANK = 256

_SUPPORTED = (torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or ``None``."""
    why_not = _native.load("cuda")
    if why_not is not None:
        return why_not
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU (torch.cuda.is_available() is false)"
    from loraxs_kernels.backends.cuda.plan import kernels, runs_on

    major, minor = torch.cuda.get_device_capability()
    archs, table = kernels()
    if any(runs_on(kernel, archs, 10 * major + minor) for kernel in table):
        return None
    name = torch.cuda.get_device_name()
    return f"{name} has compute capability {major}.{minor}, the kernels need 8.0 or newer"


def unsupported(call: Call) -> str | None:
    """Why the backend cannot run ``call``, or ``None``."""
    if call.device != "cuda":
        return f"x is on {call.device}, the CUDA kernels run on a CUDA device"
    if call.dtype not in _SUPPORTED:
        return f"x has dtype {call.dtype}, the CUDA kernels take bfloat16 and float16"
    if call.core_dtype == torch.float64:
        return "R has dtype torch.float64, the CUDA kernels take float32 or x's dtype"
    if call.dropout:
        return "the CUDA kernels have no dropout"
    if call.rank > MAX_RANK:
        return f"the rank is {call.rank}, the CUDA kernels take up to {MAX_RANK}"
    if not call.row_major:
        return "weight, A or B does not have contiguous rows, which the CUDA kernels read"
    return None


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``(y [M, N], q [M, r])``; arguments as in :func:`loraxs_kernels.ops.forward`."""
    from loraxs_kernels.backends.cuda.launch import launch

    return roles.forward(launch, *arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx [M, K], dR like R, db [N])``; arguments as in :func:`loraxs_kernels.ops.backward`."""
    from loraxs_kernels.backends.cuda.launch import launch

    return roles.backward(launch, *arguments)
