"""Floating-point arithmetic.

Every result is rounded once, to nearest even, unless stated: fp32 and narrower go through
float64 (fused multiply-adds by way of a sum rounded to odd, so that no double rounding happens).
The ``.approx`` functions give the value rounded from float64; the error of the hardware's
approximations is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.machine import Function, Program
from tests.ptx.numeric import (
    Array,
    bf16_to_f32,
    f32_to_bf16,
    flush,
    fma_f64,
    fma_to_odd,
)
from tests.ptx.ops import op, unknown
from tests.ptx.ops.operands import pure
from tests.ptx.parser import Instruction

Wide = Callable[..., Array]
KNOWN = frozenset(("rn", "ftz", "approx", "full", "sat", "NaN", "f32", "f64", "f16", "bf16",
                   "f16x2", "bf16x2", "relu"))  # fmt: skip


def _unpack(kind: str, x: Array) -> Array:
    """Values that NumPy can calculate with."""
    if kind == "f16x2":
        return x.view(np.float16)
    if kind == "bf16x2":
        return bf16_to_f32(x.view(np.uint16))
    return bf16_to_f32(x) if kind == "bf16" else x


def _narrow(kind: str, x: Array) -> Array:
    """Round to the type, from float32 or an odd-rounded float64."""
    if kind in ("f16", "f16x2"):
        half = x if x.dtype == np.float16 else x.astype(np.float16)
        return half if kind == "f16" else half.view(np.uint32)
    if kind in ("bf16", "bf16x2"):
        bits = f32_to_bf16(_to_f32_odd(x))
        return bits if kind == "bf16" else bits.view(np.uint32)
    return x.astype(np.float32) if kind == "f32" else x


def _to_f32_odd(x: Array) -> Array:
    """float64 to fp32, rounded to odd where it is inexact, for a further rounding to bf16."""
    if x.dtype == np.float32:
        return x
    y = x.astype(np.float32)
    off = (y.astype(np.float64) != x) & np.isfinite(y)
    if not off.any():
        return y
    bits = y.view(np.uint32)
    outward = np.abs(x) > np.abs(y.astype(np.float64))
    odd = np.where(outward, bits + np.uint32(1), bits - np.uint32(1))
    return np.where(off & ((bits & 1) == 0), odd, bits).view(np.float32)


def _wrapped(i: Instruction, kind: str, function: Wide) -> Wide:
    """``function`` on values of ``kind``, with the instruction's .ftz, .sat and .relu."""
    if not set(i.mods) <= KNOWN:
        raise unknown(i)
    ftz, sat, relu = "ftz" in i.mods, "sat" in i.mods, "relu" in i.mods
    simple = kind in ("f32", "f64")

    def run(*args: Array) -> Array:
        values = args if simple else [_unpack(kind, a) for a in args]
        if ftz:
            values = [flush(v) for v in values]
        out = function(*values)
        if sat:
            out = np.where(np.isnan(out), 0, np.clip(out, 0, 1)).astype(out.dtype)
        if relu:
            out = np.where(out > 0, out, np.zeros_like(out))
        if out.dtype != np.float64 and simple and not ftz:
            return out
        out = _narrow(kind, out)
        return flush(out) if ftz and simple else out

    return run


def _minmax(name: str, nan: bool) -> Wide:
    pick: dict[tuple[str, bool], Wide] = {
        ("min", False): np.fmin, ("max", False): np.fmax,
        ("min", True): np.minimum, ("max", True): np.maximum,
    }  # fmt: skip
    return pick[name, nan]


def _exactly(function: Wide, kind: str) -> Wide:
    """Sums, products and quotients of bf16 values: through float64, rounded once."""
    if kind not in ("bf16", "bf16x2"):
        return function
    return lambda a, b: function(a.astype(np.float64), b.astype(np.float64))


def binary(i: Instruction, program: Program) -> Function:
    """add, sub, mul, div, min, max."""
    kind = i.mods[-1]
    if i.name in ("min", "max"):
        function = _minmax(i.name, i.has("NaN"))
    elif i.name in ("add", "sub", "mul", "div"):
        plain: dict[str, Wide] = {
            "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
        }  # fmt: skip
        function = _exactly(plain[i.name], kind)
    else:
        raise unknown(i)
    return pure(i, program, kind, (kind, kind), _wrapped(i, kind, function))


def unary(i: Instruction, program: Program) -> Function:
    """abs and neg: the sign bit alone."""
    kind = i.mods[-1]
    function = np.abs if i.name == "abs" else np.negative
    return pure(i, program, kind, (kind,), _wrapped(i, kind, function))


@op("fma")
def fma(i: Instruction, program: Program) -> Function:
    """a·b + c, rounded once."""
    kind = i.mods[-1]
    function = fma_f64 if kind == "f64" else fma_to_odd
    return pure(i, program, kind, (kind,) * 3, _wrapped(i, kind, function))


@op("copysign")
def copysign(i: Instruction, program: Program) -> Function:
    """The sign of a with the magnitude of b."""
    kind = i.mods[-1]
    return pure(i, program, kind, (kind, kind), lambda a, b: np.copysign(b, a))


def _through_f64(function: Wide) -> Wide:
    return lambda a: function(a.astype(np.float64))


_FUNCTIONS: dict[str, Wide] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@op(*_FUNCTIONS)
def function(i: Instruction, program: Program) -> Function:
    """Elementary functions, packed forms too."""
    kind = i.mods[-1]
    return pure(i, program, kind, (kind,), _wrapped(i, kind, _through_f64(_FUNCTIONS[i.name])))


@op("testp")
def test_property(i: Instruction, program: Program) -> Function:
    """``testp.finite`` and friends."""
    tests: dict[str, Wide] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
    }
    if i.mods[0] not in tests:
        raise unknown(i)
    return pure(i, program, "pred", (i.mods[1],), tests[i.mods[0]])
