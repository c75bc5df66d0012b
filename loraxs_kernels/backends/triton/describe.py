"""Tensor descriptors: what the copy engine (TMA, compute capability 9.0 and up) reads tiles by.

Made on the host and passed by value, as kernel arguments: every CTA does one item, so a descriptor
that the kernel makes for itself (``tl.make_tensor_descriptor``) would cost each tile its 128 bytes
of scratch, a store, and a fence across proxies before its first load, and each launch an allocation
from Triton's process-wide allocator. Passed by value it is also copied into a captured CUDA graph.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from loraxs_kernels.backends.problem import BY_ROWS, described_by


def block_of(by: int, rows: int, columns: int) -> tuple[int, int]:
    """A tile of ``rows x columns`` in the descriptor's own order of dimensions."""
    return (rows, columns) if by == BY_ROWS else (columns, rows)


def descriptor(t: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """The descriptor of ``t``, or of its transpose if its columns are contiguous."""
    laid = t if described_by(t) == BY_ROWS else t.mT
    return TensorDescriptor(laid, list(laid.shape), list(laid.stride()), list(block))
