"""Products with the matrix: the only place where a method touches W.

Vectors are kept as rows, so a block of k vectors is ``[..., k, n]`` and is contiguous. On the CPU
the products go through oneDNN's linear op where PyTorch has it: it takes both W and a transposed
view without copying, and was faster than the BLAS path in every shape measured. Packing W first
does not pay: one reorder costs as much as 8 to 20 thin passes. Cutting W into slices that stay in
the cache for both products pays only inside one operator (``csrc/cpu``, ``gram_rows``), not as a
loop of calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from loraxs_kernels import _native

_STRIPS = 6  # of a Gram matrix: more of them save more, but are smaller products

_precision_lock = threading.Lock()
_precision_users = 0
_precision_before = "highest"


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 products in fp32: no TF32 or bf16 shortcuts, no autocast, no autograd.

    The projected matrices and the final Rayleigh-Ritz step need every bit of fp32. PyTorch's
    precision switch is global, so the first thread in remembers it and the last one out restores
    it; a switch that is already at "highest" is not touched.
    """
    global _precision_before, _precision_users
    with _precision_lock:
        if _precision_users == 0:
            _precision_before = torch.get_float32_matmul_precision()
            if _precision_before != "highest":
                torch.set_float32_matmul_precision("highest")
        _precision_users += 1
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            if _precision_users == 0 and _precision_before != "highest":
                torch.set_float32_matmul_precision(_precision_before)


#: Up to so many vectors the compiled operator is faster than oneDNN.
_THIN = 24


def onednn_linear_available() -> bool:
    """Whether this PyTorch build has oneDNN's fused linear op, and oneDNN is switched on."""
    return (
        bool(torch.backends.mkldnn.is_available())
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _is_dense(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.mT.is_contiguous()


class Passes:
    """Products of row blocks with ``a`` ``[..., m, n]`` and its transpose, counted.

    Args:
        a: fp32 or fp64 matrix, or a stack of them. Wide ones should come transposed, so that the
            vectors live on the short side.
    """

    def __init__(self, a: Tensor) -> None:
        onednn = a.dim() == 2 and a.device.type == "cpu" and a.dtype is torch.float32
        if not _is_dense(a):
            a = a.contiguous()  # oneDNN would take a reference loop, a thousand times slower
        self.a = a
        self.a_t = a.mT
        self.columns = 0  # vectors multiplied so far, by W or by its transpose
        self._onednn = onednn and onednn_linear_available()
        self._compiled = _native.operators() if onednn and a.is_contiguous() else None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of one matrix."""
        return self.a.shape[-2], self.a.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """``x aᵀ``: ``[..., k, n]`` to ``[..., k, m]``."""
        self.columns += x.shape[-2]
        if self._onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.a, None, "none", [], "")
        return x @ self.a_t

    def adjoint(self, z: Tensor) -> Tensor:
        """``z a``: ``[..., k, m]`` to ``[..., k, n]``."""
        self.columns += z.shape[-2]
        if self._onednn:
            return torch.ops.mkldnn._linear_pointwise(z, self.a_t, None, "none", [], "")
        return z @ self.a

    def gram(self, x: Tensor) -> Tensor:
        """``x aᵀa``: ``[..., k, n]`` to ``[..., k, n]``.

        A thin block by the compiled operator, which reads W from memory once for both products;
        1.1 to 1.6 times as fast as oneDNN's two for 8 to 16 vectors (2 cores of Zen 3), and the
        same bits for any number of threads.
        """
        if self._compiled is not None and x.shape[-2] <= _THIN and x.is_contiguous():
            self.columns += 2 * x.shape[-2]
            return self._compiled.gram_rows(x, self.a)
        return self.adjoint(self.forward(x))

    def gram_matrix(self) -> Tensor:
        """``aᵀa`` ``[..., n, n]``."""
        self.columns += self.shape[1]
        if not self._onednn:
            return self.a_t @ self.a
        # The op computes x wᵀ, with x and w rows of aᵀ: the lower triangle, in strips, and its
        # mirror image.
        n = self.shape[1]
        rows, product = self.a_t.contiguous(), self.a.new_empty(n, n)
        for first in range(0, n, width := max(64, -(-n // _STRIPS))):
            strip = slice(first, min(first + width, n))
            part = torch.ops.mkldnn._linear_pointwise(
                rows[strip], rows[: strip.stop], None, "none", [], ""
            )
            product[strip, : strip.stop] = part
            product[:first, strip] = part[:, :first].mT
        return product


class GramPasses(Passes):
    """The same products with ``aᵀa`` formed once: for tall matrices and many vectors."""

    def __init__(self, a: Tensor) -> None:
        super().__init__(a)
        self._gram = Passes(self.gram_matrix())

    def gram(self, x: Tensor) -> Tensor:
        """``x aᵀa`` by one product with the stored n × n matrix."""
        return self._gram.adjoint(x)
