"""Instruction semantics, one module per family.

A family registers a builder per opcode name: given the instruction and the program it returns the
function that executes it for a set of active threads. Builders look at modifiers once; whatever
they do not know raises ``UnknownInstruction``, at the moment the instruction is reached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

from tests.ptx.errors import UnknownInstruction
from tests.ptx.machine import Active, Function, Program
from tests.ptx.parser import Instruction

Builder = Callable[[Instruction, Program], Function]

FAMILIES = (
    "data", "integer", "floating", "convert", "predicate", "loadstore", "atomic", "barrier",
    "warp", "matrix", "tensor", "copies", "wgmma", "mbarrier", "tensormap",
    "bulk", "cluster",
)  # fmt: skip

_BUILDERS: dict[str, Builder] = {}


def op(*names: str) -> Callable[[Builder], Builder]:
    """Register a builder for opcodes; the longest registered prefix of an opcode wins."""

    def register(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS[name] = builder
        return builder

    return register


def unknown(instruction: Instruction, why: str = "") -> UnknownInstruction:
    """The error for something without a meaning here."""
    fault = UnknownInstruction(f"unknown instruction {instruction.opcode} {why}".strip())
    fault.locate(instruction.line, instruction.text)
    return fault


@cache
def _load_families() -> None:
    for family in FAMILIES:
        import_module(f"tests.ptx.ops.{family}")


def build(instruction: Instruction, program: Program) -> Function:
    """Bind an instruction; an unknown one only fails when it is executed."""
    _load_families()
    parts = (instruction.name, *instruction.mods)
    builder = next(
        (_BUILDERS[key] for n in range(len(parts), 0, -1)
         if (key := ".".join(parts[:n])) in _BUILDERS),
        None,
    )  # fmt: skip
    if instruction.name in ("bra", "ret", "exit"):
        return _never
    if builder is None:
        return _failing(unknown(instruction))
    try:
        return builder(instruction, program)
    except UnknownInstruction as fault:
        fault.locate(instruction.line, instruction.text)
        return _failing(fault)


def _never(active: Active) -> None:
    raise AssertionError("control flow is the machine's")


def _failing(fault: UnknownInstruction) -> Function:
    def fail(active: Active) -> None:
        raise fault

    return fail
