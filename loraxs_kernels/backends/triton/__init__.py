"""The GPU backend: the whole layer in one launch forward and one launch backward.

    forward    D = X W^T + b + s ((X A^T) R^T) B^T        X: the input
    backward   D = G W + s ((G B) R) A, dR = s P^T Q      the same kernel with the roles swapped

``backends/roles.py`` puts operands into roles; ``plan.py`` chooses scheme and tiles, ``launch.py``
launches, ``kernels.py`` and ``device/`` compute.

``TRITON_INTERPRET=1``, set before Python starts, runs the same kernels on CPU tensors in Triton's
interpreter: very slow, for tests.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraxs_kernels.backends import roles

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


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``(y [M, N], q [M, r])``; arguments as in :func:`loraxs_kernels.ops.forward`."""
    from loraxs_kernels.backends.triton.launch import launch

    return roles.forward(launch, *arguments)


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx [M, K], dR like R, db [N])``; arguments as in :func:`loraxs_kernels.ops.backward`."""
    from loraxs_kernels.backends.triton.launch import atomic_core_gradient, launch

    return roles.backward(launch, *arguments, zero_dR=atomic_core_gradient())
