"""Moving values: ``mov``, packing, address conversions."""

from __future__ import annotations

import numpy as np

from tests.ptx.errors import Trap
from tests.ptx.machine import Active, Function, Program
from tests.ptx.numeric import DTYPES, UNSIGNED, size_of
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import LOCAL_WINDOW, SHARED_WINDOW
from tests.ptx.ops.operands import pure, reader, set_register, writer
from tests.ptx.parser import Instruction, Reg, Sink, Vec


@op("mov")
def move(i: Instruction, program: Program) -> Function:
    """A copy, or a register to or from its parts. Uninitialised values are handed on."""
    if len(i.mods) != 1:
        raise unknown(i)
    kind = i.mods[0]
    target, source = i.operands
    if isinstance(target, Vec):
        return _unpack(i, program, kind)
    if isinstance(source, Vec):
        return _pack(i, program, kind)
    put = writer(target, kind, program)
    get = reader(source, kind, program, lax=True)
    if isinstance(source, Reg) and isinstance(target, Reg) and source.kind == target.kind:
        here, there = source.index, target.index

        def copy(active: Active) -> None:
            reg = active.cta.regs[here]
            set_register(active, there, reg.value, reg.undefined)

        return copy
    return lambda active: put(active, get(active))


def _unpack(i: Instruction, program: Program, kind: str) -> Function:
    target, source = i.operands
    assert isinstance(target, Vec)
    part = f"b{8 * size_of(kind) // len(target.items)}"
    puts = [writer(t, part, program) for t in target.items]
    get = reader(source, kind, program, lax=True)
    undefined = source.index if isinstance(source, Reg) else -1

    def run(active: Active) -> None:
        parts = get(active).view(DTYPES[part]).reshape(-1, len(puts))
        unset = active.cta.regs[undefined].undefined if undefined >= 0 else None
        for n, (put, reg) in enumerate(zip(puts, target.items, strict=True)):
            value = np.ascontiguousarray(parts[:, n])
            if unset is not None and isinstance(reg, Reg):
                set_register(active, reg.index, value, unset)
            elif not isinstance(reg, Sink):
                put(active, value)

    return run


def _pack(i: Instruction, program: Program, kind: str) -> Function:
    target, source = i.operands
    assert isinstance(source, Vec)
    part = f"b{8 * size_of(kind) // len(source.items)}"
    put = writer(target, kind, program)
    gets = [reader(s, part, program) for s in source.items]

    def run(active: Active) -> None:
        parts = np.stack([get(active) for get in gets], 1)
        put(active, parts.view(UNSIGNED[size_of(kind)]).reshape(-1))

    return run


@op("cvta")
def convert_address(i: Instruction, program: Program) -> Function:
    """``cvta(.to).space``: shared and local memory are windows of the generic space."""
    space = next((m for m in i.mods if m.split("::")[0] in _WINDOWS), "")
    kind = i.mods[-1]
    shift = np.uint64(_WINDOWS.get(space.split("::")[0], 0))
    if not space or kind not in ("u64", "u32"):
        raise unknown(i)
    if kind == "u32":
        if shift:
            raise unknown(i, "in a 32-bit address space")
        return pure(i, program, kind, (kind,), lambda a: a)
    if i.has("to"):
        return pure(i, program, kind, (kind,), lambda a: a - shift)
    return pure(i, program, kind, (kind,), lambda a: a + shift)


_WINDOWS = {
    "global": 0, "const": 0, "param": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW,
}  # fmt: skip


@op("isspacep")
def is_in_space(i: Instruction, program: Program) -> Function:
    """Whether a generic address lies in a state space."""
    from tests.ptx.memory import BASE

    space = i.mods[0].split("::")[0]
    bounds = {
        "shared": (SHARED_WINDOW, SHARED_WINDOW + (1 << 32)),
        "local": (LOCAL_WINDOW, LOCAL_WINDOW + (1 << 32)),
        "global": (BASE, 1 << 63),
    }
    if space not in bounds:
        raise unknown(i)
    low, high = (np.uint64(b) for b in bounds[space])
    return pure(i, program, "pred", ("u64",), lambda a: (a >= low) & (a < high))


@op("trap")
def trap(i: Instruction, program: Program) -> Function:
    """An error of the kernel's own."""

    def run(active: Active) -> None:
        raise Trap("the kernel trapped", thread=int(active.lanes[0]))

    return run


@op("nanosleep", "griddepcontrol", "setmaxnreg", "prefetch", "prefetchu", "applypriority",
    "discard", "pmevent")  # fmt: skip
def nothing(i: Instruction, program: Program) -> Function:
    """Hints and waits that change no value here."""
    return lambda active: None


@op("createpolicy")
def cache_policy(i: Instruction, program: Program) -> Function:
    """A cache hint: some value."""
    put = writer(i.operands[0], "b64", program)
    return lambda active: put(active, np.zeros(program.threads, np.uint64))
