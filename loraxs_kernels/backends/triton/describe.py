"""Tensor descriptors: what the copy engine (TMA, compute capability 9.0 and up) reads tiles by.

Made on the host and passed by value, as kernel arguments: every CTA does one item, so a descriptor
that the kernel makes for itself (``tl.make_tensor_descriptor``) would cost each tile its 128 bytes
of scratch, a store, and a fence across proxies before its first load, and each launch an allocation
from Triton's process-wide allocator. Passed by value it is also copied into a captured CUDA graph.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from loraxs_kernels.backends.triton.device.tiles import BY_COLUMNS, BY_ROWS, NO_DESCRIPTOR

_LARGEST_PITCH = 2**40


def described_by(t: Tensor | None) -> int:
    """How a descriptor can describe the matrix ``t``, as ``device/tiles.py`` names it.

    By its rows or its columns, whichever are contiguous, if they start at multiples of 16 bytes and
    do not overlap.
    """
    if t is None or t.data_ptr() % 16:
        return int(NO_DESCRIPTOR.value)
    for contiguous, by in ((1, BY_ROWS), (0, BY_COLUMNS)):
        pitch = t.stride(1 - contiguous)
        size = pitch * t.element_size()
        apart = t.stride(contiguous) == 1 and pitch >= t.shape[contiguous]
        if apart and size % 16 == 0 and size < _LARGEST_PITCH and max(t.shape) < 2**31:
            return int(by.value)
    return int(NO_DESCRIPTOR.value)


def block_of(by: int, rows: int, columns: int) -> tuple[int, int]:
    """A tile of ``rows x columns`` in the descriptor's own order of dimensions."""
    return (rows, columns) if by == BY_ROWS.value else (columns, rows)


def descriptor(t: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """The descriptor of ``t``, or of its transpose if its columns are contiguous."""
    laid = t if described_by(t) == BY_ROWS.value else t.mT
    return TensorDescriptor(laid, list(laid.shape), list(laid.stride()), list(block))
