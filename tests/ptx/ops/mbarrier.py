"""``mbarrier``: barriers in shared memory that also count the bytes of asynchronous copies.

A phase is complete when as many arrivals came as the barrier was initialised with and no expected
bytes are outstanding. A copy lands at the last legal moment: when a thread asks for a phase whose
arrivals are all there. Waiting blocks; ``try_wait`` never gives up early.

Arrivals and expected bytes may come from other CTAs of the cluster (``shared::cluster``). What they
did before is released to a wait of cluster scope, if they arrive with cluster scope themselves. If
either has the scope of its CTA, the arrival orders no more than the reads before it: what has been
read may be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.errors import BarrierMisuse
from tests.ptx.machine import WAIT, Active, Cta, Function, Program
from tests.ptx.numeric import Array
from tests.ptx.ops import op, unknown
from tests.ptx.ops.addresses import SHARED_WINDOW, address_reader
from tests.ptx.ops.operands import reader, writer
from tests.ptx.parser import Instruction, Reg, Sink

SIZE = 8


@dataclass
class MBarrier:
    """State of one barrier."""

    count: int
    pending: int
    phase: int = 0
    bytes: int = 0  # expected and not yet delivered in this phase
    copies: list[tuple[int, Callable[[], None]]] = field(default_factory=list)  # (bytes, land)
    # Clocks of the arrivals in this phase and in all completed ones, by who sees them: "all" waits,
    # those of cluster "scope", or (what has been read) "none".
    row: dict[str, Array] = field(default_factory=dict)
    done: dict[str, Array] = field(default_factory=dict)

    def release(self, row: Array, to: str = "all") -> None:
        _join(self.row, to, row)

    def settle(self) -> None:
        """Complete the phase if it can be."""
        while self.pending == 0:
            for size, land in self.copies:
                land()
                self.bytes -= size
            self.copies = []
            if self.bytes:
                return
            self.phase += 1
            self.pending = self.count
            for to, row in self.row.items():
                _join(self.done, to, row)
            self.row = {}


def _join(rows: dict[str, Array], key: str, row: Array) -> None:
    rows[key] = np.maximum(rows[key], row) if key in rows else row.copy()


def offset_of(address: int) -> int:
    """A shared offset from a shared or generic address."""
    return address - SHARED_WINDOW if address >= SHARED_WINDOW else address


def find(active: Active, address: int, lane: int) -> MBarrier:
    """The CTA's own barrier at an address; its initialisation must be ordered before."""
    return find_in(active, active.cta, offset_of(address), lane)


def find_in(active: Active, owner: Cta, at: int, lane: int) -> MBarrier:
    """The barrier at an offset in the shared memory of ``owner``."""
    table = owner.state.setdefault("mbarriers", {})
    if owner is not active.cta:
        active.cta.cluster.touch(one_lane(active, lane), owner)
    if at not in table:
        raise BarrierMisuse("no mbarrier was initialised here", thread=lane, address=at)
    shared = owner.shared
    where = shared.locate(np.array([at], np.uint64), SIZE, np.array([lane]))
    shared.check_read(shared.cells(where, SIZE), np.array([lane >> 5]), np.array([lane]),
                      by=active.cta.clocks)  # fmt: skip
    found: MBarrier = table[at]
    return found


def one_lane(active: Active, lane: int) -> Active:
    """Only this thread."""
    mask = np.zeros(active.cta.threads, np.bool_)
    mask[lane] = True
    return Active(active.cta, mask, False)


def _each(active: Active, addresses: Array) -> list[tuple[int, int]]:
    """``(lane, address)`` of the active threads."""
    return list(zip(active.lanes.tolist(), addresses[active.lanes].tolist(), strict=True))


def _write(cta: Cta, at: int, lane: int) -> None:
    where = cta.shared.locate(np.array([at], np.uint64), SIZE, np.array([lane]))
    cells, warp = cta.shared.cells(where, SIZE), np.array([lane >> 5])
    cta.shared.check_write(cells, warp, np.array([lane]), None)
    cta.shared.mark_written(cells, warp, proxy=True)


