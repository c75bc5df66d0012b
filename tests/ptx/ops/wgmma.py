"""``wgmma``: matrix products of a warpgroup, with operands in shared memory, in the background.

The product is calculated when it is issued, by the rule of ``tensor.py``. Until the wait for its
group its accumulators may be neither read nor written (except by a further wgmma that accumulates
into them), the registers of A may not be written, and its operands in shared memory may not be
overwritten. Registers that others wrote need ``wgmma.fence`` first, and shared memory that
ordinary stores wrote needs ``fence.proxy.async``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from tests.ptx.errors import UnknownInstruction, WgmmaHazard
from tests.ptx.machine import RECONVERGE, Active, Cta, Function, Program
from tests.ptx.numeric import Array
from tests.ptx.ops import op, unknown
from tests.ptx.ops.operands import gathered, reader, set_register
from tests.ptx.ops.tensor import place, positions_a, widen
from tests.ptx.parser import Imm, Instruction, Operand, Reg, Vec

CHUNK = 16  # bytes: the unit of all layouts
SWIZZLE_BITS = {0: 0, 1: 3, 2: 2, 3: 1}  # descriptor code: address bits that are exchanged


@dataclass
class Running:
    """One wgmma under way."""

    accumulators: frozenset[int]
    sources: frozenset[int]  # registers of A
    cells: Array  # of shared memory, flat


@dataclass
class Group:
    """What a warpgroup has issued."""

    committed: list[list[Running]] = field(default_factory=list)
    issued: list[Running] = field(default_factory=list)


def _groups(cta: Cta) -> dict[int, Group]:
    found: dict[int, Group] = cta.state.setdefault("wgmma", {})
    return found


def _warpgroups(active: Active) -> list[int] | None:
    """The warpgroups that are active; None if one is incomplete."""
    if not active.whole:
        return None
    numbers, counts = np.unique(active.warps // 4, return_counts=True)
    return numbers.tolist() if (counts == 4).all() else None


@lru_cache(maxsize=256)
def _chunks(rows: int, columns: int, major_k: bool, swizzle: int, lead: int, stride: int) -> Array:
    """Byte offsets, before swizzling, of the 16-byte chunks of an operand.

    K-major: ``[rows, columns]`` chunks along K. MN-major: ``[columns (K), rows / 8]`` chunks along
    M or N. ``lead`` and ``stride`` are the descriptor's byte offsets.
    """
    width = 1 << SWIZZLE_BITS[swizzle]  # chunks in a swizzled row
    if major_k:
        r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
        step = CHUNK if swizzle else lead
        return (r % 8) * width * CHUNK + (r // 8) * stride + c * step
    k, c = np.meshgrid(np.arange(columns), np.arange(rows // 8), indexing="ij")
    if not swizzle:
        return c * stride + (k % 8) * CHUNK + (k // 8) * lead
    return (c % width) * CHUNK + (c // width) * lead + (k % 8) * width * CHUNK + (k // 8) * stride


def swizzled(addresses: Array, bits: int) -> Array:
    """Exchange the chunk within a row by the row's number: XOR of bits 4.. with bits 7.. ."""
    return addresses ^ ((addresses >> 7 & (1 << bits) - 1) << 4)


