"""Readers and writers of operands, made once per instruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ptx.errors import UnknownInstruction
from tests.ptx.machine import Active, Function, Program, storage
from tests.ptx.numeric import DTYPES, UNSIGNED, Array, f32_to_bf16, size_of
from tests.ptx.ops.special import special_register
from tests.ptx.parser import Imm, Instruction, Not, Operand, Pair, Reg, Sink, Special, Sym

Reader = Callable[[Active], Array]
Writer = Callable[[Active, Array], None]


def reader(operand: Operand, kind: str, program: Program, *, lax: bool = False) -> Reader:
    """A function that gives the operand's values in all threads, viewed as ``kind``.

    ``lax`` reads do not mind an uninitialised register (copies hand it on).
    """
    if isinstance(operand, Reg):
        return _register_reader(operand, kind, lax)
    if isinstance(operand, Imm):
        return _constant(literal(operand, kind), kind, program)
    if isinstance(operand, Sym):
        return _constant(symbol(operand, program), kind, program)
    if isinstance(operand, Special):
        return special_register(operand.name, DTYPES[kind])
    if isinstance(operand, Not):
        inner = reader(operand.operand, "pred", program)
        return lambda active: ~inner(active)
    raise UnknownInstruction(f"operand {operand} where a value is needed")


def _register_reader(reg: Reg, kind: str, lax: bool) -> Reader:
    index, dtype, name = reg.index, DTYPES[kind], reg.name
    have, want = np.dtype(storage(reg)), np.dtype(dtype)
    if (reg.kind == "pred") != (kind == "pred") or want.itemsize > have.itemsize:
        raise UnknownInstruction(f"register {name} of type {reg.kind} read as {kind}")
    narrow = UNSIGNED[want.itemsize] if want.itemsize < have.itemsize else None

    def read(active: Active) -> Array:
        found = active.cta.regs[index]
        if found.undefined is not None and not lax:
            active.cta.check_defined(found, active, name)
        value = found.value if narrow is None else found.value.astype(narrow)
        return value.view(dtype)

    return read


def _constant(value: Any, kind: str, program: Program) -> Reader:
    array = np.full(program.threads, value, DTYPES[kind])
    array.flags.writeable = False
    return lambda active: array


def literal(imm: Imm, kind: str) -> Any:
    """A literal's value as ``kind``."""
    dtype = np.dtype(DTYPES[kind])
    if kind == "pred":
        return bool(imm.value)
    if imm.bits:
        raw = np.array(imm.value, UNSIGNED[imm.bits // 8])
        if dtype.itemsize * 8 == imm.bits:
            return raw.view(dtype)[()]
        return raw.view(np.float32 if imm.bits == 32 else np.float64).astype(dtype)[()]
    if isinstance(imm.value, float) or dtype.kind == "f":
        if kind == "bf16":
            return f32_to_bf16(np.array([imm.value], np.float32))[0]
        return np.array(imm.value).astype(dtype)[()]
    width = 8 * dtype.itemsize
    return np.array(imm.value & ((1 << width) - 1), UNSIGNED[dtype.itemsize]).view(dtype)[()]


def symbol(sym: Sym, program: Program) -> int:
    """The address of a variable or parameter."""
    if sym.name in program.symbols:
        return program.symbols[sym.name]
    for param in program.kernel.params:
        if param.name == sym.name:
            return program.param_address + param.offset
    raise UnknownInstruction(f"unknown symbol {sym.name}")


def writer(operand: Operand, kind: str, program: Program) -> Writer:
    """A function that stores values of ``kind`` where threads are active.

    A register wider than ``kind`` is filled by sign or zero extension.
    """
    if isinstance(operand, Sink):
        return lambda active, value: None
    if not isinstance(operand, Reg):
        raise UnknownInstruction(f"operand {operand} where a register is needed")
    index, want = operand.index, storage(operand)
    signed = kind.startswith("s")
    have = np.dtype(DTYPES[kind])
    if (operand.kind == "pred") != (kind == "pred") or have.itemsize > np.dtype(want).itemsize:
        raise UnknownInstruction(f"{kind} does not fit register {operand.name} ({operand.kind})")
    extend = have.itemsize < np.dtype(want).itemsize

    def write(active: Active, value: Array) -> None:
        if extend:
            value = value.view(have).astype(np.dtype(want).name.lstrip("u")) if signed else (
                value.view(UNSIGNED[have.itemsize]))  # fmt: skip
            value = value.astype(want)
        else:
            value = value.view(want)
        set_register(active, index, value)

    return write


def set_register(active: Active, index: int, value: Array, undefined: Array | None = None) -> None:
    """Replace a register's value in the active threads."""
    reg = active.cta.regs[index]
    if active.full:
        reg.value = value
        reg.undefined = undefined
        return
    mask = active.mask
    reg.value = np.where(mask, value, reg.value)
    old = reg.undefined
    if old is not None or undefined is not None:
        new = np.where(
            mask,
            False if undefined is None else undefined,
            False if old is None else old,
        )
        reg.undefined = new if new.any() else None


def pure(
    instruction: Instruction, program: Program, out: str, ins: Sequence[str],
    function: Callable[..., Array],
) -> Function:  # fmt: skip
    """An instruction that computes its first operand from the others."""
    target, *sources = instruction.operands
    if len(sources) != len(ins):
        raise UnknownInstruction(f"{instruction.opcode} with {len(sources)} sources")
    put = writer(target, out, program)
    gets = [reader(s, kind, program) for s, kind in zip(sources, ins, strict=True)]
    if len(gets) == 1:
        (one,) = gets
        return lambda active: put(active, function(one(active)))
    if len(gets) == 2:
        one, two = gets
        return lambda active: put(active, function(one(active), two(active)))
    return lambda active: put(active, function(*[get(active) for get in gets]))


def two_results(operand: Operand) -> tuple[Operand, Operand]:
    """The targets of ``d|p``; a lone target has no second."""
    return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, Sink())


def gathered(vector: Sequence[Operand], kind: str, program: Program) -> Callable[[Active], Array]:
    """All registers of a vector operand, stacked: ``[registers, threads]``."""
    gets = [reader(item, kind, program) for item in vector]
    return lambda active: np.stack([get(active) for get in gets])


def width_of(kind: str) -> int:
    return size_of(kind)
