"""What the choice of a GPU kernel depends on, read off a device and the operands of a pass.

No backend is imported: a plan can be made where its kernels cannot run.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from loraxs_kernels.backends.roles import Operands
from loraxs_kernels.backends.triton.plan import Gpu, Problem

#: The GPU that plans are made for, with operands on the CPU: under an interpreter.
_INTERPRETED = Gpu(arch=80, sms=3, shared=163 * 1024)

_gpus: dict[int, Gpu] = {}


def gpu_of(device: torch.device) -> Gpu:
    """What a plan needs to know of ``device``."""
    if device.type != "cuda":
        return _INTERPRETED
    index = device.index if device.index is not None else torch.cuda.current_device()
    found = _gpus.get(index)
    if found is None:
        props = torch.cuda.get_device_properties(index)
        arch = 0 if torch.version.hip else 10 * props.major + props.minor
        shared = getattr(props, "shared_memory_per_block_optin", 64 * 1024)
        found = _gpus[index] = Gpu(arch, props.multi_processor_count, int(shared))
    return found


def problem_of(o: Operands) -> Problem:
    """The sizes and features that a plan depends on."""
    M, K = o.x.shape
    return Problem(
        M, o.b.shape[0], K, o.a.shape[0], o.x.element_size(),
        has_d=o.d is not None, has_w=o.w is not None, vectors=reads_vectors(o.x, o.w),
        descriptors=describable(o),
        mask_input=o.dropout_p > 0.0 and not o.mask_output,
        mask_output=o.dropout_p > 0.0 and o.mask_output,
        need_dR=o.dR is not None, need_db=o.db is not None,
        per_row=o.ids is not None, adapters=o.core.shape[0] if o.ids is not None else 1,
    )  # fmt: skip


def reads_vectors(*matrices: Tensor | None) -> bool:
    """Whether every row (or column, if those are contiguous) starts at a multiple of 16 bytes."""
    for t in matrices:
        if t is None:
            continue
        pitch = t.stride(0) if t.stride(1) == 1 else t.stride(1)
        contiguous = t.shape[1] if t.stride(1) == 1 else t.shape[0]
        vector = 16 // t.element_size()
        if 1 not in t.stride() or pitch % vector or contiguous % vector or t.data_ptr() % 16:
            return False
    return True


#: How a tensor descriptor can describe a matrix: not, by its rows, or by its columns.
NO_DESCRIPTOR, BY_ROWS, BY_COLUMNS = 0, 1, 2

_LARGEST_PITCH = 2**40


def described_by(t: Tensor | None) -> int:
    """How a descriptor can describe the matrix ``t``.

    By its rows or its columns, whichever are contiguous, if they start at multiples of 16 bytes and
    do not overlap.
    """
    if t is None or t.data_ptr() % 16:
        return NO_DESCRIPTOR
    for contiguous, by in ((1, BY_ROWS), (0, BY_COLUMNS)):
        pitch = t.stride(1 - contiguous)
        size = pitch * t.element_size()
        apart = t.stride(contiguous) == 1 and pitch >= t.shape[contiguous]
        if apart and size % 16 == 0 and size < _LARGEST_PITCH and max(t.shape) < 2**31:
            return by
    return NO_DESCRIPTOR


def describable(o: Operands) -> bool:
    """Whether the copy engine can read X by its rows, and W."""
    return described_by(o.x) == BY_ROWS and (o.w is None or described_by(o.w) != NO_DESCRIPTOR)


@functools.cache
def software(device: torch.device) -> str:
    """The GPU and the software that a measurement is good for."""
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
