"""``atom`` and ``red``, in global and shared memory.

Threads of one instruction act in the order of their numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.machine import SWITCH, Active, Cta, Function, Program
from tests.ptx.numeric import DTYPES, UNSIGNED, Array, bf16_to_f32, f32_to_bf16, size_of
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import address_reader, space_of, split_cluster, split_generic
from tests.ptx.ops.loadstore import synchronise
from tests.ptx.ops.operands import reader, writer
from tests.ptx.parser import Instruction, Operand, Sink, Vec

Change = Callable[[Array, Array], Array]

_OPERATIONS: dict[str, Change] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new,
    "inc": lambda old, top: np.where(old >= top, np.zeros_like(old), old + 1).astype(old.dtype),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - 1).astype(old.dtype),
}  # fmt: skip
_KNOWN = frozenset((
    "global", "shared", "shared::cta", "shared::cluster", "relaxed", "acquire", "release",
    "acq_rel", "cta", "cluster", "gpu", "sys", "noftz", "v2", "v4", "v8", "cas", *_OPERATIONS,
))  # fmt: skip


def _on_bits(kind: str, change: Change) -> Change:
    """``change`` on the type's values, from and to raw bits."""
    if kind in ("bf16", "bf16x2"):
        return lambda old, new: f32_to_bf16(
            change(bf16_to_f32(old.view(np.uint16)), bf16_to_f32(new.view(np.uint16)))
        ).view(old.dtype)
    dtype = np.float16 if kind == "f16x2" else DTYPES[kind]
    return lambda old, new: change(old.view(dtype), new.view(dtype)).view(old.dtype)


@op("atom", "red")
def atomic(i: Instruction, program: Program) -> Function:
    """Read, change, write back; a strong access of the order it names (relaxed if none)."""
    kind = i.mods[-1]
    name = next((m for m in i.mods if m in _OPERATIONS or m == "cas"), "")
    mods = [m for m in i.mods[:-1] if not m.startswith("L2::")]
    if not set(mods) <= _KNOWN or not name or kind not in DTYPES:
        raise unknown(i)
    operands = i.operands if i.name == "atom" else (Sink(), *i.operands)
    targets = operands[0].items if isinstance(operands[0], Vec) else (operands[0],)
    where = address_reader(operands[1], program)
    gets = [_values(o, kind, program) for o in operands[2 : 4 if name == "cas" else 3]]
    if isinstance(operands[0], Sink) and isinstance(operands[2], Vec):
        targets = (Sink(),) * len(operands[2].items)
    puts = [writer(t, f"b{8 * size_of(kind)}", program) for t in targets]
    change = None if name == "cas" else _on_bits(kind, _OPERATIONS[name])
    order = next((m for m in i.mods if m in ("acquire", "release", "acq_rel")), "")
    space, unit = space_of(i), size_of(kind)

    def run(active: Active) -> str | None:
        addresses = where(active)[active.lanes]
        parts = (
            split_generic(active, addresses) if space == "generic" else [(space, active, addresses)]
        )
        old = np.zeros((active.cta.threads, len(puts)), UNSIGNED[unit])
        arguments = [get(active) for get in gets]
        for inner, part, at in parts:
            for owner, whose, offsets in (
                split_cluster(part, at) if inner == "cluster" else [(active.cta, part, at)]
            ):
                given = [a[whose.lanes] for a in arguments]
                kept = "shared" if inner == "cluster" else inner
                old[whose.lanes] = _apply(kept, i, whose, offsets, given, change, owner)
            synchronise(inner, part, at, reads=True, writes=True,
                        acquire=order in ("acquire", "acq_rel") and not i.has("cta"),
                        release=order in ("release", "acq_rel") and not i.has("cta"))  # fmt: skip
        for n, put in enumerate(puts):
            put(active, np.ascontiguousarray(old[:, n]))
        return SWITCH

    return run


def _values(operand: Operand, kind: str, program: Program) -> Callable[[Active], Array]:
    raw = UNSIGNED[size_of(kind)]
    items = operand.items if isinstance(operand, Vec) else (operand,)
    gets = [reader(item, kind, program) for item in items]
    return lambda active: np.stack([get(active).view(raw) for get in gets], 1)


def _apply(
    space: str, i: Instruction, active: Active, addresses: Array, given: list[Array],
    change: Change | None, owner: Cta,
) -> Array:  # fmt: skip
    """Do it, in shared memory in that of ``owner``; the old values ``[lanes, count]``."""
    count, unit = given[0].shape[1], given[0].dtype.itemsize
    cta, lanes, warps = active.cta, active.lanes, active.lane_warps
    size, shared = unit * count, owner.shared
    if space == "shared":
        if owner is not cta:
            cta.cluster.touch(active, owner)
            cta.grid.report.remote_store_bytes += size * len(lanes)
            cta.grid.memory.changes += 1
        offsets = shared.locate(addresses, size, lanes)
        cells = shared.cells(offsets, size)
        shared.check_read(cells, warps, lanes, strong=True, log=False, by=cta.clocks)
        shared.check_write(cells, warps, lanes, None, strong=True, by=cta.clocks)
        flat = shared.units[unit]
    else:
        memory = cta.grid.memory
        offsets, _ = memory.locate(addresses, size, lanes, write=True)
        memory.check_write(cta.clocks, warps, lanes, offsets, size, strong=True)
        flat = memory.units[unit]
        cta.grid.report.atomics += len(lanes)
    index = offsets[:, None] // unit + np.arange(count)
    before = flat[index].copy()
    old = np.zeros_like(before)
    left = np.arange(len(lanes))
    while left.size:  # each round takes the first remaining thread of every address
        _, first = np.unique(offsets[left], return_index=True)
        now = left[first]
        present = flat[index[now]]
        old[now] = present
        if change is not None:
            flat[index[now]] = change(present, given[0][now])
        else:
            flat[index[now]] = np.where(present == given[0][now], given[1][now], present)
        left = np.delete(left, first)
    if space == "shared":
        shared.mark_written(cells, warps, by=cta.clocks)
    elif (flat[index] != before).any():
        cta.grid.memory.changes += 1
    return old
