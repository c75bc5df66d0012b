"""``cp.async``: 4 to 16 bytes per thread from global to shared memory, in the background.

The data land at the last legal moment, when the thread waits for their group. Until then the
target may be neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.errors import OutOfBounds
from tests.ptx.machine import Active, Cta, Function, Program
from tests.ptx.numeric import Array
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import address_reader
from tests.ptx.ops.operands import reader
from tests.ptx.parser import Imm, Instruction, Reg


@dataclass
class Copy:
    """What one instruction has under way; one row per thread."""

    lanes: Array
    group: Array
    offsets: Array
    data: Array  # [threads, bytes]

    def part(self, chosen: Array) -> Copy:
        return Copy(self.lanes[chosen], self.group[chosen], self.offsets[chosen], self.data[chosen])


@dataclass
class Copies:
    """Of a CTA: the number of groups each thread has committed, and what has not landed."""

    committed: Array
    flying: list[Copy]


def _state(cta: Cta) -> Copies:
    if "copies" not in cta.state:
        cta.state["copies"] = Copies(np.zeros(cta.threads, np.int64), [])
    return cta.state["copies"]


@op("cp.async.ca", "cp.async.cg")
def copy(i: Instruction, program: Program) -> Function:
    """``cp.async.ca/cg.shared.global [dst], [src], size {, src-size}``: the rest is zeros."""
    known = ("ca", "cg", "async", "shared", "shared::cta", "global")
    if any(m not in known and not m.startswith("L2::") for m in i.mods):
        raise unknown(i)
    target, source = (address_reader(o, program) for o in i.operands[:2])
    size = int(i.operands[2].value) if isinstance(i.operands[2], Imm) else 0
    extra = i.operands[3:-1] if i.has("L2::cache_hint") else i.operands[3:]
    if size not in (4, 8, 16) or (i.has("cg") and size != 16) or len(extra) > 1:
        raise unknown(i)
    ignored = extra and isinstance(extra[0], Reg) and extra[0].kind == "pred"
    get_size = reader(extra[0], "pred" if ignored else "u32", program) if extra else None

    def run(active: Active) -> None:
        cta, lanes = active.cta, active.lanes
        shared, report = cta.shared, cta.grid.report
        offsets = shared.locate(target(active)[lanes], size, lanes)
        cells = shared.cells(offsets, size)
        shared.check_write(cells, active.lane_warps, lanes, None)
        taken = np.full(len(lanes), size)
        if get_size is not None:
            given = get_size(active)[lanes]
            taken = np.where(given, 0, size) if ignored else given.astype(np.int64)
        addresses = source(active)[lanes]
        data = _read(active, addresses, taken, size)
        shared.mark_flying(cells)
        state = _state(cta)
        state.flying.append(Copy(lanes, state.committed[lanes], offsets, data))
        report.load(i.line, i.text, active.lane_warps, addresses, taken)

    return run


def _read(active: Active, addresses: Array, taken: Array, size: int) -> Array:
    """``[threads, size]`` bytes, zeros after the first ``taken``."""
    memory, lanes, warps = active.cta.grid.memory, active.lanes, active.lane_warps
    out = np.zeros((len(lanes), size), np.uint8)
    if (taken > size).any():
        raise OutOfBounds("src-size above cp-size", thread=int(lanes[np.argmax(taken > size)]))
    whole = np.flatnonzero(taken == size)
    if whole.size:
        offsets, writable = memory.locate(addresses[whole], size, lanes[whole], write=False)
        if writable:
            memory.check_read(active.cta.clocks, warps[whole], lanes[whole], offsets, size)
        out[whole] = memory.data.reshape(-1, size)[offsets // size]
    for n in np.flatnonzero((taken > 0) & (taken < size)).tolist():
        one, length = slice(n, n + 1), int(taken[n])
        memory.locate(addresses[one] & ~np.uint64(size - 1), 1, lanes[one], write=False)
        offsets, _ = memory.locate(addresses[one], 1, lanes[one], write=False)
        memory.locate(addresses[one] + np.uint64(length - 1), 1, lanes[one], write=False)
        out[n, :length] = memory.data[int(offsets[0]) : int(offsets[0]) + length]
    return out


@op("cp.async.commit_group")
def commit(i: Instruction, program: Program) -> Function:
    """The copies since the last commit are a group."""

    def run(active: Active) -> None:
        _state(active.cta).committed[active.mask] += 1

    return run


@op("cp.async.wait_group", "cp.async.wait_all")
def wait(i: Instruction, program: Program) -> Function:
    """All but the newest n groups of the thread have landed (``wait_all``: everything)."""
    everything = i.has("wait_all")
    keep = 0 if everything else int(i.operands[0].value) if isinstance(i.operands[0], Imm) else -1
    if keep < 0:
        raise unknown(i)

    def run(active: Active) -> None:
        state = _state(active.cta)
        if everything:
            state.committed[active.mask] += 1
        limit = state.committed - keep
        left = []
        for flight in state.flying:
            lands = active.mask[flight.lanes] & (flight.group < limit[flight.lanes])
            if lands.all():
                _land(active.cta, flight)
            elif lands.any():
                _land(active.cta, flight.part(lands))
                left.append(flight.part(~lands))
            else:
                left.append(flight)
        state.flying = left

    return run


def _land(cta: Cta, flight: Copy) -> None:
    shared, size = cta.shared, flight.data.shape[1]
    shared.data.reshape(-1, size)[flight.offsets // size] = flight.data
    shared.mark_written(shared.cells(flight.offsets, size), flight.lanes >> 5)