@op("mbarrier.init")
def init(i: Instruction, program: Program) -> Function:
    """``mbarrier.init.shared.b64 [a], count``."""
    where = address_reader(i.operands[0], program)
    get_count = reader(i.operands[1], "u32", program)

    def run(active: Active) -> None:
        counts = get_count(active)
        table = active.cta.state.setdefault("mbarriers", {})
        for lane, address in _each(active, where(active)):
            _write(active.cta, offset_of(address), lane)
            table[offset_of(address)] = MBarrier(int(counts[lane]), int(counts[lane]))

    return run


@op("mbarrier.inval")
def invalidate(i: Instruction, program: Program) -> Function:
    """The memory is free for other uses."""
    where = address_reader(i.operands[0], program)

    def run(active: Active) -> None:
        for lane, address in _each(active, where(active)):
            find(active, address, lane)
            _write(active.cta, offset_of(address), lane)
            del active.cta.state["mbarriers"][offset_of(address)]

    return run


@op("mbarrier.arrive", "mbarrier.expect_tx")
def arrive(i: Instruction, program: Program) -> Function:
    """Arrive, expect bytes, or both; arriving releases what the thread did."""
    known = {"arrive", "expect_tx", "release", "relaxed", "cta", "cluster", "b64"}
    if any(m not in known and not m.startswith("shared") for m in i.mods):
        raise unknown(i)
    wide = i.has("cluster")
    operands = list(i.operands)
    arrives = i.mods[0] == "arrive"
    target = operands.pop(0) if arrives and isinstance(operands[0], Reg | Sink) else Sink()
    where = address_reader(operands[0], program)
    get_value = reader(operands[1], "u32", program) if len(operands) > 1 else None
    expects = i.has("expect_tx")
    put = writer(target, "b64", program)

    def run(active: Active) -> None:
        cta = active.cta
        values = get_value(active) if get_value else np.ones(cta.threads, np.uint32)
        states = np.zeros(cta.threads, np.uint64)
        for lane, address in _each(active, where(active)):
            owner, at = cta, offset_of(address)
            if i.has("shared::cluster"):
                owner, at = cta.cluster.owner(active, at, lane)
            barrier = find_in(active, owner, at, lane)
            remote = owner is not cta
            cta.grid.memory.changes += remote
            states[lane] = barrier.phase
            if expects:
                barrier.bytes += int(values[lane])
            if arrives:
                arrivals = 1 if expects else int(values[lane])
                if arrivals > barrier.pending:
                    raise BarrierMisuse("more arrivals than the mbarrier expects",
                                        thread=lane, address=offset_of(address))  # fmt: skip
                barrier.pending -= arrivals
                to = "none" if i.has("relaxed") else "all" if not remote else ""
                barrier.release(cta.clocks.snapshot(lane >> 5), to or ("scope" if wide else "none"))
                if not barrier.copies and not barrier.bytes:
                    barrier.settle()
        put(active, states)

    return run


@op("mbarrier.try_wait", "mbarrier.test_wait")
def wait(i: Instruction, program: Program) -> Function:
    """Whether (``try_wait``: wait until) the phase of a parity or state is complete; acquires."""
    put = writer(i.operands[0], "pred", program)
    where = address_reader(i.operands[1], program)
    parity = i.has("parity")
    get_phase = reader(i.operands[2], "u32" if parity else "u64", program)
    blocks, wide = i.has("try_wait"), i.has("cluster")
    if i.has("shared::cluster") or i.has("relaxed"):
        raise unknown(i)

    def run(active: Active) -> str | None:
        cta = active.cta
        phases = get_phase(active)
        done = np.zeros(cta.threads, np.bool_)
        barriers = [
            (lane, find(active, address, lane)) for lane, address in _each(active, where(active))
        ]
        for lane, barrier in barriers:
            barrier.settle()
            asked = int(phases[lane])
            done[lane] = barrier.phase % 2 != asked % 2 if parity else barrier.phase > asked
        if blocks and not done[active.mask].all():
            return WAIT
        seen = set()
        for lane, barrier in barriers:
            if done[lane] and (lane >> 5, id(barrier)) not in seen:
                seen.add((lane >> 5, id(barrier)))
                for to, row in barrier.done.items():
                    if to == "all" or (to == "scope" and wide):
                        cta.clocks.join(lane >> 5, row)
                    else:
                        cta.clocks.join_reads(lane >> 5, row)
        put(active, done)
        return None

    return run