def _operand(
    cta: Cta, descriptor: int, rows: int, k: int, kind: str, major_k: bool
) -> tuple[Array, Array]:
    """``([rows, k] elements as float64, chunk addresses [rows or k, ...])``."""
    swizzle = descriptor >> 62 & 3
    if descriptor >> 49 & 7:
        raise UnknownInstruction("wgmma descriptor with a base offset")
    start = (descriptor & 0x3FFF) << 4
    lead, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    columns = k * (4 if kind == "tf32" else 2) // CHUNK if major_k else k
    where = start + _chunks(rows, columns, major_k, swizzle, lead, stride)
    where = swizzled(where, SWIZZLE_BITS[swizzle])
    cta.shared.locate(where.ravel().astype(np.uint64), CHUNK, np.zeros(where.size, np.int64))
    words = cta.shared.units[4].reshape(-1, 4)[where // CHUNK]
    elements = widen(kind, words)
    if major_k:
        return elements.reshape(rows, k), where
    return elements.reshape(k, rows).T, where


class Form:
    """``wgmma.mma_async.sync.aligned.m64nNkK.f32.a.b d, a, b, scale-d, ±1, ±1 {, trans...}``."""

    def __init__(self, i: Instruction, program: Program):
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.mods[3]) if len(i.mods) == 7 else None
        if shape is None or i.mods[4] != "f32" or i.mods[5] != i.mods[6]:
            raise unknown(i)
        self.n, self.k, self.kind = int(shape.group(1)), int(shape.group(2)), i.mods[5]
        if (self.kind, self.k) not in (("bf16", 16), ("f16", 16), ("tf32", 8)):
            raise unknown(i)
        d, a, b, scale_d, *flags = i.operands
        signs, transposes = _flags(i, flags[:2]), _flags(i, flags[2:])
        self.sign = signs[0] * signs[1]
        expected = 0 if self.kind == "tf32" else 1 if isinstance(a, Vec) else 2
        if len(transposes) != expected:
            raise unknown(i, "with these transpose flags")
        self.trans_a = expected == 2 and bool(transposes[0])
        self.trans_b = expected > 0 and bool(transposes[-1])
        if not isinstance(d, Vec) or len(_registers(d)) != self.n // 2:
            raise unknown(i, "with these accumulators")
        self.results = [r.index for r in d.items if isinstance(r, Reg)]
        self.sources = _registers(a) if isinstance(a, Vec) else frozenset()
        program.wgmma_registers.update(self.results, self.sources)
        self.get_d = gathered(d.items, "f32", program)
        self.a_in_registers = isinstance(a, Vec)
        get = gathered(a.items, "b32", program) if isinstance(a, Vec) else reader(a, "u64", program)
        self.get_a, self.get_b = get, reader(b, "u64", program)
        self.get_scale = reader(scale_d, "pred", program)

    def left(self, active: Active, group: int) -> tuple[Array, Array]:
        """A as ``[64, k]``, and the chunks of shared memory it comes from."""
        first, values = group * 128, self.get_a(active)
        if not self.a_in_registers:
            where = _same(values, first)
            return _operand(active.cta, where, 64, self.k, self.kind, not self.trans_a)
        per = 1 if self.kind == "tf32" else 2
        mine = widen(self.kind, values[:, first : first + 128]).reshape(-1, 4, 32, per)
        placed = place(mine, positions_a(self.k, per), (16, self.k))
        return placed.reshape(64, self.k), np.zeros((0, 2), np.int64)

    def right(self, active: Active, group: int) -> tuple[Array, Array]:
        """B as ``[n, k]``, and its chunks."""
        where = _same(self.get_b(active), group * 128)
        return _operand(active.cta, where, self.n, self.k, self.kind, not self.trans_b)


