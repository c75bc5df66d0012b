"""``cvt``: between integers and floats, in all roundings met, and packed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.machine import Active, Function, Program
from tests.ptx.numeric import (
    DTYPES,
    Array,
    bf16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    flush,
    to_tf32,
)
from tests.ptx.ops import op, unknown
from tests.ptx.ops.floating import _to_f32_odd
from tests.ptx.ops.operands import pure, reader, writer
from tests.ptx.parser import Instruction

FLOATS = frozenset(("f16", "bf16", "f32", "f64", "tf32", "f16x2", "bf16x2"))
KNOWN = frozenset(
    ("rn", "rz", "rna", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "relu", "satfinite")
)
_WHOLE: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


@op("cvt")
def convert(i: Instruction, program: Program) -> Function:
    """``cvt.modes.to.from``."""
    to, source = i.mods[-2:]
    modes = set(i.mods[:-2])
    if not modes <= KNOWN or "satfinite" in modes or to not in (FLOATS | set(DTYPES)):
        raise unknown(i)
    if to in ("f16x2", "bf16x2"):
        return _packed(i, program, to[:-2], source, modes)
    if to in FLOATS and source in FLOATS:
        return pure(i, program, to, (source,), _float_to_float(i, to, source, modes))
    if to in FLOATS:
        return pure(i, program, to, (source,), _int_to_float(i, to, modes))
    if source in FLOATS:
        return pure(i, program, to, (source,), _float_to_int(i, to, source, modes))
    return _int_to_int(i, program, to, source, modes)


def _value(source: str, x: Array) -> Array:
    return bf16_to_f32(x) if source == "bf16" else x


def _float_to_float(
    i: Instruction, to: str, source: str, modes: set[str]
) -> Callable[[Array], Array]:
    whole = next((_WHOLE[m] for m in modes if m in _WHOLE), None)
    mode = next((m for m in ("rn", "rz", "rna") if m in modes), "rn")
    if (mode == "rna" and to != "tf32") or (mode == "rz" and to in ("f32", "f64")):
        raise unknown(i)

    def run(x: Array) -> Array:
        x = _value(source, x)
        if "ftz" in modes and x.dtype == np.float32:
            x = flush(x)
        if whole is not None:
            x = whole(x)
        if "sat" in modes:
            x = np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype)
        if "relu" in modes:
            x = np.where(x > 0, x, np.zeros_like(x))
        if to == "tf32":
            return to_tf32(x, mode)
        if to == "bf16":
            return f32_to_bf16(
                _to_f32_odd(x.astype(np.float32) if x.dtype.itemsize < 4 else x), mode
            )
        if to == "f16":
            return f32_to_f16(x, mode)
        return x.astype(DTYPES[to])

    return run


def _packed(i: Instruction, program: Program, to: str, source: str, modes: set[str]) -> Function:
    """Two fp32 into one register; the first source is the upper half."""
    if source != "f32" or len(i.operands) != 3:
        raise unknown(i)
    one = _float_to_float(i, to, source, modes)
    put = writer(i.operands[0], "b32", program)
    high, low = (reader(o, "f32", program) for o in i.operands[1:])

    def run(active: Active) -> None:
        upper, lower = one(high(active)).view(np.uint16), one(low(active)).view(np.uint16)
        put(active, upper.astype(np.uint32) << np.uint32(16) | lower)

    return run


def _int_to_float(i: Instruction, to: str, modes: set[str]) -> Callable[[Array], Array]:
    if not modes <= {"rn"}:
        raise unknown(i)

    def run(x: Array) -> Array:
        if to == "bf16":
            return f32_to_bf16(_to_f32_odd(x.astype(np.float64)))
        return x.astype(DTYPES[to])

    return run


def _float_to_int(
    i: Instruction, to: str, source: str, modes: set[str]
) -> Callable[[Array], Array]:
    """Out-of-range values clamp, NaN gives 0."""
    whole = next((_WHOLE[m] for m in modes if m in _WHOLE), None)
    if whole is None:
        raise unknown(i)
    dtype = np.dtype(DTYPES[to])
    info = np.iinfo(dtype)
    top = 2.0 ** (8 * dtype.itemsize - (dtype.kind == "i"))

    def run(x: Array) -> Array:
        x = _value(source, x).astype(np.float64)
        if "ftz" in modes:
            x = flush(x.astype(np.float32)).astype(np.float64)
        x = whole(x)
        inside = np.where(np.isnan(x) | (x >= top) | (x < info.min), 0, x)
        out = inside.astype(dtype)
        out = np.where(x >= top, info.max, out)
        return np.where(x < info.min, info.min, out).astype(dtype)

    return run


def _int_to_int(
    i: Instruction, program: Program, to: str, source: str, modes: set[str]
) -> Function:
    if not modes <= {"sat"}:
        raise unknown(i)
    info = np.iinfo(DTYPES[to])
    low = max(info.min, np.iinfo(DTYPES[source]).min)
    high = min(info.max, np.iinfo(DTYPES[source]).max)

    def run(x: Array) -> Array:
        if modes:
            x = np.clip(x, low, high)
        return x.astype(DTYPES[to])

    return pure(i, program, to, (source,), run)
