"""Comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.errors import UnknownInstruction
from tests.ptx.machine import Active, Function, Program
from tests.ptx.numeric import Array, bf16_to_f32, flush
from tests.ptx.ops import op, unknown
from tests.ptx.ops.operands import pure, reader, two_results, writer
from tests.ptx.parser import Instruction

Compare = Callable[[Array, Array], Array]

_ORDERED: dict[str, Compare] = {
    "eq": np.equal, "ne": lambda a, b: (a != b) & ~_unordered(a, b), "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_INTEGER: dict[str, Compare] = {
    **_ORDERED, "ne": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def _or_unordered(compare: Compare) -> Compare:
    return lambda a, b: compare(a, b) | _unordered(a, b)


_FLOAT: dict[str, Compare] = {
    **_ORDERED,
    **{f"{name}u": _or_unordered(f) for name, f in _ORDERED.items()},
    "num": lambda a, b: ~_unordered(a, b),
    "nan": _unordered,
}


def comparison(i: Instruction, name: str, kind: str) -> Compare:
    """The function of a comparison modifier for a type."""
    table = _FLOAT if kind in ("f16", "bf16", "f32", "f64") else _INTEGER
    if name not in table:
        raise unknown(i)
    compare = table[name]
    if kind == "bf16":
        return lambda a, b: compare(bf16_to_f32(a), bf16_to_f32(b))
    if i.has("ftz"):
        return lambda a, b: compare(flush(a), flush(b))
    return compare


_COMBINE: dict[str, Compare] = {
    "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
}  # fmt: skip


@op("setp")
def set_predicate(i: Instruction, program: Program) -> Function:
    """``p|q = (a cmp b) bool c``."""
    kind = i.mods[-1]
    compare = comparison(i, i.mods[0], kind)
    boolean = next((_COMBINE[m] for m in i.mods[1:-1] if m in _COMBINE), None)
    if set(i.mods[1:-1]) - set(_COMBINE) - {"ftz"}:
        raise unknown(i)
    first, second = (writer(o, "pred", program) for o in two_results(i.operands[0]))
    a, b = (reader(o, kind, program) for o in i.operands[1:3])
    if (boolean is not None) != (len(i.operands) == 4):
        raise UnknownInstruction(f"{i.opcode} with {len(i.operands)} operands")
    c = reader(i.operands[3], "pred", program) if boolean else None

    def run(active: Active) -> None:
        p = compare(a(active), b(active))
        q = ~p
        if boolean is not None and c is not None:
            third = c(active)
            p, q = boolean(p, third), boolean(q, third)
        first(active, p)
        second(active, q)

    return run


@op("set")
def set_value(i: Instruction, program: Program) -> Function:
    """``set.cmp.u32/s32/f32.type``: all ones (or 1.0) where true."""
    to, kind = i.mods[-2:]
    if set(i.mods[1:-2]) - {"ftz"} or to not in ("u32", "s32", "f32", "b32"):
        raise unknown(i)
    compare = comparison(i, i.mods[0], kind)
    yes = np.float32(1).view(np.uint32) if to == "f32" else np.uint32(0xFFFFFFFF)
    return pure(
        i, program, "b32", (kind, kind), lambda a, b: np.where(compare(a, b), yes, np.uint32(0))
    )


@op("selp")
def select(i: Instruction, program: Program) -> Function:
    """``d = p ? a : b``; only the chosen source must be initialised."""
    kind = i.mods[-1]
    put = writer(i.operands[0], kind, program)
    a, b = (reader(o, kind, program, lax=True) for o in i.operands[1:3])
    strict = [reader(o, kind, program) for o in i.operands[1:3]]
    p = reader(i.operands[3], "pred", program)

    def run(active: Active) -> None:
        chosen = p(active)
        for get, mask in zip(strict, (chosen, ~chosen), strict=True):
            get(Active(active.cta, active.mask & mask, False))
        put(active, np.where(chosen, a(active), b(active)))

    return run


@op("slct")
def select_by_sign(i: Instruction, program: Program) -> Function:
    """``d = c >= 0 ? a : b``."""
    kind, by = i.mods[-2:]

    def choose(a: Array, b: Array, c: Array) -> Array:
        return np.where(c >= 0, a, b)

    return pure(i, program, kind, (kind, kind, by), choose)
