"""A model of how long a pass takes at best on a GPU that is not there. Nothing here is measured.

Each kernel costs ``max(bytes / bandwidth, FLOPs / peak)`` and kernels follow one another::

    modelled s = sum over kernels of max(bytes / bandwidth, FLOPs / peak)

Bytes are what the kernel must at least read and write, each operand once; launches, tails, caches
and clocks cost nothing. A fused LoRA-XS layer is one kernel per pass, eager PyTorch is one per
operator. M rows, K in, N out, rank r, e bytes per element; R is float32; the bias is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.linear_cases import Case

#: Peak of a way to multiply over that of the 16-bit matrix unit. tf32: half, on every NVIDIA GPU
#: that has it. fp32 does not use the matrix unit: 67 of 989 TFLOP/s in the H100's data sheet.
_SHARE = {"bf16": 1.0, "fp16": 1.0, "tf32": 1 / 2, "fp32": 67 / 989}

_ELEMENT = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}

#: Bytes of an element of R and of an adapter's id.
_CORE, _ID = 4, 8

FORMULA = """\
modelled s = sum over kernels of max(bytes / bandwidth, FLOPs / peak)
  one fused kernel per pass (ours); M rows, K in, N out, rank r, e bytes per element, R in float32
    forward   bytes = e (M K + N K + r K + r N + M N) + 4 r²  (+ e M r when training: Q)
              FLOPs = 2 M (K N + r (K + N) + r²)
    backward  bytes = e (M N + N K + r K + r N + M r + M K) + 8 r²
              FLOPs = 2 M (K N + r (K + N) + 2 r²)
  bare: one kernel per product, e (M K + N K + M N) bytes and 2 M K N FLOPs
  eager: one kernel per operator, each reading its inputs and writing its output once"""


@dataclass(frozen=True)
class Chip:
    """The two numbers of a roofline.

    Attributes:
        bandwidth: bytes per second from memory.
        flops: FLOP/s that a large 16-bit product sustains.
    """

    bandwidth: float
    flops: float

    def peak(self, dtype: str) -> float:
        """FLOP/s in ``dtype``."""
        return self.flops * _SHARE[dtype]

    def line(self) -> str:
        """The assumption, for a reader."""
        return (
            f"assumed, not measured: {self.bandwidth * 1e-12:g} TB/s (--model-bandwidth), "
            f"{self.flops * 1e-12:g} TFLOP/s in bf16 and fp16 (--model-tflops), "
            f"{self.peak('tf32') * 1e-12:.0f} in tf32, {self.peak('fp32') * 1e-12:.0f} in fp32"
        )


@dataclass(frozen=True)
class Kernel:
    """What one launch has to move and to compute."""

    name: str
    bytes: float
    flops: float

    def seconds(self, chip: Chip, dtype: str) -> float:
        """Modelled time."""
        return max(self.bytes / chip.bandwidth, self.flops / chip.peak(dtype))

    def is_memory_bound(self, chip: Chip, dtype: str) -> bool:
        """Whether the model has it wait for memory."""
        return self.bytes / chip.bandwidth >= self.flops / chip.peak(dtype)


def seconds(kernels: Sequence[Kernel], chip: Chip, dtype: str) -> float:
    """Modelled time of kernels that follow one another."""
    return sum(kernel.seconds(chip, dtype) for kernel in kernels)


def minimum_bytes(case: Case) -> float:
    """What a LoRA-XS layer has to move at least, for the GB/s column."""
    return sum(kernel.bytes for kernel in fused(case))


def _sizes(case: Case) -> tuple[int, int, int, int, int]:
    return case.rows, case.in_features, case.out_features, case.rank, _ELEMENT[case.dtype]


def fused(case: Case, *, distinct: int = 1, adapters: int = 1, ids: bool = False) -> list[Kernel]:
    """One kernel per pass.

    Args:
        case: the layer.
        distinct: adapters that occur among the rows: each of their cores is read once per pass.
        adapters: all adapters: each gets a gradient, written once.
        ids: whether an id per row is read in each pass.
    """
    M, K, N, r, e = _sizes(case)
    per_row = M * _ID if ids else 0
    cores = distinct * r * r * _CORE
    kept = e * M * r if case.trains else 0
    bases, side = e * r * (K + N), r * (K + N)
    forward = Kernel(
        "forward",
        e * (M * K + N * K + M * N) + bases + cores + kept + per_row,
        2.0 * M * (K * N + side + r * r),
    )
    if not case.trains:
        return [forward]
    gradient = adapters * r * r * _CORE
    backward = Kernel(
        "backward",
        e * (M * N + N * K + M * r + M * K) + bases + cores + gradient + per_row,
        2.0 * M * (K * N + side + 2 * r * r),
    )
    return [forward, backward]


def bare(case: Case) -> list[Kernel]:
    """The layer without an adapter."""
    M, K, N, _, e = _sizes(case)
    product = e * (M * K + N * K + M * N)
    names = ("y = x Wᵀ", "dx = g W") if case.trains else ("y = x Wᵀ",)
    return [Kernel(name, product, 2.0 * M * K * N) for name in names]


def eager(case: Case) -> list[Kernel]:
    """LoRA-XS in plain PyTorch: a kernel for each operator of autograd's two passes."""
    M, K, N, r, e = _sizes(case)

    def product(name: str, m: int, k: int, n: int) -> Kernel:
        return Kernel(name, e * (m * k + k * n + m * n), 2.0 * m * k * n)

    def elementwise(name: str, numbers: int, operands: int) -> Kernel:
        return Kernel(name, e * numbers * operands, 0.0)

    kernels = [
        product("y = x Wᵀ", M, K, N), product("q = x Aᵀ", M, K, r), product("t = q Rᵀ", M, r, r),
        product("u = t Bᵀ", M, r, N), elementwise("u s", M * N, 2), elementwise("y + u", M * N, 3),
    ]  # fmt: skip
    if case.trains:
        kernels += [
            elementwise("s g", M * N, 2), product("p = s g B", M, N, r),
            product("p R", M, r, r), product("dR = pᵀ q", r, M, r), product("p R A", M, r, K),
            product("g W", M, N, K), elementwise("dx", M * K, 3),
        ]  # fmt: skip
    return kernels


def ordinary_lora(case: Case, *, distinct: int, adapters: int) -> list[Kernel]:
    """One ideal kernel per pass for LoRA with a pair of factors per adapter, each read once."""
    M, K, N, r, e = _sizes(case)
    base, side = e * (M * K + N * K + M * N), 2.0 * M * (K * N + r * (K + N))
    factors = e * r * (K + N)
    kept = e * M * r if case.trains else 0
    forward = Kernel("forward", base + distinct * factors + kept + M * _ID, side)
    if not case.trains:
        return [forward]
    moved = base + e * M * (K + r) + (distinct + adapters) * factors + M * _ID
    return [forward, Kernel("backward", moved, side + 2.0 * M * r * (K + N))]
