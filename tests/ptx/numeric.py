"""PTX's scalar types as NumPy sees them, and the roundings NumPy lacks.

A register is an array of unsigned integers of its declared width, one entry per thread; an
instruction views it as the type it names. ``bf16`` and the packed types have no NumPy twin and
are handled as their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip


def size_of(kind: str) -> int:
    """Bytes of a scalar type."""
    return 16 if kind == "b128" else np.dtype(DTYPES[kind]).itemsize


def bf16_to_f32(bits: Array) -> Array:
    """Exact: a bf16 is the upper half of an fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array, mode: str = "rn") -> Array:
    """Round to nearest even, or toward zero (``rz``); a NaN becomes the canonical 0x7fff."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rn":
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    else:
        rounded = bits
    result = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), result)


def f32_to_f16(x: Array, mode: str = "rn") -> Array:
    """Round to nearest even, or toward zero (``rz``)."""
    wide = np.ascontiguousarray(x)
    half = wide.astype(np.float16)
    if mode == "rz":
        too_far = np.abs(half.astype(np.float64)) > np.abs(wide.astype(np.float64))
        half = np.where(too_far, np.nextafter(half, np.float16(0)), half)
    return half


def to_tf32(x: Array, mode: str) -> Array:
    """Drop 13 bits: ``rna`` nearest, ties away; ``rn`` nearest even; ``rz`` truncation."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    if mode == "rna":
        rounded = bits + np.uint32(0x1000)
    elif mode == "rn":
        rounded = bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    else:
        rounded = bits
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return np.where(special, bits, rounded) & np.uint32(0xFFFFE000)


def flush(x: Array) -> Array:
    """Denormals to zero of the same sign (``.ftz``)."""
    tiny = np.abs(x) < np.finfo(x.dtype).tiny
    return np.where(tiny, np.copysign(np.zeros((), x.dtype), x), x) if tiny.any() else x


def _odd_sum(p: Array, c: Array) -> Array:
    """p + c in float64, rounded to odd: a second rounding to a narrower type is then exact."""
    s = p + c
    back = s - p
    error = (p - (s - back)) + (c - back)
    inexact = (error != 0) & np.isfinite(s)
    if not inexact.any():
        return s
    bits = s.view(np.int64)
    even = inexact & ((bits & 1) == 0)
    outward = (error > 0) == (s > 0)
    return np.where(even, bits + np.where(outward, 1, -1), bits).view(np.float64)


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a·b + c for operands of at most 24 bits, ready to be rounded once to their type."""
    return _odd_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in float64 with the product's rounding error added back (Dekker's split)."""

    def split(x: Array) -> tuple[Array, Array]:
        t = x * np.float64(134217729.0)
        high = t - (t - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    low = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    back = s - p
    error = (p - (s - back)) + (c - back)
    exact = s + (low + error)
    return np.where(np.isfinite(exact), exact, s)
