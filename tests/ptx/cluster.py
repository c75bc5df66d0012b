"""A cluster: CTAs that are resident together, their barrier, and their view of each other's shared
memory.

An address of ``shared::cluster`` is that of ``shared::cta`` with the CTA's rank in its upper bits;
without those bits it is the accessing CTA's own. Shared memory of another CTA may be touched once a
warp of that CTA is known to have run, and as long as it is known to run on: the touch must happen
before its exit. Both are decided by the clocks, not by the luck of the interpreter's schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.errors import BarrierMisuse, OutOfBounds, RemoteShared
from tests.ptx.numeric import Array

if TYPE_CHECKING:
    from tests.ptx.machine import Active, Cta

RANK_SHIFT = 24  # no CTA has that much shared memory
LARGEST = 16  # CTAs; above 8 a launch must allow it


def address_in(rank: int, offset: int) -> int:
    """The ``shared::cluster`` address of an offset in the CTA ``rank``."""
    return offset | (rank + 1) << RANK_SHIFT


class Cluster:
    """The CTAs of one cluster, by rank."""

    def __init__(self) -> None:
        self.ctas: list[Cta] = []
        self.arrived: list[Array] = []  # threads, by rank, in the present phase of the barrier
        self.passed: list[Array] = []  # threads of the completed phase that have not waited yet
        self._row: Array | None = None  # clocks released in this phase
        self._done: Array | None = None  # in the last one
        # By rank of the owner: the last remote access of each actor, and where it was.
        self._accesses: list[dict[int, tuple[int, int, str]]] = []

    def join(self, cta: Cta) -> None:
        self.ctas.append(cta)
        self.arrived.append(np.zeros(cta.threads, np.bool_))
        self.passed.append(np.zeros(cta.threads, np.bool_))
        self._accesses.append({})

    def owner(self, active: Active, address: int, lane: int) -> tuple[Cta, int]:
        """The CTA whose shared memory an address means, and the offset there."""
        rank, offset = (address >> RANK_SHIFT) - 1, address & (1 << RANK_SHIFT) - 1
        if rank < 0:
            return active.cta, offset
        if rank >= len(self.ctas):
            raise OutOfBounds(f"shared memory of CTA {rank} of a cluster of {len(self.ctas)}",
                              thread=lane, address=address)  # fmt: skip
        return self.ctas[rank], offset

    def touch(self, active: Active, owner: Cta) -> None:
        """The active threads access the shared memory of ``owner``, another CTA."""
        clocks, now = active.cta.clocks, active.cta.now
        its = slice(owner.clocks.first, owner.clocks.first + owner.clocks.warps)
        for warp in active.warps.tolist():
            if owner.done:
                raise RemoteShared(f"CTA {owner.rank} of the cluster has exited", thread=32 * warp)
            if not clocks.rows[warp, its].any():
                raise RemoteShared(
                    f"CTA {owner.rank} of the cluster may not have started: nothing orders this "
                    "after anything it did", thread=32 * warp,
                )  # fmt: skip
            moment = int(clocks.now[warp])
            self._accesses[owner.rank][int(clocks.own[warp])] = (moment, now.line, now.text)

    def leave(self, cta: Cta) -> None:
        """All threads of a CTA have exited: every access to its memory must have been before."""
        seen = cta.clocks.rows.max(0)
        for actor, (moment, line, text) in self._accesses[cta.rank].items():
            if seen[actor] < moment:
                fault = RemoteShared(f"CTA {cta.rank} of the cluster may exit before this access")
                fault.locate(line, text)
                raise fault

    def arrive(self, active: Active, *, release: bool) -> None:
        """``barrier.cluster.arrive``."""
        cta, mask = active.cta, active.mask
        if ((self.arrived[cta.rank] | self.passed[cta.rank]) & mask).any():
            raise BarrierMisuse("arrives at the cluster's barrier again before it waited",
                                thread=int(active.lanes[0]))  # fmt: skip
        self.arrived[cta.rank] |= mask
        for warp in active.warps.tolist():
            row = cta.clocks.snapshot(warp) if release else cta.clocks.fenced.get(warp)
            if row is not None:
                self._row = row.copy() if self._row is None else np.maximum(self._row, row)
        cta.grid.memory.changes += 1
        self._settle(cta)

    def wait(self, active: Active, *, acquire: bool) -> bool:
        """``barrier.cluster.wait``: whether the phase is complete."""
        cta, mask = active.cta, active.mask
        there = self.arrived[cta.rank] | self.passed[cta.rank]
        if (mask & ~there).any():
            raise BarrierMisuse("waits at the cluster's barrier without having arrived",
                                thread=int(np.argmax(mask & ~there)))  # fmt: skip
        self._settle(cta)
        if (mask & ~self.passed[cta.rank]).any():
            return False
        self.passed[cta.rank] &= ~mask
        if acquire and self._done is not None:
            for warp in active.warps.tolist():
                cta.clocks.join(warp, self._done)
        return True

    def _settle(self, cta: Cta) -> None:
        """Complete the phase when every thread that has not exited has arrived."""
        if any((c.alive & ~a).any() for c, a in zip(self.ctas, self.arrived, strict=True)):
            return
        if not any(a.any() for a in self.arrived):
            return
        for rank, arrived in enumerate(self.arrived):
            self.passed[rank] = arrived & self.ctas[rank].alive
            self.arrived[rank] = np.zeros_like(arrived)
        self._done, self._row = self._row, None
        cta.grid.memory.changes += 1
        cta.grid.report.cluster_barriers += 1
