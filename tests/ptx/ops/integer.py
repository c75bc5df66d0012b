"""Integer arithmetic, logic, shifts and bit fields."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.machine import Function, Program
from tests.ptx.numeric import DTYPES, Array
from tests.ptx.ops import floating, op, unknown
from tests.ptx.ops.operands import pure
from tests.ptx.parser import Instruction

INTEGERS = frozenset(("u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64", "pred"))


def _only(i: Instruction, *allowed: str) -> str:
    """The type of an instruction that has only these modifiers."""
    kind = i.mods[-1]
    extra = set(i.mods[:-1]) - set(allowed)
    if extra or kind not in INTEGERS:
        raise unknown(i)
    return kind


def _unsigned(kind: str) -> str:
    return "u" + kind[1:] if kind != "pred" else kind


def _divide(a: Array, b: Array) -> Array:
    """Truncated division; by zero all bits are set, as the hardware does."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    if a.dtype.kind == "u":
        q = a // safe
    else:  # the most negative number over -1 wraps
        q = a // safe
        q = q + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), q)


def _remainder(a: Array, b: Array) -> Array:
    return a - _divide(a, b) * b


def _arithmetic(name: str) -> Callable[[Array, Array], Array]:
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
        "div": _divide, "rem": _remainder,
    }  # fmt: skip
    return functions[name]


@op("add", "sub", "min", "max", "div", "rem")
def binary(i: Instruction, program: Program) -> Function:
    """``d = a ∘ b``; floats are another family's."""
    if i.mods[-1] not in INTEGERS:
        return floating.binary(i, program)
    kind = _only(i)
    return pure(i, program, kind, (kind, kind), _arithmetic(i.name))


@op("abs", "neg")
def unary(i: Instruction, program: Program) -> Function:
    """``|a|`` and ``-a``, wrapping."""
    if i.mods[-1] not in INTEGERS:
        return floating.unary(i, program)
    kind = _only(i)
    return pure(i, program, kind, (kind,), np.abs if i.name == "abs" else np.negative)