@op("wgmma.mma_async")
def mma_async(i: Instruction, program: Program) -> Function:
    """D = A·B (+ D) of one or more warpgroups."""
    form = Form(i, program)
    rows, columns = _accumulator_positions(form.n)
    flops = 2 * 64 * form.n * form.k

    def run(active: Active) -> str | None:
        groups = _warpgroups(active)
        if groups is None:
            return RECONVERGE
        cta = active.cta
        _check_registers(active, form.results, form.sources)
        out = np.zeros((form.n // 2, cta.threads), np.float32)
        scale = form.get_scale(active)
        old = form.get_d(active) if scale[active.mask].any() else out
        for group in groups:
            (a, a_chunks), (b, b_chunks) = form.left(active, group), form.right(active, group)
            cells = _read(cta, group, a_chunks, b_chunks, not form.trans_a)
            product = (form.sign * (a @ b.T))[rows, columns]
            lanes = slice(group * 128, group * 128 + 128)
            out[:, lanes] = product + old[:, lanes] if scale[group * 128] else product
            running = Running(frozenset(form.results), form.sources, cells)
            _groups(cta).setdefault(group, Group()).issued.append(running)
            cta.shared.readers_running[cells] += 1
        for index, value in zip(form.results, out, strict=True):
            set_register(active, index, value.view(np.uint32))
        _refresh(cta)
        report = cta.grid.report
        report.tensor_flops += flops * len(groups)
        report.tensor_flops_by_line[i.line] += flops * len(groups)
        return None

    return run


def _flags(i: Instruction, operands: list[Operand]) -> list[int]:
    if not all(isinstance(o, Imm) for o in operands):
        raise unknown(i)
    return [int(o.value) for o in operands if isinstance(o, Imm)]


def _registers(vector: Vec) -> frozenset[int]:
    return frozenset(r.index for r in vector.items if isinstance(r, Reg))


@lru_cache(maxsize=64)
def _accumulator_positions(n: int) -> tuple[Array, Array]:
    """Row and column in the 64×n result of (register, thread of the warpgroup)."""
    reg, thread = np.meshgrid(np.arange(n // 2), np.arange(128), indexing="ij")
    lane = thread % 32
    row = thread // 32 * 16 + lane // 4 + 8 * (reg // 2 % 2)
    return row, reg // 4 * 8 + (lane % 4) * 2 + reg % 2


def _same(values: Array, first: int) -> int:
    """The one descriptor of a warpgroup."""
    if (values[first : first + 128] != values[first]).any():
        raise WgmmaHazard("threads of a warpgroup disagree about a descriptor", thread=first)
    return int(values[first])


def _read(cta: Cta, group: int, a: Array, b: Array, a_rows_first: bool) -> Array:
    """Check the reads by the async proxy: A's rows by their warps, B by all four; the cells."""
    shared = cta.shared
    cells = []
    for warp in range(4):
        mine = b.ravel()
        if a.size:
            part = a[16 * warp : 16 * warp + 16] if a_rows_first else a[:, 2 * warp : 2 * warp + 2]
            mine = np.concatenate([part.ravel(), mine])
        found = shared.cells(mine, CHUNK)
        number = np.full(len(mine), 4 * group + warp)
        shared.check_read(found, number, number * 32, proxy=True)
        cells.append(found.ravel())
    return np.unique(np.concatenate(cells))


def _check_registers(active: Active, results: list[int], sources: frozenset[int]) -> None:
    """Accumulators of a running wgmma may not be its A, and all need a fence after other writes."""
    cta = active.cta
    unfenced = cta.state.get("wgmma_unfenced", {})
    for index in (*results, *sources):
        mask = unfenced.get(index)
        if mask is not None and (mask & active.mask).any():
            name = cta.program.kernel.registers[index].name
            raise WgmmaHazard(f"register {name} was written after the last wgmma.fence",
                              thread=int(np.argmax(mask & active.mask)))  # fmt: skip
    for index in sources:
        reading, _ = cta.pending_wgmma.get(index, (None, None))
        if reading is not None and (reading & active.mask).any():
            raise WgmmaHazard(
                "A is the accumulator of a running wgmma", thread=int(active.lanes[0])
            )
    for index in results:
        reading, writing = cta.pending_wgmma.get(index, (active.mask, active.mask))
        if reading is None and (writing & active.mask).any():
            raise WgmmaHazard(
                "an accumulator is the A of a running wgmma", thread=int(active.lanes[0])
            )


def _refresh(cta: Cta) -> None:
    """Recalculate which registers must not be (read, written), by threads."""
    pending: dict[int, tuple[Array | None, Array]] = {}
    for number, group in _groups(cta).items():
        mask = np.zeros(cta.threads, np.bool_)
        mask[128 * number : 128 * number + 128] = True
        for running in (r for batch in (*group.committed, group.issued) for r in batch):
            for index in running.sources:
                reading, writing = pending.get(index, (None, mask))
                pending[index] = (reading, writing | mask)
            for index in running.accumulators:
                reading, writing = pending.get(index, (mask, mask))
                pending[index] = (mask if reading is None else reading | mask, writing | mask)
    cta.pending_wgmma = pending


def check_pending(active: Active, i: Instruction, uses: frozenset[int]) -> None:
    """Raise if an ordinary instruction touches a register of a running wgmma."""
    if i.name == "wgmma":
        return  # checks by itself
    cta = active.cta
    written = set()
    if i.operands and i.name not in ("st", "red", "bar", "barrier", "cp", "mbarrier"):
        first = i.operands[0]
        written = set(_registers(first)) if isinstance(first, Vec) else set()
        if isinstance(first, Reg):
            written = {first.index}
    for index, (reading, writing) in cta.pending_wgmma.items():
        used = index in uses
        for mask, hit in ((reading, used), (writing, index in written)):
            if hit and mask is not None and (mask & active.mask).any():
                name = cta.program.kernel.registers[index].name
                raise WgmmaHazard(f"register {name} belongs to a wgmma that was not waited for",
                                  thread=int(np.argmax(mask & active.mask)))  # fmt: skip


@op("wgmma.fence")
def fence(i: Instruction, program: Program) -> Function:
    """What the warps wrote to registers is ready for wgmma."""

    def run(active: Active) -> str | None:
        if not active.whole:
            return RECONVERGE
        unfenced = active.cta.state.get("wgmma_unfenced", {})
        for index, mask in list(unfenced.items()):
            left = mask & ~active.mask
            if left.any():
                unfenced[index] = left
            else:
                del unfenced[index]
        return None

    return run


@op("wgmma.commit_group")
def commit(i: Instruction, program: Program) -> Function:
    """What was issued since the last commit is a group."""

    def run(active: Active) -> str | None:
        groups = _warpgroups(active)
        if groups is None:
            return RECONVERGE
        for number in groups:
            group = _groups(active.cta).setdefault(number, Group())
            group.committed.append(group.issued)
            group.issued = []
        return None

    return run


@op("wgmma.wait_group")
def wait(i: Instruction, program: Program) -> Function:
    """All but the newest n groups are done."""
    count = i.operands[0]
    if not isinstance(count, Imm):
        raise unknown(i)
    keep = int(count.value)

    def run(active: Active) -> str | None:
        groups = _warpgroups(active)
        if groups is None:
            return RECONVERGE
        cta = active.cta
        for number in groups:
            group = _groups(cta).setdefault(number, Group())
            done = group.committed[: len(group.committed) - keep]
            group.committed = group.committed[len(done) :]
            for running in (r for batch in done for r in batch):
                cta.shared.readers_running[running.cells] -= 1
                for warp in range(4 * number, 4 * number + 4):  # they read until now
                    cta.shared.mark_read(running.cells, warp)
        _refresh(cta)
        return None

    return run
