"""``ldmatrix`` and ``stmatrix``: 8×8 matrices of 16-bit elements between shared memory and a warp.

Lane 8·m + r of the warp gives the address of row r of matrix m. In register m lane t holds the
elements (t/4, 2·(t%4)) and (t/4, 2·(t%4) + 1) of matrix m, or of its transpose.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.machine import RECONVERGE, Active, Function, Program
from tests.ptx.numeric import Array
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import address_reader
from tests.ptx.ops.operands import gathered, writer
from tests.ptx.parser import Instruction, Operand, Vec

ROW = 16  # bytes


def _form(i: Instruction, registers: Operand) -> tuple[tuple[Operand, ...], bool]:
    items = registers.items if isinstance(registers, Vec) else (registers,)
    count = next((int(m[1:]) for m in i.mods if m in ("x1", "x2", "x4")), 0)
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"}
    if not set(i.mods) <= known or count != len(items) or not i.has("m8n8"):
        raise unknown(i)
    return items, i.has("trans")


def _rows(active: Active, addresses: Array, count: int) -> tuple[Array, Array]:
    """The lanes that give addresses, and the offsets they give."""
    lanes = (active.warps[:, None] * 32 + np.arange(8 * count)).ravel()
    return lanes, active.cta.shared.locate(addresses[lanes], ROW, lanes)


@op("ldmatrix")
def load_matrix(i: Instruction, program: Program) -> Function:
    """Shared memory to registers."""
    items, transposed = _form(i, i.operands[0])
    puts = [writer(item, "b32", program) for item in items]
    where = address_reader(i.operands[1], program)

    def run(active: Active) -> str | None:
        if not active.whole:
            return RECONVERGE
        shared = active.cta.shared
        lanes, offsets = _rows(active, where(active), len(puts))
        shared.check_read(shared.cells(offsets, ROW), lanes >> 5, lanes)
        active.cta.grid.report.shared(i.line, lanes >> 5, lanes, offsets, ROW)
        rows = shared.units[2].reshape(-1, 8)[offsets // ROW]
        matrices = rows.reshape(-1, len(puts), 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        values = matrices.view(np.uint32).reshape(-1, len(puts), 32)
        for n, put in enumerate(puts):
            if active.full:
                put(active, np.ascontiguousarray(values[:, n]).reshape(-1))
            else:
                out = np.zeros((active.cta.warps, 32), np.uint32)
                out[active.warps] = values[:, n]
                put(active, out.reshape(-1))
        return None

    return run


@op("stmatrix")
def store_matrix(i: Instruction, program: Program) -> Function:
    """Registers to shared memory."""
    items, transposed = _form(i, i.operands[1])
    where = address_reader(i.operands[0], program)
    get = gathered(items, "b32", program)
    count = len(items)

    def run(active: Active) -> str | None:
        if not active.whole:
            return RECONVERGE
        shared = active.cta.shared
        lanes, offsets = _rows(active, where(active), count)
        words = get(active).reshape(count, -1, 32)[:, active.warps].swapaxes(0, 1)
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = matrices.reshape(-1, 8)
        cells = shared.cells(offsets, ROW)
        shared.check_write(cells, lanes >> 5, lanes, None)
        shared.units[2].reshape(-1, 8)[offsets // ROW] = rows
        shared.mark_written(cells, lanes >> 5)
        active.cta.grid.report.shared(i.line, lanes >> 5, lanes, offsets, ROW)
        return None

    return run