def high_half(a: Array, b: Array) -> Array:
    """The upper half of the double-width product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
        return ((a.astype(wide) * b.astype(wide)) >> bits).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = ua & mask, ua >> shift, ub & mask, ub >> shift
    middle = ah * bl + ((al * bl) >> shift)
    other = al * bh + (middle & mask)
    high = ah * bh + (middle >> shift) + (other >> shift)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(a.dtype)


def _product(mode: str) -> Callable[[Array, Array], Array]:
    def wide(a: Array, b: Array) -> Array:
        double = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}")
        return a.astype(double) * b.astype(double)

    functions: dict[str, Callable[[Array, Array], Array]] = {
        "lo": np.multiply, "hi": high_half, "wide": wide,
    }  # fmt: skip
    return functions[mode]


@op("mul", "mad")
def multiply(i: Instruction, program: Program) -> Function:
    """``mul``/``mad`` ``.lo``, ``.hi``, ``.wide``."""
    if i.mods[-1] not in INTEGERS:
        return (floating.fma if i.name == "mad" else floating.binary)(i, program)
    mode = i.mods[0]
    if mode not in ("lo", "hi", "wide") or len(i.mods) != 2:
        raise unknown(i)
    kind = i.mods[1]
    product = _product(mode)
    out = f"{kind[0]}{2 * int(kind[1:])}" if mode == "wide" else kind
    if i.name == "mul":
        return pure(i, program, out, (kind, kind), product)
    return pure(i, program, out, (kind, kind, out), lambda a, b, c: product(a, b) + c)


@op("mul24.lo", "mad24.lo")
def multiply24(i: Instruction, program: Program) -> Function:
    """The low half of a product of 24-bit numbers."""
    kind = i.mods[-1]
    bits = DTYPES[kind](8)

    def low(a: Array) -> Array:
        return (a << bits) >> bits

    if i.name == "mul24":
        return pure(i, program, kind, (kind, kind), lambda a, b: low(a) * low(b))
    return pure(i, program, kind, (kind,) * 3, lambda a, b, c: low(a) * low(b) + c)


@op("and", "or", "xor", "not", "cnot")
def logic(i: Instruction, program: Program) -> Function:
    """Bitwise logic, predicates too."""
    kind = _only(i)
    functions: dict[str, Callable[..., Array]] = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }  # fmt: skip
    kinds = (kind,) if i.name in ("not", "cnot") else (kind, kind)
    return pure(i, program, kind, kinds, functions[i.name])


def shift_left(a: Array, n: Array) -> Array:
    """Amounts beyond the width give 0."""
    bits = 8 * a.dtype.itemsize
    moved = a << np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, np.zeros((), a.dtype), moved)


def shift_right(a: Array, n: Array) -> Array:
    """Amounts beyond the width give 0, or the sign."""
    bits = 8 * a.dtype.itemsize
    moved = a >> np.minimum(n, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(n >= bits, np.zeros((), a.dtype), moved)


@op("shl", "shr")
def shift(i: Instruction, program: Program) -> Function:
    """Shifts by a 32-bit amount."""
    kind = _only(i)
    return pure(i, program, kind, (kind, "u32"), shift_left if i.name == "shl" else shift_right)


@op("shf")
def funnel(i: Instruction, program: Program) -> Function:
    """``shf.l/r.wrap/clamp.b32``: a shift of the 64 bits b:a."""
    if len(i.mods) != 3 or i.mods[2] != "b32":
        raise unknown(i)
    left, wrap = i.mods[0] == "l", i.mods[1] == "wrap"

    def run(a: Array, b: Array, c: Array) -> Array:
        n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        moved = (both << n) >> np.uint64(32) if left else both >> n
        return moved.astype(np.uint32)

    return pure(i, program, "b32", ("b32", "b32", "u32"), run)


@op("bfe")
def extract(i: Instruction, program: Program) -> Function:
    """A field of ``c`` bits from bit ``b``, zero- or sign-extended."""
    kind = _only(i)
    bits = int(kind[1:])
    wide = _unsigned(kind)

    def run(a: Array, b: Array, c: Array) -> Array:
        start, length = (b & np.uint32(255)).astype(np.int64), (c & np.uint32(255)).astype(np.int64)
        field = shift_right(a, start)
        keep = np.minimum(length, np.maximum(bits - start, 0))
        mask = shift_left(np.ones_like(a), keep) - np.ones_like(a)
        out = field & mask
        if kind.startswith("s"):
            last = np.clip(start + length - 1, 0, bits - 1)
            sign = (shift_right(a, last) & np.ones_like(a)) != 0
            out = np.where(sign & (length > 0), out | ~_low_bits(a, length, bits), out)
        return out

    return pure(i, program, kind, (wide, "u32", "u32"), run)


def _low_bits(a: Array, length: Array, bits: int) -> Array:
    one = np.ones_like(a)
    return np.where(length >= bits, ~np.zeros_like(a), shift_left(one, length) - one)


@op("bfi")
def insert(i: Instruction, program: Program) -> Function:
    """``d`` = ``b`` with ``len`` bits of ``a`` at ``pos``."""
    kind = _only(i)
    bits = int(kind[1:])

    def run(a: Array, b: Array, c: Array, d: Array) -> Array:
        start, length = (c & np.uint32(255)).astype(np.int64), (d & np.uint32(255)).astype(np.int64)
        mask = shift_left(_low_bits(a, length, bits), start)
        return (b & ~mask) | (shift_left(a, start) & mask)

    return pure(i, program, kind, (kind, kind, "u32", "u32"), run)


@op("popc", "clz", "brev", "bfind")
def bits(i: Instruction, program: Program) -> Function:
    """Counting and reversing bits."""
    kind = i.mods[-1]
    width = int(kind[1:])
    if i.mods != (kind,) or (i.name == "bfind" and kind.startswith("s")):
        raise unknown(i)

    def length(a: Array) -> Array:
        high = (a >> a.dtype.type(width // 2)).astype(np.float64)
        low = (a & a.dtype.type((1 << width // 2) - 1)).astype(np.float64)
        top = np.frexp(high)[1]
        return np.where(high > 0, top + width // 2, np.frexp(low)[1])

    def reverse(a: Array) -> Array:
        out = np.zeros_like(a)
        for n in range(width):
            out |= ((a >> a.dtype.type(n)) & a.dtype.type(1)) << a.dtype.type(width - 1 - n)
        return out

    functions: dict[str, tuple[str, Callable[[Array], Array]]] = {
        "popc": ("u32", lambda a: np.bitwise_count(a).astype(np.uint32)),
        "clz": ("u32", lambda a: (width - length(a)).astype(np.uint32)),
        "bfind": ("u32", lambda a: (length(a) - 1).astype(np.int32).view(np.uint32)),
        "brev": (kind, reverse),
    }
    out, function = functions[i.name]
    return pure(i, program, out, (_unsigned(kind),), function)


@op("lop3")
def ternary_logic(i: Instruction, program: Program) -> Function:
    """``lop3.b32``: bit (a, b, c) of an 8-bit table."""
    from tests.ptx.parser import Imm

    *_, table = i.operands
    if i.mods != ("b32",) or not isinstance(table, Imm):
        raise unknown(i)
    rows = [n for n in range(8) if int(table.value) >> n & 1]
    plain = Instruction(i.line, i.text, i.name, i.mods, i.operands[:-1])

    def run(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros_like(a)
        for n in rows:
            out |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        return out

    return pure(plain, program, "b32", ("b32",) * 3, run)


@op("prmt")
def permute(i: Instruction, program: Program) -> Function:
    """``prmt.b32``: pick bytes of b:a; bit 3 of a selector spreads the byte's sign."""
    if i.mods != ("b32",):
        raise unknown(i)

    def run(a: Array, b: Array, c: Array) -> Array:
        source = np.stack([a, b], 1).view(np.uint8).reshape(len(a), 8)
        chosen = (c[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
        byte = np.take_along_axis(source, (chosen & 7).astype(np.int64), 1)
        sign = np.where(byte & 0x80, np.uint8(255), np.uint8(0))
        out = np.where(chosen & 8, sign, byte)
        return np.ascontiguousarray(out).view(np.uint32).reshape(len(a))

    return pure(i, program, "b32", ("b32",) * 3, run)


@op("sad")
def absolute_difference(i: Instruction, program: Program) -> Function:
    """``|a - b| + c``."""
    kind = _only(i)

    def run(a: Array, b: Array, c: Array) -> Array:
        return np.where(a > b, a - b, b - a) + c

    return pure(i, program, kind, (kind,) * 3, run)
