"""Barriers of the CTA and of the warp, and memory fences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptx.errors import BarrierMisuse
from tests.ptx.machine import RECONVERGE, WAIT, Active, Cta, Function, Program
from tests.ptx.numeric import Array
from tests.ptx.ops import op, unknown
from tests.ptx.ops.operands import reader, writer
from tests.ptx.ops.warp import incomplete
from tests.ptx.parser import Instruction, Operand


@dataclass
class Barrier:
    """One of the 16 barriers of a CTA."""

    arrived: Array  # threads of the present phase
    waiting: Array  # those of them that wait
    released: Array  # threads of completed phases that have not gone on yet
    values: Array  # predicates of a reduction
    reduced: Array  # predicates of the last completed phase's threads


def _barrier(cta: Cta, number: int) -> Barrier:
    table = cta.state.setdefault("barriers", {})
    if number not in table:
        table[number] = Barrier(*(np.zeros(cta.threads, np.bool_) for _ in range(5)))
    return table[number]


def _uniform(active: Active, values: Array, what: str) -> int:
    found = np.unique(values[active.lanes])
    if len(found) != 1:
        raise BarrierMisuse(f"threads disagree about the {what} of a barrier",
                            thread=int(active.lanes[0]))  # fmt: skip
    return int(found[0])


def arrive(
    active: Active, number: int, count: int | None, *, wait: bool, value: Array | None = None
) -> bool:
    """Arrive, or ask again; whether these threads may go on."""
    cta = active.cta
    barrier = _barrier(cta, number)
    mask = active.mask
    if barrier.released[mask].all():
        barrier.released &= ~mask
        return True
    if not barrier.waiting[mask].all():
        barrier.arrived |= mask
        if wait:
            barrier.waiting |= mask
        if value is not None:
            barrier.values = np.where(mask, value, barrier.values)
    expected = int(cta.alive.sum()) if count is None else count
    there = int(barrier.arrived.sum())
    if there > expected:
        raise BarrierMisuse(f"{there} threads at barrier {number}, which expects {expected}",
                            thread=int(active.lanes[0]))  # fmt: skip
    if there == expected:
        both = np.flatnonzero(barrier.arrived)
        waiting = np.flatnonzero(barrier.waiting)
        cta.clocks.barrier(np.unique(both >> 5), np.unique(waiting >> 5) if len(waiting) else None)
        barrier.released |= barrier.waiting
        barrier.reduced = barrier.values[both]
        barrier.arrived = np.zeros_like(mask)
        barrier.waiting = np.zeros_like(mask)
        cta.grid.report.barriers += 1
        if wait and barrier.released[mask].all():
            barrier.released &= ~mask
            return True
    return not wait


def _number_and_count(operands: tuple[Operand, ...], program: Program) -> tuple[Any, Any]:
    number = reader(operands[0], "u32", program)
    count = reader(operands[1], "u32", program) if len(operands) > 1 else None
    return number, count


@op("bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync",
    "bar.arrive", "bar.cta.arrive", "barrier.arrive", "barrier.cta.arrive")  # fmt: skip
def barrier(i: Instruction, program: Program) -> Function:
    """``bar.sync a[, b]`` and ``bar.arrive a, b``."""
    get_number, get_count = _number_and_count(i.operands, program)
    wait = i.has("sync")
    aligned = i.name == "bar" or i.has("aligned")

    def run(active: Active) -> str | None:
        if aligned and not active.whole:
            return RECONVERGE
        number = _uniform(active, get_number(active), "number")
        count = None if get_count is None else _uniform(active, get_count(active), "count")
        return None if arrive(active, number, count, wait=wait) else WAIT

    return run


@op("bar.red", "barrier.red", "bar.cta.red", "barrier.cta.red")
def reduction(i: Instruction, program: Program) -> Function:
    """``bar.red.popc/and/or``: a barrier that also reduces a predicate."""
    name = next((m for m in i.mods if m in ("popc", "and", "or")), "")
    if not name:
        raise unknown(i)
    target, number_operand, *rest = i.operands
    get_number, get_count = _number_and_count((number_operand, *rest[:-1]), program)
    get_value = reader(rest[-1], "pred", program)
    put = writer(target, "u32" if name == "popc" else "pred", program)
    combine: Any = {"popc": np.sum, "and": np.all, "or": np.any}[name]

    def run(active: Active) -> str | None:
        if not active.whole:
            return RECONVERGE
        number = _uniform(active, get_number(active), "number")
        count = None if get_count is None else _uniform(active, get_count(active), "count")
        if not arrive(active, number, count, wait=True, value=get_value(active)):
            return WAIT
        result = combine(_barrier(active.cta, number).reduced)
        put(active, np.full(program.threads, result, np.uint32 if name == "popc" else np.bool_))
        return None

    return run


@op("bar.warp.sync")
def warp_barrier(i: Instruction, program: Program) -> Function:
    """Orders the threads of a warp; a warp is one actor here, so only convergence matters."""
    members = reader(i.operands[0], "u32", program)
    return lambda active: RECONVERGE if incomplete(active, members(active)) else None


@op("membar", "fence")
def fence(i: Instruction, program: Program) -> Function:
    """A fence of gpu or system scope orders; one of the CTA alone tells other CTAs nothing."""
    if i.has("proxy"):
        return _proxy_fence(i)
    if i.has("mbarrier_init"):
        return lambda active: None
    scope = next((m for m in i.mods if m in ("cta", "gl", "gpu", "sys", "cluster")), "")
    if not scope:
        raise unknown(i)

    def run(active: Active) -> None:
        if scope != "cta":
            for warp in active.warps.tolist():
                active.cta.clocks.fence(warp)

    return run


def _proxy_fence(i: Instruction) -> Function:
    kinds = [m for m in i.mods if m.startswith(("async", "tensormap", "alias", "generic"))]
    if not kinds:
        raise unknown(i)
    if not any(m.startswith("async") for m in kinds):
        return lambda active: None
    whole = any(m in ("async", "async.shared::cluster") for m in kinds)

    def run(active: Active) -> None:
        cta = active.cta
        for other in cta.cluster.ctas if whole or i.has("shared::cluster") else (cta,):
            other.shared.fence_proxy(active.warps, by=cta.clocks)

    return run
